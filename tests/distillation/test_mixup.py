"""Mixup of two views: both alike, and a draw of its own for every epoch, batch and process."""

import pytest
import torch

from timm_igkd.distillation.mixup import TwoViewMixup
from timm_igkd.errors import InputError, InputTypeError


def mixed(*stream: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    images = torch.arange(4 * 3 * 8 * 8, dtype=torch.float32).view(4, 3, 8, 8)
    mixup = TwoViewMixup(seed, mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=3)
    return mixup(images, images + 1000, torch.tensor([0, 1, 2, 0]), *stream)


def test_both_views_are_mixed_alike():
    student, teacher, target = mixed(0, 0)
    assert teacher is not None
    torch.testing.assert_close(teacher, student + 1000, rtol=0, atol=1e-3)
    torch.testing.assert_close(target.sum(1), torch.ones(4))


def test_one_stream_repeats_and_epochs_batches_processes_and_seeds_differ():
    draws = (((1, 2, 0), 0), ((0, 2, 0), 0), ((1, 0, 0), 0), ((1, 2, 1), 0), ((1, 2, 0), 1))
    targets = [mixed(*stream, seed=seed)[2] for stream, seed in draws]
    assert torch.equal(targets[0], mixed(1, 2, 0)[2])
    assert all(not torch.equal(targets[0], other) for other in targets[1:])


def test_calls_without_indices_differ_and_a_seed_repeats_them():
    """They all mixed alike, with the first batch's lambda, box and partner."""
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    runs = []
    for seed in (0, 0, 1):
        mixup = TwoViewMixup(seed, mixup_alpha=0.8, num_classes=3)
        runs.append([mixup(images, images, labels)[2] for _ in range(4)])
    first, again, other = runs
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(target.flatten().tolist()) for target in (*first, *other)}) == 8
    mixup = TwoViewMixup(0, mixup_alpha=0.8, num_classes=3)
    mixup(images, images, labels, 1, 2)
    assert torch.equal(mixup(images, images, labels)[2], first[0])  # a call with indices is not counted


def test_a_seed_that_is_no_whole_number_is_refused_when_it_is_given():
    with pytest.raises(InputTypeError, match="seed must be a number, got str"):
        TwoViewMixup("0", mixup_alpha=0.8)  # type: ignore[arg-type]


def test_views_of_two_sizes_are_refused():
    mixup = TwoViewMixup(0, cutmix_alpha=1.0, num_classes=3)
    with pytest.raises(InputError, match=r"must have one size to be mixed alike, got \(8, 8\) and \(16, 16\)"):
        mixup(torch.rand(4, 3, 8, 8), torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))
