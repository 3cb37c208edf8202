"""Every draw has an owner: streams repeat by seed and differ by everything else."""

import itertools
import multiprocessing
import random

import numpy as np
import pytest
import torch

from timm_igkd.random_streams import (
    StreamIndices,
    derive_seed,
    fixed_noise,
    generator,
    restored_state,
    seed_global,
    seeded,
    uniforms,
)


def global_draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("draw", [torch.rand, torch.randn])
def test_fixed_noise_is_the_same_whatever_was_drawn_and_the_default_dtype(draw):
    state, plain = torch.get_rng_state(), fixed_noise(2, 3, draw=draw)
    torch.set_default_dtype(torch.float64)
    try:
        again = fixed_noise(2, 3, draw=draw)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.dtype == torch.float32
    assert torch.equal(again, plain)
    assert len(plain.unique()) == 6


def test_seed_repeats():
    assert derive_seed(7, "overlay", 1, 2) == derive_seed(7, "overlay", 1, 2)
    assert uniforms(7, "overlay", 1, 2) == uniforms(7, "overlay", 1, 2)
    np.testing.assert_array_equal(generator(7, "x").random(5), generator(7, "x").random(5))


def test_streams_differ_by_seed_purpose_epoch_and_index():
    names = list(itertools.product((0, 1, -1), ("overlay", "transform", "mixup"), range(8), range(64)))
    assert len({derive_seed(*name) for name in names}) == len(names)
    assert len({uniforms(*name) for name in names}) == len(names)


@pytest.mark.parametrize("indices", [(), (0,), (0, 0), (1, 0), (0, 1)])
def test_number_and_order_of_indices_matter(indices):
    others = {(), (0,), (0, 0), (1, 0), (0, 1)} - {indices}
    assert derive_seed(0, "x", *indices) not in {derive_seed(0, "x", *other) for other in others}


def test_seeds_fit_torch_and_numpy():
    seeds = [derive_seed(seed, "x", index) for seed in (-5, 0, 2**62) for index in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


def test_seed_does_not_change_between_versions():
    assert derive_seed(0, "overlay", 3, 14) == 6269293988755661796


def test_uniforms_are_uniform_and_independent():
    draws = np.array([uniforms(3, "overlay", 0, index) for index in range(4000)])
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:  # 4000 draws in 10 bins: chi-square with 9 degrees of freedom, 99.99 % below 33.7
        counts = np.histogram(column, bins=10, range=(0, 1))[0]
        assert ((counts - 400) ** 2 / 400).sum() < 33.7
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.06
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.06


def test_restored_state_restores_all_three_generators():
    seed_global(5)
    expected = global_draws()
    seed_global(5)
    with restored_state():
        inside = global_draws()
        seed_global(99)
        global_draws()
    assert inside == expected
    assert global_draws() == expected


def test_restored_state_restores_after_an_error():
    seed_global(5)
    expected = global_draws()
    seed_global(5)

    @restored_state()
    def fail() -> None:
        global_draws()
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert global_draws() == expected


def test_seeded_block_repeats_and_leaves_the_generators():
    seed_global(1)
    expected = global_draws()
    seed_global(1)
    with seeded(8):
        first = global_draws()
    with seeded(8):
        second = global_draws()
    with seeded(9):
        other = global_draws()
    assert first == second
    assert not set(first) & set(other)
    assert global_draws() == expected


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**63 - 1])
def test_any_derived_seed_can_seed_the_globals(seed):
    with restored_state():
        seed_global(seed)
        global_draws()


def test_a_key_and_its_occurrence_in_an_epoch_are_indices():
    indices, keys = StreamIndices(), ["0" * 32, "f" * 32, "1" + "0" * 31, "2" + "0" * 30 + "1"]
    first = [indices.of(key, 0) for key in keys]
    assert len(set(first)) == 4
    assert [indices.of(key, 0) for key in keys] == [(*found[:2], 1) for found in first]
    assert [indices.of(key, 1) for key in keys] == first
    assert all(isinstance(derive_seed(0, "x", *found), int) for found in first)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # of Python from 3.12 on
def test_a_forked_process_counts_the_images_of_its_own_streams():
    indices, key = StreamIndices(), "0" * 32
    first = indices.of(key, 0)
    with multiprocessing.get_context("fork").Pool(1, initializer=_take, initargs=(indices,)) as pool:
        assert pool.apply(_next, (key,)) == first
    assert indices.of(key, 0) == (*first[:2], 1)


def _take(indices: StreamIndices) -> None:
    global _TAKEN
    _TAKEN = indices


def _next(key: str) -> tuple[int, int, int]:
    return _TAKEN.of(key, 0)
