"""Random numbers with an owner: every draw comes from a stream named by (seed, purpose, indices).

Two runs with one seed share initialisation, order and crops whatever else they do, and neither the number of workers
nor the position in a batch changes a draw. An image of a stream has no index: `StreamIndices` gives it some.
"""

import os
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import xxhash
from torch import Tensor

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


def fixed_noise(*shape: int, draw: Callable[..., Tensor] = torch.rand) -> Tensor:
    """Return float32 noise of a shape, always the same whatever torch's default dtype; draws from no global stream.

    Args:
        shape: of the noise.
        draw: torch.rand, [0, 1), or torch.randn.
    """
    return draw(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


class StreamIndices:
    """The indices by which an image of a stream owns its draws: its content key, and how often it came before.

    Counted in this process and within an epoch: timm repeats images to fill batches, and gives each worker its own. A
    worker that is forked begins to count anew, as one that is spawned does.
    """

    def __init__(self) -> None:
        self._counted = -1, -1  # process and epoch
        self._seen: Counter[int] = Counter()

    def of(self, key: str, epoch: int) -> tuple[int, int, int]:
        """Return the indices of the image that comes now.

        Args:
            key: 32 hex digits, see `content_key`.
            epoch: another than at the last call starts the count again.
        """
        if self._counted != (counted := (os.getpid(), epoch)):
            self._counted, self._seen = counted, Counter()
        first, second = struct.unpack("<2q", bytes.fromhex(key))
        self._seen[first] += 1
        return first, second, self._seen[first] - 1


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
