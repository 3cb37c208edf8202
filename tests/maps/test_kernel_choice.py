"""Kernels for CUDA: what is chosen from which measurements, and that every kernel computes the same gradients.

The choice is made on a CUDA device alone; here the measurements are given, and the kernels run on the CPU.
"""

import json
import shutil
from typing import Any

import pytest
import torch
from tiny_parts import ImageList, noise_image, tiny_teacher

from timm_igkd.attribution.chunk_gradient import ChunkGradient, Kernel, exact_convolutions
from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.ig_options import IGOptions
from timm_igkd.maps import kernel_choice
from timm_igkd.maps.kernel_choice import Probe, choose_kernel, computation

AUTO, FIXED = IGOptions(n_steps="auto"), IGOptions(n_steps=50)
BF16, COMPILED, BOTH = Kernel("bfloat16"), Kernel(compiled=True), Kernel("bfloat16", compiled=True)
LONG, SHORT = 10**9, 10


class Measured:
    """An engine whose rate and maps are given."""

    def __init__(self, kernel: Kernel, chunk_size: int):
        self.kernel, self.chunk_size = kernel, chunk_size


@pytest.fixture
def choose(monkeypatch):
    """Choose with given rates by (kernel, chunk size or None) and errors by kernel."""

    def choice(options: IGOptions, images: int, rates: dict[Any, float], errors: dict[Kernel, float] | None = None):
        def rate(engine: Any, probe: Any) -> float:
            found = rates.get((engine.kernel, engine.chunk_size), rates.get(engine.kernel))
            assert found is not None
            if found < 0:
                raise torch.cuda.OutOfMemoryError("no memory")
            return found

        def create(kernel: Kernel, chunk: int) -> Any:
            if kernel not in (errors or {}) and kernel != Kernel():
                raise RuntimeError("no compiler\nat all")
            return Measured(kernel, chunk)

        monkeypatch.setattr(kernel_choice, "_rate", rate)
        monkeypatch.setattr(kernel_choice, "_maps", lambda engine, probe, options: engine.kernel)
        monkeypatch.setattr(kernel_choice, "_error", lambda maps, reference, kernel: (errors or {})[kernel])
        return choose_kernel(create, Probe(*[torch.zeros(1)] * 3), options, 256, images)

    return choice


def test_smallest_chunk_near_the_best_rate_is_taken(choose):
    rates = {(Kernel(), 32): 50.0, (Kernel(), 64): 98.0, (Kernel(), 128): 100.0, (Kernel(), 256): 99.0}
    assert choose(FIXED, SHORT, rates).chunk_size == 64


def test_chunks_beyond_the_memory_are_left_out(choose):
    rates = {(Kernel(), 32): 50.0, (Kernel(), 64): 98.0, (Kernel(), 128): -1, (Kernel(), 256): -1}
    assert choose(FIXED, SHORT, rates).chunk_size == 64
    assert choose(FIXED, SHORT, {Kernel(): -1}).chunk_size == 32


def test_bfloat16_within_the_tolerance_is_taken(choose):
    choice = choose(AUTO, SHORT, {Kernel(): 100, BF16: 200}, {BF16: 0.0009})
    assert choice.kernel == BF16
    assert choice.measured[-1]["error"] == 0.0009


@pytest.mark.parametrize("error", [0.0011, float("inf"), float("nan")])
def test_bfloat16_beyond_the_tolerance_is_not(choose, error):
    assert choose(AUTO, SHORT, {Kernel(): 100, BF16: 200}, {BF16: error}).kernel == Kernel()


def test_slower_kernel_is_not_taken(choose):
    assert choose(AUTO, SHORT, {Kernel(): 100, BF16: 90}, {BF16: 0.0}).kernel == Kernel()


def test_fixed_steps_stay_in_float32(choose):
    rates = dict.fromkeys((Kernel(), BF16, COMPILED, BOTH), 100.0) | {COMPILED: 300.0}
    choice = choose(FIXED, LONG, rates, {COMPILED: 1e-4})
    assert choice.kernel == COMPILED
    assert {entry["dtype"] for entry in choice.measured} == {"float32"}


def test_compiling_waits_for_long_work(choose):
    rates, errors = (
        dict.fromkeys((Kernel(), BF16, COMPILED, BOTH), 100.0) | {BOTH: 300.0},
        dict.fromkeys((BF16, COMPILED, BOTH), 0.0),
    )
    assert choose(AUTO, LONG, rates, errors).kernel == BOTH
    assert not any(entry["compiled"] for entry in choose(AUTO, SHORT, rates, errors).measured)


def test_kernel_that_fails_is_left_out_and_named(choose):
    choice = choose(FIXED, LONG, {Kernel(): 100.0})
    assert choice.kernel == Kernel()
    assert choice.measured[-1]["failed"] == "no compiler"


@pytest.mark.parametrize("error", [float("inf"), float("nan")])
def test_refused_kernels_can_be_written_into_the_manifest(choose, error):
    choice = choose(AUTO, SHORT, {Kernel(): 100, BF16: 200}, {BF16: error})
    assert choice.measured[-1]["failed"] == "maps that are not finite"
    json.dumps(choice.measured, allow_nan=False)


def test_failure_without_a_message_is_named_by_its_kind(choose, monkeypatch):
    def fail(*_: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(kernel_choice, "_try", fail)
    choice = choose(AUTO, SHORT, {Kernel(): 100, BF16: 200}, {BF16: 0.0})
    assert choice.measured[-1]["failed"] == "NotImplementedError"


def engine_of(kernel: Kernel, options: IGOptions = FIXED, name: str = "test_resnet") -> FastEngine:
    return FastEngine(tiny_teacher(name, size=32), options, 8, (3, 32, 32), kernel=kernel)


def probe_of(count: int = 3) -> Probe:
    torch.manual_seed(0)
    return Probe(torch.randn(count, 3, 32, 32), torch.zeros(1, 3, 32, 32), torch.arange(count) % 2)


def test_bfloat16_maps_are_near_those_of_float32_and_the_outputs_equal():
    exact, rounded, probe = engine_of(Kernel()), engine_of(BF16), probe_of()
    wanted, found = (kernel_choice._maps(engine, probe, FIXED) for engine in (exact, rounded))
    error = kernel_choice._error(found, wanted, BF16)
    assert 0 < error < 0.05
    assert kernel_choice._error(wanted, wanted, BF16) < 1e-12
    assert torch.allclose(rounded.forward(probe.inputs), exact.forward(probe.inputs), atol=1e-5)


def test_maps_that_are_not_finite_have_an_infinite_error():
    maps = torch.ones(2, 4)
    assert kernel_choice._error(maps.log() / maps.log(), maps, Kernel()) == float("inf")


def test_relative_error_is_of_the_worst_image():
    reference = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert kernel_choice._error(reference + torch.tensor([[0.0, 0.5], [0.0, 0.2]]), reference, Kernel()) == (
        pytest.approx(0.2)
    )


def test_rate_is_of_the_engine_that_is_asked():
    assert kernel_choice._rate(engine_of(Kernel()), probe_of(), repeats=1) > 0


@pytest.mark.parametrize(
    ("pairs", "sizes"), [(3, [3]), (4, [4]), (70, [64, 4, 2]), (100, [64, 16, 16, 4]), (128, [64, 64]), (0, [])]
)
def test_compiled_kernel_cuts_pairs_into_its_sizes(pairs, sizes):
    parts = list(ChunkGradient(tiny_teacher(), "logit", COMPILED).parts(pairs, 64))
    assert [part.stop - part.start for part in parts] == sizes
    assert [part.start for part in parts] == [sum(sizes[:index]) for index in range(len(sizes))]


def test_eager_kernel_cuts_pairs_into_full_chunks():
    parts = list(ChunkGradient(tiny_teacher(), "logit", Kernel()).parts(70, 32))
    assert parts == [slice(0, 32), slice(32, 64), slice(64, 70)]


def test_convolutions_on_a_gpu_are_in_float32_and_the_setting_returns():
    """cuDNN's default is TF32; the context of a CUDA device is entered here without one."""
    settings: Any = torch.backends.cudnn.conv
    before = settings.fp32_precision
    with exact_convolutions(torch.device("cuda")):
        assert settings.fp32_precision == "ieee"
    assert settings.fp32_precision == before
    with exact_convolutions(torch.device("cpu")):
        assert settings.fp32_precision == before


@pytest.mark.parametrize(("count", "padded"), [(1, 4), (4, 4), (5, 16), (17, 64), (64, 64)])
def test_compiled_kernel_pads_to_three_sizes(count, padded):
    assert ChunkGradient(tiny_teacher(), "logit", COMPILED).padded(count, 64) == padded
    assert ChunkGradient(tiny_teacher(), "logit", Kernel()).padded(count, 64) == count


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize(("name", "n_steps"), [("test_resnet", 7), ("test_resnet", "auto"), ("mobilenetv2_050", 7)])
def test_compiled_kernel_gives_the_eager_maps(name, n_steps):
    options, probe = IGOptions(n_steps=n_steps), probe_of()
    eager, compiled = (engine_of(kernel, options, name) for kernel in (Kernel(), COMPILED))
    logits = eager.forward(probe.inputs)
    arguments = probe.inputs, probe.baselines, probe.targets, logits
    wanted, found = eager.attribute(*arguments), compiled.attribute(*arguments)
    assert torch.equal(found.n_steps, wanted.n_steps)
    assert torch.allclose(found.values, wanted.values, atol=1e-4 * float(wanted.values.abs().max()))


def test_cpu_has_no_choice():
    images = ImageList([noise_image(0, 32, 32)], [0])
    manifest = {"options": AUTO.to_dict(), "engine": "fast", "n": 1}
    plan = computation(tiny_teacher(), images, manifest, torch.device("cpu"), None)
    assert plan["dtype"] == "float32"
    assert "kernels" not in plan
    assert computation(tiny_teacher(), images, manifest, torch.device("cpu"), 5)["chunk_size"] == 5
