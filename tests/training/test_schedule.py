"""The learning rate at every update, whatever the schedule and however batches are accumulated."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from timm_igkd.training.schedule import create_scheduler
from timm_igkd.training.settings import SCHEDULES, TrainingSettings

LR, EPOCHS, UPDATES = 0.4, 5, 10


def rates_of_groups(shares: Sequence[float], **settings: Any) -> list[list[float]]:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr_scale": share} for share in shares]
    optimizer = torch.optim.SGD(groups, lr=LR)
    scheduler = create_scheduler(optimizer, TrainingSettings(epochs=EPOCHS, lr=LR, **settings), UPDATES)
    found = []
    for update in range(EPOCHS * UPDATES):
        scheduler.step_update(update)
        found.append([group["lr"] for group in optimizer.param_groups])
    return found


def rates(sched: str, warmup_epochs: int, min_lr: float = 0.0) -> list[float]:
    return [rate for (rate,) in rates_of_groups([1.0], sched=sched, warmup_epochs=warmup_epochs, min_lr=min_lr)]


@pytest.mark.parametrize("sched", ["cosine", "triangular"])
def test_warm_up_rises_from_a_hundredth_in_a_straight_line(sched):
    found = rates(sched, warmup_epochs=2)
    assert found[0] == pytest.approx(LR / 100)
    steps = [after - before for before, after in pairwise(found[:20])]
    assert steps == pytest.approx([(LR - LR / 100) / 20] * 19)


def test_triangle_falls_in_a_straight_line_to_the_last_rate():
    found = rates("triangular", warmup_epochs=2, min_lr=0.01)
    assert found[20] == pytest.approx(LR)
    falls = [before - after for before, after in pairwise(found[20:])]
    assert falls == pytest.approx([(LR - 0.01) / 30] * 29)
    assert found[-1] == pytest.approx(0.01 + (LR - 0.01) / 30)


def test_without_warm_up_the_first_rate_is_the_highest():
    assert rates("triangular", warmup_epochs=0)[0] == pytest.approx(LR)


def test_warm_up_leaves_the_last_epoch_to_the_schedule():
    found = rates("triangular", warmup_epochs=99)
    assert max(found) == pytest.approx(LR)
    assert found.index(max(found)) == 40


def test_a_constant_rate_follows_its_warm_up():
    found = rates("none", warmup_epochs=2)
    warm_up = found[: 2 * UPDATES]
    assert warm_up[0] == pytest.approx(LR / 100)
    assert all(second > first for first, second in pairwise(warm_up))
    assert found[2 * UPDATES :] == [LR] * (EPOCHS - 2) * UPDATES


@pytest.mark.parametrize("warmup_epochs", [0, 2])
@pytest.mark.parametrize("sched", SCHEDULES)
def test_a_layer_has_its_share_of_the_rate_at_every_update(sched, warmup_epochs):
    found = rates_of_groups([1.0, 0.3], sched=sched, warmup_epochs=warmup_epochs)
    assert [small for _, small in found] == [0.3 * large for large, _ in found]
