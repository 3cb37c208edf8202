"""Random numbers with an owner: every draw comes from a stream named by (seed, purpose, indices).

Two runs with one seed share initialisation, order and crops whatever else they do, and neither the number of workers
nor the position in a batch changes a draw.
"""

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import xxhash

from timm_igkd.errors import InputError


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """Return a 63-bit seed for one stream, e.g. `derive_seed(seed, "overlay", epoch, sample)`."""
    return xxhash.xxh3_64_intdigest(_packed(seed, purpose, indices)) >> 1


def _packed(seed: int, purpose: str, indices: tuple[int, ...]) -> bytes:
    try:
        return purpose.encode() + struct.pack(f"<{len(indices) + 1}q", seed, *indices)
    except struct.error as error:
        raise InputError(f"seed must be a whole number of at most 64 bits, got {seed}") from error


def generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """Return a numpy generator of its own for one stream."""
    return np.random.default_rng(derive_seed(seed, purpose, *indices))


def uniforms(seed: int, purpose: str, *indices: int) -> tuple[float, float]:
    """Return two uniform numbers in [0, 1) of one stream, straight from the hash: no generator to set up per image."""
    bits = xxhash.xxh3_128_intdigest(_packed(seed, purpose, indices))
    return (bits & (1 << 53) - 1) * 2.0**-53, (bits >> 64 & (1 << 53) - 1) * 2.0**-53


@contextmanager
def restored_state() -> Iterator[None]:
    """Give the global python, numpy and torch CPU generators back in the state they had on entry."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_global(seed: int) -> None:
    """Seed the global python, numpy and torch CPU generators, which timm's and torchvision's transforms draw from."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with the global generators seeded, then restore them."""
    with restored_state():
        seed_global(seed)
        yield
