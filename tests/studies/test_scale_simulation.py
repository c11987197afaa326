"""The conductor's loop at many GPUs, on virtual time: what docs/scaling.md claims."""

from dataclasses import replace

import pytest

from studies.scale_simulation import FULL, SCENARIOS, Work, plot, simulate, table


def check(row: dict, bound: int) -> None:
    assert row["staleness"] <= bound
    messages, gpus = row["messages/step"], row["gpus"]
    assert messages["sample"] == messages["score"] == 4 * gpus or row["lost"]
    assert messages["weights"] <= 4, "one question for all who ask at once"
    assert messages["log"] <= 4 + row["lost"], "what the log is told does not grow with the GPUs"
    assert row["bytes_in_flight"] <= (bound + 1) * row["image_bytes/step"] * 4


@pytest.mark.parametrize("bound", [0, 1])
def test_throughput_of_a_gpu_up_to_64(bound):
    rows = [simulate(gpus, bound, iterations=4) for gpus in (1, 8, 64)]
    for row in rows:
        check(row, bound)
    assert all(row["images/s/gpu"] > 0.85 * rows[0]["images/s/gpu"] for row in rows)


def test_dying_actors_cost_what_they_did_not_finish_and_no_group():
    row = simulate(8, 1, replace(Work(), failures=20), iterations=4)
    check(row, 1)
    assert row["lost"] > 0 and row["images/s/gpu"] > 0.5


def test_the_weights_of_a_large_network_wait_for_the_owners_link():
    """7 other nodes: seven times a node's share from one owner, three rounds as a tree."""
    owner, ray, tree = (
        simulate(64, 0, FULL, fan_out=how, iterations=2)["fan_out_s"] for how in ("owner", "ray", "tree")
    )
    assert owner == pytest.approx(7 * 0.8, rel=0.01) and ray == pytest.approx(owner, rel=0.2)
    assert tree == pytest.approx(3 * 0.8, rel=0.01)


def test_the_table_and_the_plot(tmp_path):
    rows = [{"scenario": "adapter, synchronous", **simulate(gpus, 0, iterations=2)} for gpus in (1, 2)]
    assert table(rows).splitlines()[2].startswith("| adapter, synchronous | 1 | ") and " | 100% | " in table(rows)
    plot(rows, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["adapter, synchronous", "adapter, bound 1", "adapter, bound 1, actors die"])
def test_512_gpus_keep_their_throughput(name):
    bound, work, fan_out = SCENARIOS[name]
    one, many = (simulate(gpus, bound, work, fan_out=fan_out) for gpus in (1, 512))
    check(many, bound)
    assert many["images/s/gpu"] > 0.85 * one["images/s/gpu"]
