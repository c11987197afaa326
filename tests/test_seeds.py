import numpy as np
import pytest
import torch

from rlproxi.seeds import Collection, NamedNoise, Purpose, generator, rng, seed_of

NAMES = [(0, 0, 7, 3, j) for j in range(4)] + [(0, 0, 7, 4, 0)]


def draws(names, start_names=None, steps=3, shape=(2, 3)):
    """[B, 1 + steps, ...]: a row's start, then what each step drew."""
    noise = NamedNoise(names, start_names)
    x = noise.start(shape)
    return torch.stack([x, *(noise(k, x) for k in range(steps, 0, -1))], 1)


def test_a_row_depends_on_its_own_name_alone():
    together = draws(NAMES)
    for i, name in enumerate(NAMES):
        assert torch.equal(draws([name])[0], together[i])
    order = [4, 2, 0, 3, 1]
    assert torch.equal(draws([NAMES[i] for i in order]), together[order])


def test_rows_steps_and_start_all_differ():
    numbers = draws(NAMES).flatten(0, 1).flatten(1)
    assert len({tuple(row.tolist()) for row in numbers}) == len(NAMES) * 4


def test_named_noise_is_standard_normal():
    numbers = draws([(1, 0, 0, 0, j) for j in range(64)], shape=(16, 16)).flatten()
    assert float(numbers.mean()) == pytest.approx(0, abs=5 / len(numbers) ** 0.5)
    assert float(numbers.var()) == pytest.approx(1, abs=5 * (2 / len(numbers)) ** 0.5)


def test_a_group_may_share_its_start_but_never_its_steps():
    shared = draws(NAMES[:4], [NAMES[0]] * 4)
    own = draws(NAMES[:4])
    assert all(torch.equal(row, own[0, 0]) for row in shared[:, 0])
    assert all(torch.equal(row, shared[0, 1]) for row in shared[:, 1]), "the first step's noise is part of z_N"
    assert not torch.equal(shared[0, 1], shared[0, 0])
    assert torch.equal(shared[:, 2:], own[:, 1:-1])


def test_noise_takes_dtype_and_shape_of_what_it_is_added_to():
    like = torch.zeros(2, 5, dtype=torch.float64)
    drawn = NamedNoise(NAMES[:2])(1, like)
    assert drawn.dtype == torch.float64 and drawn.shape == like.shape
    assert torch.equal(drawn.float(), NamedNoise(NAMES[:2])(1, like.float()))


def test_names_give_the_same_numbers_for_ever():
    """Golden values: a change of these is a change of every run's images."""
    assert seed_of(0) == 3717377837946358015
    assert seed_of(0, 4) == 5938374411900224067
    assert seed_of(1, 2, 3) == 6530208866956668065
    assert torch.allclose(torch.randn(3, generator=generator(7, 1)), torch.tensor([0.774, 2.0521, 1.3088]), atol=5e-5)
    assert rng(7, 1).integers(1000, size=4).tolist() == [513, 303, 414, 686]


def test_seeds_fit_every_generator_and_do_not_collide():
    seeds = {seed_of(a, b, c) for a in range(10) for b in range(9) for c in range(9)}
    assert len(seeds) == 810 and all(0 <= s < 2**63 for s in seeds)


def test_a_name_is_not_its_extension_by_zero():
    assert seed_of(1) != seed_of(1, 0) and rng(1).random() != rng(1, 0).random()


def test_names_are_non_negative():
    with pytest.raises(ValueError):
        seed_of(-1, 2)


def test_a_named_generator_starts_at_its_beginning_each_time():
    first = rng(3, 4)
    first.random(10)
    assert np.array_equal(rng(3, 4).random(2), np.random.default_rng((2, 3, 4)).random(2))


def test_purposes_never_change():
    """A change of these is a change of every run's images, weights or order of data."""
    assert {p.name: p.value for p in Purpose} == {
        "TRAIN": 0,
        "HELDOUT": 1,
        "LORA": 266,
        "NETWORK": 3559,
        "SHARDS": 3329,
        "ROWS": 3330,
        "BATCHES": 3331,
        "REFERENCE": 20213,
        "WINDOW": 22507,
        "R0_STEP": 24753,
        "R0_GUIDANCE": 27930,
        "PROMPTS": 37895,
        "PRETRAIN": 39548,
        "CROP": 50185,
        "NOISE_LEVEL": 53714,
        "CAPTION_DROPOUT": 55305,
        "R0_ETA": 59296,
        "SAMPLER_CHECK": 72215,
    }
    assert [c.value for c in Collection] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_purpose_names_as_its_integer_does():
    assert seed_of(3, Purpose.LORA) == seed_of(3, 0x10A)
    drawn = [np.random.default_rng((3, word, 5)).random() for word in (Purpose.WINDOW, 0x57EB)]
    assert drawn[0] == drawn[1]
