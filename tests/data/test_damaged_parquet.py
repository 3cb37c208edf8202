"""Parquet with altered bytes: refused in one line if they matter, whatever Arrow or datasets raise on it."""

import contextlib
import random

import pytest

from timm_igkd.data.loading import load_labeled_images
from timm_igkd.errors import InputError


@pytest.mark.parametrize("seed", range(20))
def test_altered_footer_is_no_traceback(seed, tiny_images):
    path = next(tiny_images(n=4).glob("*.parquet"))
    data, draws = bytearray(path.read_bytes()), random.Random(seed)
    footer = int.from_bytes(data[-8:-4], "little")
    for _ in range(3):
        data[-8 - draws.randrange(1, footer)] ^= 1 << draws.randrange(8)
    path.write_bytes(data)
    with contextlib.suppress(InputError):
        load_labeled_images(str(path.parent), "train").content_hash()
