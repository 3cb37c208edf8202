"""Steps placed by error: which nodes are asked for, what their sum is, when a path stops."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from timm_igkd.attribution.adaptive_path import ERROR_SHARE, FIRST_INTERVALS, AdaptivePaths, squared_jump
from timm_igkd.attribution.ig_options import IGOptions
from timm_igkd.attribution.options import reduce_channels

SHAPE = (3, 4, 5)
Integrand = Callable[[int, float], Tensor]


def steps_at_random(seed: int, jumps: int = 3) -> Integrand:
    """Return gradients that are step functions of the position, as on ReLU nets: (image, position) -> [3, H, W]."""

    def gradient(image: int, position: float) -> Tensor:
        draws = np.random.default_rng([seed, image])
        levels = draws.normal(size=(jumps + 1, *SHAPE)).astype(np.float32)
        return torch.from_numpy(levels[np.searchsorted(np.sort(draws.random(jumps)), position)])

    return gradient


def run(integrand: Integrand, numbers: list[int], knows_start: bool = False, part: int = 5, **options):
    """Refine the paths of images `numbers` to their end; return them and the nodes each asked for."""
    difference = torch.stack([integrand(100 + number, 0.5) for number in numbers])
    start = torch.stack([integrand(number, 0.0) for number in numbers]) if knows_start else None
    paths = AdaptivePaths(difference, IGOptions(n_steps="auto", **options), start)
    asked: list[list[float]] = [[] for _ in numbers]
    while len((wanted := paths.wanted())[0]):
        images, nodes = wanted
        for image, node in zip(images, nodes, strict=True):
            asked[image].append(float(node))
        for begin in range(0, len(images), part):
            chunk = slice(begin, min(begin + part, len(images)))
            pairs = zip(images[chunk], nodes[chunk], strict=True)
            paths.add(chunk, torch.stack([integrand(numbers[image], node) for image, node in pairs]))
        paths.refine()
    return paths, asked


def trapezoid(integrand: Integrand, image: int, nodes: list[float]) -> Tensor:
    found = sorted(nodes)
    values = torch.stack([integrand(image, node) for node in found]).double()
    return torch.trapezoid(values, torch.tensor(found, dtype=torch.float64), dim=0)


def test_constant_gradient_needs_only_the_first_intervals():
    paths, asked = run(lambda image, position: torch.full(SHAPE, float(image)), [1, 2])
    assert asked == [[i / FIRST_INTERVALS for i in range(FIRST_INTERVALS + 1)]] * 2
    assert paths.converged.all()
    assert torch.allclose(paths.attribution[1], torch.full(SHAPE, 102.0 * 2))


@pytest.mark.parametrize("reduction", ["abs_sum", "sum"])
@pytest.mark.parametrize("knows_start", [False, True])
def test_sum_is_the_trapezoid_rule_over_all_nodes(reduction, knows_start):
    integrand = steps_at_random(0)
    paths, asked = run(integrand, [0, 1, 2], knows_start, reduction=reduction, tolerance=0.999, max_steps=48)
    for image in range(3):
        nodes = asked[image] + [0.0] * knows_start
        assert len(set(nodes)) == len(nodes)
        assert paths.n_steps[image] == len(asked[image])
        wanted = paths.difference[image] * trapezoid(integrand, image, nodes)
        assert torch.allclose(paths.attribution[image].double(), wanted.double(), atol=1e-5)


def test_images_do_not_see_each_other():
    integrand, options = steps_at_random(1), {"tolerance": 0.995, "max_steps": 40}
    together, asked = run(integrand, [0, 1, 2, 3], **options)
    assert len({len(nodes) for nodes in asked}) > 1  # they stop at different times
    for image in range(4):
        alone, nodes = run(integrand, [image], **options)
        assert nodes[0] == asked[image]
        assert torch.equal(alone.attribution[0], together.attribution[image])
        assert alone.converged[0] == together.converged[image]


def test_parts_do_not_change_the_result():
    integrand = steps_at_random(2)
    whole, _ = run(integrand, [0, 1], part=1000)
    parts, _ = run(integrand, [0, 1], part=1)
    assert torch.equal(whole.attribution, parts.attribution)


def test_nodes_gather_at_the_jump():
    jump = 0.3

    def integrand(image: int, position: float) -> Tensor:
        return torch.full(SHAPE, 1.0) if image == 100 else torch.arange(60.0).reshape(SHAPE) * (position > jump)

    _, asked = run(integrand, [0], tolerance=0.9999999, max_steps=24)
    distance = np.abs(np.array(asked[0]) - jump)
    assert distance.min() < 1 / 1000
    assert (distance < 1 / 20).sum() >= 7  # of 24; equal steps would have 2


def test_halves_of_largest_error_come_first():
    def integrand(image: int, position: float) -> Tensor:
        size = 10.0 * (position > 0.7) + 1.0 * (position > 0.2)
        return torch.full(SHAPE, 1.0) if image == 100 else torch.arange(60.0).reshape(SHAPE) * size

    _, asked = run(integrand, [0], tolerance=0.9999999, max_steps=11)
    assert asked[0][FIRST_INTERVALS + 1 :] == [0.6875, 0.1875]


@pytest.mark.parametrize("max_steps", [2, 3, 9, 10, 17])
@pytest.mark.parametrize("knows_start", [False, True])
def test_no_path_spends_more_than_max_steps_and_is_marked(max_steps, knows_start):
    paths, asked = run(steps_at_random(3), [0, 1, 2], knows_start, tolerance=0.9999999, max_steps=max_steps)
    assert [len(nodes) for nodes in asked] == paths.n_steps.tolist()
    assert (paths.n_steps <= max_steps).all()
    assert not paths.converged.any()


def test_constant_map_of_no_difference_converges():
    paths, _ = run(lambda image, position: torch.zeros(SHAPE), [0])
    assert paths.converged.all()
    assert not paths.attribution.any()


def test_promise_holds_on_step_functions():
    """Of maps said to be at correlation 0.99 with their limit, nearly all are."""
    integrand, numbers = steps_at_random(4), list(range(40))
    paths, _ = run(integrand, numbers, tolerance=0.99, max_steps=200)
    grid = (np.arange(4000) + 0.5) / 4000
    kept = []
    for image in numbers:
        limit = torch.stack([integrand(image, position) for position in grid[::4]]).double().mean(0)
        wanted = (paths.difference[image] * limit).abs().sum(0).flatten().numpy()
        found = paths.attribution[image].abs().sum(0).flatten().numpy()
        kept.append(np.corrcoef(wanted, found)[0, 1] >= 0.99)
    assert paths.converged.all()
    assert np.mean(kept) >= 0.95


@pytest.mark.parametrize("reduction", ["abs_sum", "sum"])
def test_predicted_correlation_is_that_of_all_intervals(reduction):
    """Recomputed from the nodes: an interval's squared error is a share of (width * jump)^2, of halves too."""
    rng = torch.Generator().manual_seed(0)
    difference = torch.randn(1, 3, 4, 4, generator=rng, dtype=torch.float64)
    low, high = torch.randn(2, 3, 4, 4, generator=rng, dtype=torch.float64)

    def gradient(t):
        return low + t * high + (t > 0.37) * (high - low)

    paths = AdaptivePaths(difference, IGOptions(n_steps="auto", max_steps=40, tolerance=0.999999, reduction=reduction))
    nodes: list[float] = []
    while len((wanted := paths.wanted())[0]):
        nodes += wanted[1].tolist()
        paths.add(slice(0, len(wanted[1])), torch.stack([gradient(t) for t in wanted[1]]))
        paths.refine()
    ends = sorted(nodes)
    contributions = [difference[0] * gradient(t) for t in ends]
    jumps = [(b - a) if reduction == "abs_sum" else (b - a).sum(0) for a, b in pairwise(contributions)]
    error = ERROR_SHARE * sum((w * jump).square().sum() for w, jump in zip(np.diff(ends), jumps, strict=True))
    found = reduce_channels(paths.attribution, reduction)[0]
    signal = (found - found.mean()).square().sum()
    assert len(ends) == 40
    assert paths.estimated_correlation()[0] == pytest.approx(float((signal / (signal + error)).sqrt()), rel=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "positive"])
def test_jump_of_a_map_that_adds_its_channels_is_that_of_their_sum(reduction):
    low, high = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    high[:, 0] = -2  # the channels cancel
    assert squared_jump(low, high, reduction).tolist() == [0, 0]
    assert squared_jump(low, high, "abs_sum").tolist() == [16 * 6.0] * 2
