"""What an engine saves is what it goes on from, bit for bit, at every ZeRO stage; on one rank here."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures.small_rank import engine_of, same, state, train

MORE = [pytest.param(kind, stage, marks=pytest.mark.exhaustive) for kind in ("lora", "buffers") for stage in (1, 3)]


def broken(kind, stage, folder, then=None):
    """(metrics of steps 3 to 5, state after them) of a run that went on from a checkpoint.

    For two engines: a fresh one, and the one that has trained on and goes back."""
    engine = engine_of(kind, stage)
    train(engine, 0, 3)
    engine.save(folder / "three")
    found = []
    for attempt in ("unbroken", "back", "fresh"):
        if attempt == "back":
            engine.load(folder / "three")
        elif attempt == "fresh":
            engine.close()
            engine = engine_of(kind, stage if then is None else then, seed=9)  # nothing of it may remain
            engine.load(folder / "three")
        metrics = train(engine, 3, 6)
        engine.save(folder / attempt)
        found.append((metrics, state(folder / attempt)))
    engine.close()
    return found


@pytest.mark.parametrize(
    "kind, stage",
    [("plain", 0), ("plain", 1), ("plain", 2), ("plain", 3), ("lora", 0), ("buffers", 0), ("lora", 2), *MORE],
)
def test_weights_moments_start_and_metrics_are_those_of_the_unbroken_run(kind, stage, process_group, tmp_path):
    (metrics, expected), *others = broken(kind, stage, tmp_path)
    assert any(key.startswith("exp_avg_sq/") for key in expected) and any(key.startswith("start/") for key in expected)
    for found, tensors in others:
        assert found == metrics
        assert same(tensors, expected)


@pytest.mark.parametrize(
    "before, after",
    [(0, 3), (3, 0), *(pytest.param(a, b, marks=pytest.mark.exhaustive) for a, b in ((0, 1), (1, 2), (2, 3), (3, 1)))],
)
def test_another_zero_stage_goes_on_from_the_same_state(before, after, process_group, tmp_path):
    (metrics, expected), _, (found, tensors) = broken("plain", before, tmp_path, then=after)
    assert tensors.keys() == expected.keys()
    for one, other in zip(metrics, found):
        assert other == pytest.approx(one, rel=1e-5)
    for key, value in expected.items():
        torch.testing.assert_close(tensors[key], value, rtol=1e-4, atol=1e-6)


def test_large_states_are_split_and_read_again(process_group, tmp_path, monkeypatch):
    monkeypatch.setattr("actors.train.engine_state.FILE_BYTES", 100)
    engine = engine_of("plain", 0)
    train(engine, 0, 2)
    files = engine.save(tmp_path)
    assert len(files) > 3 and files == sorted(tmp_path.iterdir())
    saved = state(tmp_path)
    train(engine, 2, 4)
    engine.load(tmp_path)
    engine.save(tmp_path / "again")
    assert same(state(tmp_path / "again"), saved)
    engine.close()


def test_before_a_first_step_there_are_weights_alone(process_group, tmp_path):
    engine = engine_of("plain", 1)
    engine.save(tmp_path)
    assert {key.partition("/")[0] for key in state(tmp_path)} == {"weight"}
    expected = train(engine, 0, 2)
    engine.load(tmp_path)
    assert train(engine, 0, 2) == expected
    engine.close()


def test_another_networks_state_is_refused_with_the_remedy(process_group, tmp_path):
    engine, other = engine_of("plain", 0), engine_of("lora", 0)
    engine.save(tmp_path)
    with pytest.raises(ValueError, match=r"state of another network.*weight/.*model\.\* settings"):
        other.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no engine state"):
        engine.load(tmp_path / "nothing")
    file = next(tmp_path.iterdir())
    save_file({**load_file(file), "exp_avg/0.weight": torch.zeros(7)}, file)
    with pytest.raises(ValueError, match="exp_avg/0.weight"):
        engine.load(tmp_path)
    engine.close()
    other.close()
