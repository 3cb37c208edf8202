"""The gradient of a chunk: in float32 or bfloat16, eager or compiled, cut and padded as each wants it."""

import shutil
from typing import Any

import pytest
import torch
from tiny_parts import tiny_teacher

from timm_igkd.attribution.chunk_gradient import Arithmetic, ChunkGradient
from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.options import IGOptions

COMPILED = Arithmetic(compiled=True)
INPUTS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BASELINES, TARGETS = torch.zeros(1, 3, 32, 32), torch.tensor([0, 1, 0])


def engine_of(arithmetic: Arithmetic, n_steps: Any = 16, name: str = "test_resnet") -> FastEngine:
    return FastEngine(tiny_teacher(name, size=32), IGOptions(n_steps=n_steps), 8, (3, 32, 32), arithmetic=arithmetic)


def test_bfloat16_maps_are_near_those_of_float32_and_the_outputs_equal():
    exact, rounded = engine_of(Arithmetic()), engine_of(Arithmetic("bfloat16"))
    logits = exact.forward(INPUTS)
    assert torch.allclose(rounded.forward(INPUTS), logits, atol=1e-5)
    wanted, found = (each.attribute(INPUTS, BASELINES, TARGETS, logits).values for each in (exact, rounded))
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.1


@pytest.mark.parametrize(
    ("pairs", "sizes"), [(3, [3]), (4, [4]), (70, [64, 4, 2]), (100, [64, 16, 16, 4]), (128, [64, 64]), (0, [])]
)
def test_compiled_kernel_cuts_pairs_into_its_sizes(pairs, sizes):
    parts = list(ChunkGradient(tiny_teacher(), "logit", COMPILED).parts(pairs, 64))
    assert [part.stop - part.start for part in parts] == sizes
    assert [part.start for part in parts] == [sum(sizes[:index]) for index in range(len(sizes))]


def test_eager_kernel_cuts_pairs_into_full_chunks():
    parts = list(ChunkGradient(tiny_teacher(), "logit", Arithmetic()).parts(70, 32))
    assert parts == [slice(0, 32), slice(32, 64), slice(64, 70)]


@pytest.mark.parametrize(("count", "padded"), [(1, 4), (4, 4), (5, 16), (17, 64), (64, 64)])
def test_compiled_kernel_pads_to_three_sizes(count, padded):
    assert ChunkGradient(tiny_teacher(), "logit", COMPILED).padded(count, 64) == padded
    assert ChunkGradient(tiny_teacher(), "logit", Arithmetic()).padded(count, 64) == count


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize(("name", "n_steps"), [("test_resnet", 7), ("test_resnet", "auto"), ("mobilenetv2_050", 7)])
def test_compiled_kernel_gives_the_eager_maps(name, n_steps):
    eager, compiled = (engine_of(arithmetic, n_steps, name) for arithmetic in (Arithmetic(), COMPILED))
    logits = eager.forward(INPUTS)
    wanted, found = (each.attribute(INPUTS, BASELINES, TARGETS, logits) for each in (eager, compiled))
    assert torch.equal(found.n_steps, wanted.n_steps)
    assert torch.allclose(found.values, wanted.values, atol=1e-4 * float(wanted.values.abs().max()))
