"""The training loop: history, resume, accumulation, EMA, divergence, several processes."""

import csv
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_parts import tiny_teacher
from torch import Tensor, nn
from training_parts import SETTINGS, create_trainer, images

from timm_igkd import IGDistillationTask, IGOverlay
from timm_igkd.errors import DivergedError, InputError
from timm_igkd.models.loading import weights_hash
from timm_igkd.overlay.device_views import DeviceAugmentation
from timm_igkd.random_streams import derive_seed
from timm_igkd.training.device_batches import DeviceBatches
from timm_igkd.training.history import TERMS, EpochRecord
from timm_igkd.training.settings import TrainingSettings
from timm_igkd.training.trainer import Trainer


def trained(*arguments: Any, **settings: Any) -> tuple[list[EpochRecord], str]:
    trainer = create_trainer(*arguments, **settings)
    return trainer.fit(), weights_hash(trainer.final_model())


def test_history_holds_the_means_of_the_terms_that_were_computed(accelerator):
    trainer = create_trainer(accelerator)
    history = trainer.fit()
    assert [record.epoch for record in history] == [0, 1]
    for record in history:
        assert record.loss == pytest.approx(0.5 * record.task_loss + 0.5 * record.distill_loss)
        assert record.attention_loss is record.val_loss is None
        assert 0 <= record.top1_train <= 100
        assert record.lr == 0.05
    assert trainer.images_per_s > 0


def test_a_training_that_goes_on_ends_with_the_weights_of_one_that_was_not_stopped(accelerator, tmp_path, monkeypatch):
    settings = {"epochs": 4, "model_ema": True, "model_ema_decay": 0.5, "opt": "adamw", "grad_accum_steps": 4}
    whole, expected = trained(accelerator, **settings)
    path = tmp_path / "last.pt"
    save = Trainer.save_checkpoint

    def save_and_stop(self: Trainer) -> None:
        save(self)
        if len(self.history) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            trained(accelerator, path, **settings)
    history, found = trained(accelerator, path, **settings)
    assert found == expected
    assert [record.loss for record in history] == [record.loss for record in whole]
    finished = create_trainer(accelerator, path, **settings)
    assert [record.epoch for record in finished.fit()] == [0, 1, 2, 3]
    assert finished.images_per_s is None, "nothing was left to train"


def test_a_checkpoint_of_another_model_is_refused(accelerator, tmp_path):
    path = tmp_path / "last.pt"
    trainer = create_trainer(accelerator, path, epochs=1)
    trainer.fit()
    task = IGDistillationTask(tiny_teacher("test_vit", size=16), distill_loss_weight=0, verbose=False)
    other = Trainer(task, trainer.batches, trainer.settings, accelerator, checkpoint=path)
    with pytest.raises(InputError, match=r"last\.pt' is no checkpoint of this training"):
        other.fit()


def test_a_checkpoint_of_another_optimizer_is_refused(accelerator, tmp_path):
    path = tmp_path / "last.pt"
    create_trainer(accelerator, path, epochs=1, weight_decay=0.1).fit()  # two groups of parameters
    with pytest.raises(InputError, match=r"last\.pt' is no checkpoint of this training"):
        create_trainer(accelerator, path, epochs=2, weight_decay=0.0).fit()


@pytest.mark.parametrize(
    ("first", "then", "difference"),
    [
        ({"opt": "adamw"}, {"opt": "sgd"}, "it is of another optimiser, amsgrad is new there"),
        ({"opt": "sgd"}, {"opt": "adamw"}, "it is of another optimiser, amsgrad is missing there"),
        ({"opt": "adamw"}, {"opt": "lion"}, "it is of another optimiser, amsgrad is new there"),
        ({"opt": "adam"}, {"opt": "adamw"}, "the optimiser's decoupled_weight_decay is False there, True here"),
        ({"opt": "sgd"}, {"opt": "momentum"}, "the optimiser's nesterov is True there, False here"),
        ({"weight_decay": 0.1}, {"weight_decay": 0.2}, "the optimiser's weight_decay is 0.1 there, 0.2 here"),
        ({"layer_decay": 0.9}, {"layer_decay": 0.8}, "the optimiser's lr_scale is "),
        ({"momentum": 0.9}, {"momentum": 0.8}, "the optimiser's momentum is 0.9 there, 0.8 here"),
    ],
)
def test_the_state_of_another_optimizer_is_neither_loaded_nor_its_settings(
    accelerator, tmp_path, first, then, difference
):
    path = tmp_path / "last.pt"
    create_trainer(accelerator, path, epochs=1, **first).fit()
    with pytest.raises(InputError, match=re.escape(f"is no checkpoint of this training ({difference}")):
        create_trainer(accelerator, path, epochs=2, **then).fit()


@pytest.mark.parametrize("opt", ["lamb", "adanw"])
def test_an_optimizer_that_counts_in_its_groups_goes_on(accelerator, tmp_path, opt):
    path = tmp_path / "last.pt"
    create_trainer(accelerator, path, epochs=1, opt=opt).fit()
    assert len(create_trainer(accelerator, path, epochs=2, opt=opt, lr=0.01).fit()) == 2


def test_seeds_and_epochs_decide_what_the_model_draws(accelerator, monkeypatch):
    _, first = trained(accelerator, seed=1)
    assert trained(accelerator, seed=1)[1] == first
    assert trained(accelerator, seed=2)[1] != first
    _, one_epoch = trained(accelerator, seed=1, epochs=1)
    monkeypatch.setattr(
        "timm_igkd.training.trainer.derive_seed",
        lambda seed, purpose, epoch, *more: derive_seed(seed, purpose, 0, *more),
    )
    assert trained(accelerator, seed=1, epochs=1)[1] == one_epoch
    assert trained(accelerator, seed=1)[1] != first, "every epoch has a stream of its own"


class Linear(nn.Module):
    """One weight, so that a step can be computed by hand."""

    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ self.weight.T


def linear_trainer(accelerator: Accelerator, batch_size: int, **settings: Any) -> Trainer:
    task = IGDistillationTask(Linear(), distill_loss_weight=0, verbose=False)
    batches = DeviceBatches(images(), DeviceAugmentation(IGOverlay(0.0)), batch_size, 0)
    return Trainer(task, batches, TrainingSettings(**SETTINGS | {"epochs": 1} | settings), accelerator)


def test_accumulated_batches_are_one_batch(accelerator):
    """Equal to rounding: 24 images are 6 batches of 4, or 2 updates of 12."""
    one, two = linear_trainer(accelerator, 12), linear_trainer(accelerator, 4, grad_accum_steps=3)
    one.fit()
    two.fit()
    assert torch.allclose(one.final_model().weight, two.final_model().weight, atol=1e-6)
    assert not torch.equal(one.final_model().weight, torch.zeros(2, 3))


def test_an_epochs_last_batches_are_an_update_too(accelerator):
    """6 batches in groups of 4: the second group has 2, and its gradients do not leak into the next epoch."""
    trainer = linear_trainer(accelerator, 4, grad_accum_steps=4)
    updates = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda *args: updates.append(1) or step(*args)  # type: ignore[method-assign]
    trainer.fit()
    assert len(updates) == 2
    assert trainer.final_model().weight.grad is None


def test_an_epochs_last_batches_count_as_much_as_others(accelerator):
    """6 batches in groups of 4: the last two are the mean of two, not of four."""
    sizes = {}
    for accumulated in (2, 4):
        trainer = linear_trainer(accelerator, 4, grad_accum_steps=accumulated, lr=0.0, opt="sgd", weight_decay=0.0)
        found, weight = sizes.setdefault(accumulated, []), trainer.task.trainable_module.weight
        trainer.optimizer.optimizer.register_step_pre_hook(lambda *_, f=found, w=weight: f.append(w.grad.clone()))
        trainer.fit()
    assert len(sizes[2]) == 3
    torch.testing.assert_close(sizes[4][0], (sizes[2][0] + sizes[2][1]) / 2)
    torch.testing.assert_close(sizes[4][1], sizes[2][2])


def test_a_constant_rate_keeps_the_share_of_each_layer(accelerator):
    trainer = create_trainer(accelerator, teacher=False, layer_decay=0.5, sched="none", lr=0.1)
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert max(rates) == 0.1
    assert len(rates) > 2
    assert all(group["lr"] == 0.1 * group["lr_scale"] for group in trainer.optimizer.param_groups)


def test_schedule_steps_once_per_update(accelerator):
    """Warm-up from a hundredth of the rate: over 2 of 3 epochs of 2 updates each."""
    trainer = linear_trainer(accelerator, 4, grad_accum_steps=3, epochs=3, sched="cosine", warmup_epochs=2, lr=1.0)
    rates = []
    groups = trainer.optimizer.param_groups
    trainer.optimizer.optimizer.register_step_pre_hook(lambda *_: rates.append(groups[0]["lr"]))
    trainer.fit()
    assert rates[:4] == pytest.approx([0.01, 0.2575, 0.505, 0.7525])
    assert len(rates) == 6


@pytest.mark.parametrize(("warmup", "decays"), [(False, [0, 0.5, 0.5]), (True, [0, 1 - 2 ** (-2 / 3), 0.5])])
def test_ema_is_updated_once_per_update_and_is_what_is_kept(accelerator, warmup, decays):
    """Of the first update it takes the weights; then its decay rises as timm's, here up to a half."""
    average_of = {"model_ema": True, "model_ema_decay": 0.5, "model_ema_warmup": warmup}
    trainer = linear_trainer(accelerator, 4, grad_accum_steps=2, **average_of)
    weights = []
    trained = trainer.task.trainable_module
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: weights.append(trained.weight.detach().clone()))
    trainer.fit()
    average = torch.zeros(2, 3)
    for weight, decay in zip(weights, decays, strict=True):
        average = decay * average + (1 - decay) * weight
    assert torch.allclose(trainer.final_model().weight, average)


def test_the_loss_of_an_epoch_is_the_mean_of_its_steps(accelerator):
    trainer = linear_trainer(accelerator, 4)
    losses: list[float] = []
    trainer.task.register_forward_hook(lambda task, images, result: losses.append(result["loss"].item()))
    (record,) = trainer.fit()
    assert len(losses) > 1
    assert record.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_gradients_are_clipped_to_the_norm(accelerator):
    trainer = linear_trainer(accelerator, 24, clip_grad=1e-3, lr=1.0, opt="momentum", momentum=0.0)
    trainer.fit()
    assert float(trainer.final_model().weight.detach().norm()) == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_that_is_not_finite_names_the_epoch(accelerator):
    with pytest.raises(
        DivergedError, match=r"the loss of student became NaN or infinite in epoch \d; lower lr"
    ) as error:
        create_trainer(accelerator, teacher=False, lr=1e30, epochs=3).fit()
    assert error.value.epoch in (0, 1)
    assert error.value.exit_code == 1


def values_read(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Train, and return how values were read from the device meanwhile."""
    read: list[str] = []
    for name in ("item", "tolist", "__float__", "__bool__", "numpy"):
        real = getattr(Tensor, name)

        def watched(self: Tensor, *args: Any, real: Any = real, name: str = name) -> Any:
            if self.requires_grad or self.ndim == 0:
                read.append(name)
            return real(self, *args)

        monkeypatch.setattr(Tensor, name, watched)
    trainer.fit()
    monkeypatch.undo()
    return read


def test_a_step_asks_the_device_for_nothing(accelerator, monkeypatch):
    """Reading a value waits for the device: only the end of an epoch does."""
    few, many = (create_trainer(accelerator, batch_size=size, epochs=1) for size in (4, 2))
    assert (few.steps, many.steps) == (6, 12)
    assert values_read(few, monkeypatch) == values_read(many, monkeypatch)


PROCESS = """
import sys, torch
sys.path[:0] = {paths!r}
from pathlib import Path
from accelerate import Accelerator
from test_trainer import create_trainer
from timm_igkd.models.loading import weights_hash

accelerator = Accelerator(cpu=True)
trainer = create_trainer(accelerator, batch_size=4, epochs=2)
trainer.history_path = Path(sys.argv[1]) / f"history-{{accelerator.process_index}}.csv"
history = trainer.fit()
found = repr(history) + weights_hash(trainer.final_model())
Path(sys.argv[1], f"terms-{{accelerator.process_index}}").write_text(found)
"""

HASHED = """
import os, runpy, sys
os.environ["PYTHONHASHSEED"] = os.environ["RANK"]
os.execv(sys.executable, [sys.executable, sys.argv[1], *sys.argv[2:]])
"""


@pytest.mark.slow
def test_two_processes_of_different_hash_seeds_keep_one_history(tmp_path):
    """A set's order differs between them: reduced in it, each term would be averaged with another."""
    script, hashed = tmp_path / "process.py", tmp_path / "hashed.py"
    here = Path(__file__).parent
    script.write_text(PROCESS.format(paths=[str(here), str(here.parent), str(here.parents[1])]))
    hashed.write_text(HASHED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(hashed), str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = ((tmp_path / f"terms-{index}").read_text() for index in range(2))
    seconds = "seconds="
    assert first.split(seconds)[0] == second.split(seconds)[0]
    assert first[-64:] == second[-64:], "two processes, one student"
    assert not (tmp_path / "history-1.csv").exists(), "the main process writes"
    for row in csv.DictReader((tmp_path / "history-0.csv").read_text().splitlines()):
        loss, task, distill = (float(row[name]) for name in TERMS[:3])
        assert loss == pytest.approx((task + distill) / 2)
        assert abs(task - distill) > 0.01
        assert float(row["top1_train"]) in [100 * hits / 24 for hits in range(25)]


# ---- accumulation ----


def test_rate_and_average_move_once_an_update(accelerator, monkeypatch):
    """Three batches to a step: the schedule counts steps, not batches, and the EMA follows each step once."""
    trainer = create_trainer(
        accelerator, teacher=False, batch_size=4, epochs=2, grad_accum_steps=3, sched="cosine", model_ema=True
    )
    rates, averaged, steps = [], [], []
    update_ema, step, groups = trainer.task.update_ema, trainer.optimizer.step, trainer.optimizer.param_groups
    trainer.task.register_forward_hook(lambda *_: rates.append(groups[0]["lr"]))
    monkeypatch.setattr(trainer.task, "update_ema", lambda *args: averaged.append(1) or update_ema(*args))
    monkeypatch.setattr(trainer.optimizer, "step", lambda *args: steps.append(1) or step(*args))
    trainer.fit(progress=False)
    assert len(rates) == 12
    assert len(averaged) == len(steps) == 4
    assert [rates[start : start + 3] for start in range(0, 12, 3)] == [[rates[start]] * 3 for start in range(0, 12, 3)]
    assert len(set(rates)) == 4


def test_an_epochs_last_smaller_update_counts_in_the_schedule(accelerator):
    """Six batches are two updates of four and of two: the first epoch ends at the rate of the second update."""
    settings = {"sched": "triangular", "lr": 1.0, "warmup_epochs": 0}
    trainer = create_trainer(accelerator, teacher=False, batch_size=4, epochs=2, grad_accum_steps=4, **settings)
    trainer.fit()
    assert [record.lr for record in trainer.history] == pytest.approx([0.75, 0.25])


def test_a_training_leaves_the_hosts_generators_where_they_were(accelerator):
    trainer = create_trainer(accelerator)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    trainer.fit(progress=False)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
