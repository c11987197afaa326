"""A model behind real HTTP: what is served is what the model draws."""

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from actors.serve import image_service
from actors.serve.image_request import Limits
from rlproxi.config.sections import Sampler, Schedule
from rlproxi.models.pipeline import TextToImage
from rlproxi.models.text import build_text_encoder
from rlproxi.models.unet import ProximalUNet

pytestmark = pytest.mark.system

PROMPTS = ["a smiling person with a red hat", "a person with long hair", "glasses", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = ProximalUNet(sample_size=16, channels=(32,), blocks=(1,), attention=(True,), text_dim=32, pooled_dim=32)
        for p in unet.parameters():
            torch.nn.init.normal_(p, std=0.1)
    text = build_text_encoder([*PROMPTS, "broken"], 32, 1, 12)
    with torch.no_grad():  # one word of which no image can be made
        text.model.get_input_embeddings().weight[text.tokenizer.convert_tokens_to_ids("broken")] = float("nan")
    model = TextToImage(unet, text, Schedule(), Sampler(num_inference_steps=3))
    return model.save_pretrained(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return TextToImage.from_pretrained(folder)


@pytest.fixture(scope="module")
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def service(ray_session, folder, port):
    """The same model twice: alone (as on any CPU, here with a short queue) and batched."""
    from ray import serve

    serve.shutdown()  # another test's Serve listens nowhere, and HTTP options cannot be changed
    apps = {"alone": (None, Limits(queue=6, wait_ms=100)), "batched": (False, Limits(batch=4, wait_ms=300))}
    urls = {}
    for name, (exact, limits) in apps.items():
        app = image_service.application(folder, name, cpus=0.5, exact=exact, limits=limits)
        urls[name] = image_service.up(app, name, f"images-{name}", "127.0.0.1", port, f"/{name}")
    yield urls
    serve.shutdown()


def ask(url: str, body=None, raw: bytes | None = None):
    """(status, headers, body): POST where there is a body, else GET."""
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def generate(url: str, **body) -> np.ndarray:
    status, headers, data = ask(f"{url}/generate", body)
    assert status == 200 and headers["Content-Type"] == "image/png", data
    return np.asarray(Image.open(io.BytesIO(data)))


def at_once(url: str, bodies: list[dict]) -> list:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: ask(f"{url}/generate", body), bodies))


def info(url: str) -> dict:
    return json.loads(ask(f"{url}/info")[2])


def test_health_and_facts(service):
    status, _, data = ask(service["alone"] + "/healthz")
    assert status == 200 and json.loads(data) == {"status": "ok", "id": "alone"}
    facts = info(service["alone"])
    assert facts["model"] == {"size": 16, "device": "cpu", "precision": "float32", "exact": True}
    assert facts["sampler"]["num_inference_steps"] == 3 and facts["limits"]["queue"] == 6


def test_defaults_are_the_models_own_and_a_drawn_seed_is_told(service, model):
    status, headers, data = ask(service["alone"] + "/generate", {"prompt": PROMPTS[0]})
    assert status == 200 and headers["X-Steps"] == "3" and headers["X-Guidance-Scale"] == "1"
    expected = model(PROMPTS[:1], seeds=[int(headers["X-Seed"])])[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), expected)
    nulls = {"seed": None, "steps": None, "guidance_scale": None}
    again = ask(service["alone"] + "/generate", {"prompt": PROMPTS[0], **nulls})
    assert again[0] == 200 and again[1]["X-Seed"] != headers["X-Seed"]


MIXED = [{"prompt": PROMPTS[i % 4], "seed": i, "steps": 2 + i % 2, "guidance_scale": 1 + i // 4} for i in range(6)]


def test_what_was_asked_for_together_is_drawn_as_if_alone(service, model):
    answers = at_once(service["alone"], MIXED)
    for body, (status, _, data) in zip(MIXED, answers):
        expected = model(body["prompt"], body["steps"], body["guidance_scale"], [body["seed"]])[0]
        assert status == 200 and np.array_equal(np.asarray(Image.open(io.BytesIO(data))), expected), body
    assert any(int(size) > 1 for size in info(service["alone"])["images_by_batch"]), "requests shared batches"


def test_batches_are_gathered_by_steps_and_guidance_and_change_a_pixel_by_one_at_most(service, model):
    answers = at_once(service["batched"], MIXED)
    for body, (status, _, data) in zip(MIXED, answers):
        expected = model(body["prompt"], body["steps"], body["guidance_scale"], [body["seed"]])[0].astype(int)
        assert status == 200 and np.abs(np.asarray(Image.open(io.BytesIO(data))) - expected).max() <= 1, body
    same = at_once(service["batched"], [{"prompt": PROMPTS[0], "seed": i} for i in range(8)])
    assert {status for status, _, _ in same} == {200}
    counts = info(service["batched"])["images_by_batch"]
    assert max(map(int, counts)) == 4 and sum(counts.values()) == 14 == info(service["batched"])["served"]


def test_the_queue_is_bounded_and_the_rest_is_told_to_come_back(service, model):
    bodies = [{"prompt": PROMPTS[0], "seed": i, "steps": 60} for i in range(12)]
    answers = at_once(service["alone"], bodies)
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 503} and statuses.count(200) >= 6
    for i, (status, headers, data) in enumerate(answers):
        if status == 503:
            assert int(headers["Retry-After"]) >= 1 and "6 requests are under way" in json.loads(data)["error"]
        else:
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), model(PROMPTS[0], 60, seeds=[i])[0])
    facts = info(service["alone"])
    assert facts["turned_away"] == statuses.count(503) and facts["under_way"] == 0
    assert ask(service["alone"] + "/generate", {"prompt": "x"})[0] == 200, "it serves on"


@pytest.mark.parametrize(
    "body, status, words",
    [
        ({"prompt": "x", "steps": 101}, 422, "steps: 101, at most 100 are allowed"),
        ({"prompt": "x", "steps": 0}, 422, "steps: Input should be greater than or equal to 1, not 0"),
        ({"prompt": "x", "steps": 2.5}, 422, "steps: Input should be a valid integer, not 2.5"),
        ({"prompt": "x", "steps": True}, 422, "steps: Input should be a valid integer, not true"),
        ({"prompt": "x", "seed": -1}, 422, "seed: Input should be greater than or equal to 0, not -1"),
        ({"prompt": "x", "seed": 2**53}, 422, "seed: Input should be less than or equal to 9007199254740991"),
        (
            {"prompt": "x", "guidance_scale": 101},
            422,
            "guidance_scale: Input should be less than or equal to 100, not 101",
        ),
        ({"prompt": "x" * 2001}, 422, "prompt: 2001 characters, at most 2000 are allowed"),
        ({"prompt": ["x"]}, 422, 'prompt: Input should be a valid string, not ["x"]'),
        ({}, 422, "prompt: missing"),
        ({"prompt": "x", "width": 512}, 422, "width: unknown field; known are prompt, seed, steps, guidance_scale"),
        (["x"], 400, 'the body must be a JSON object, not ["x"]'),
        (b'{"prompt": "x", "guidance_scale": NaN}', 400, "NaN is not a JSON number"),
        (b'{"prompt": "x", "guidance_scale": 1e999}', 422, "guidance_scale: Input should be a finite number"),
        (b'{"prompt": "\\ud800"}', 422, "prompt: half of a surrogate pair"),
        (b"prompt=x", 400, "the body is not JSON"),
        (b"\xff\xfe", 400, "the body is not JSON"),
        (b"", 400, "the body is not JSON"),
        (b"[" * 20000, 400, "the body is not JSON"),
        (b'{"prompt": "' + b"x" * 40000 + b'"}', 413, "the body is larger than 28096 bytes"),
    ],
)
def test_bad_requests_are_refused_in_words(service, body, status, words):
    before = info(service["alone"])
    raw = body if isinstance(body, bytes) else None
    code, _, data = ask(service["alone"] + "/generate", body, raw)
    told = json.loads(data)["error"]
    assert code == status and words in told and "Traceback" not in told and len(told) < 300
    after = info(service["alone"])
    assert after["refused"] == before["refused"] + 1 and after["served"] == before["served"]


def test_a_body_without_a_length_is_bounded_too(service, port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(
        "POST",
        "/alone/generate",
        iter([b" " * 10000] * 5),
        encode_chunked=True,
        headers={"Transfer-Encoding": "chunked"},
    )
    answer = connection.getresponse()
    assert answer.status == 413 and "larger than" in json.loads(answer.read())["error"]
    connection.close()


def test_other_paths_and_methods(service):
    status, headers, data = ask(service["alone"] + "/generate")
    assert status == 405 and headers["Allow"] == "POST" and "takes POST" in json.loads(data)["error"]
    assert ask(service["alone"] + "/healthz", {})[0] == 405
    status, _, data = ask(service["alone"] + "/etc/passwd")
    assert status == 404 and "known are /healthz, /info, /generate" in json.loads(data)["error"]


def test_a_request_that_fails_says_no_more_than_that_and_fails_alone(service, model):
    bodies = [{"prompt": PROMPTS[0], "seed": 0}, {"prompt": "broken", "seed": 1}, {"prompt": PROMPTS[1], "seed": 2}]
    before = info(service["batched"])["failed"]
    for url in service.values():
        good, broken, other = at_once(url, bodies)
        assert broken[0] == 500 and json.loads(broken[2]) == {"error": "the model could not draw this image"}
        for body, (status, _, data) in ((bodies[0], good), (bodies[2], other)):
            expected = model(body["prompt"], seeds=[body["seed"]])[0].astype(int)
            assert status == 200 and np.abs(np.asarray(Image.open(io.BytesIO(data))) - expected).max() <= 1
    assert info(service["batched"])["failed"] == before + 1


def test_a_model_that_cannot_be_loaded_is_told_in_its_own_words(service, model, port, tmp_path):
    from ray import serve

    model.save_pretrained(tmp_path / "damaged")
    for file in (tmp_path / "damaged" / "unet").glob("*.safetensors"):
        file.write_bytes(b"junk")
    app = image_service.application(tmp_path / "damaged", "damaged", cpus=0.5)
    with pytest.raises(ValueError, match="cannot be served: .*ValueError: .* is damaged or incomplete"):
        image_service.up(app, "damaged", "images-damaged", "127.0.0.1", port, "/damaged")
    assert "images-damaged" not in serve.status().applications


def test_mistakes_before_anything_is_deployed(service, folder, port, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        image_service.application(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=rf"--host 127.0.0.1 --port {port} cannot be had .*in use.*: choose another"):
        image_service.check_address("127.0.0.1", port, running=False)
    with pytest.raises(ValueError, match="--port 70000 cannot be had"):
        image_service.check_address("127.0.0.1", 70000, running=False)
    with pytest.raises(ValueError, match="3 replicas of 1 GPUs each, and the cluster has 0: lower --replicas or --gpu"):
        image_service.check_size(3, 1, 1)
    with pytest.raises(ValueError, match=r"--port \d+ cannot be had .*with other HTTP options"):
        image_service.up(image_service.application(folder, "x", cpus=0.5), "x", "images-x", "127.0.0.1", port + 1, "/x")


def test_the_command_serves_until_ctrl_c_and_takes_its_application_down(ray_session, service, folder, model, port):
    from ray import serve

    address = ray_session.get_runtime_context().gcs_address
    command = [
        sys.executable,
        "-m",
        "rlproxi",
        "serve",
        str(folder),
        "--port",
        str(port),
        "--cpus",
        "0.5",
        "--max-steps",
        "7",
    ]
    # A shell's background jobs, this one's parents perhaps, hand on an ignored SIGINT; a terminal does not.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "RAY_ADDRESS": address},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    guard = threading.Timer(240, process.kill)
    guard.start()
    try:
        line = process.stdout.readline()
        assert line == f"serving {folder} at http://127.0.0.1:{port}; Ctrl-C ends it\n", line + process.stderr.read()
        url = f"http://127.0.0.1:{port}"
        assert np.array_equal(generate(url, prompt=PROMPTS[0], seed=5), model(PROMPTS[0], seeds=[5])[0])
        assert "at most 7" in json.loads(ask(url + "/generate", {"prompt": "x", "steps": 8})[2])["error"]
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    finally:
        guard.cancel()
        process.kill()
    assert process.returncode == 0 and "ending" in output and "Traceback" not in errors, errors
    assert set(serve.status().applications) == {"images-alone", "images-batched"}
    assert ask(f"http://127.0.0.1:{port}/healthz")[0] == 404
