"""Who makes a run's batches: the rule behind auto, and what the two roads share."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from command_lines import Runner, leave_empty_page, tiny_run, two_splits
from fixture_parts import ImageFactory
from tiny_parts import tiny_teacher

from timm_igkd import IGDistillationTask
from timm_igkd.errors import InputError
from timm_igkd.runs import batches as batches_module
from timm_igkd.runs.batches import choose_batches
from timm_igkd.runs.data import RunData
from timm_igkd.runs.parsing import parse_config
from timm_igkd.runs.settings import RunConfig


def chosen(config: RunConfig, accelerator: Accelerator, *sizes: int) -> str:
    return choose_batches(config, RunData(config), (tiny_teacher(size=size) for size in sizes), accelerator)


@pytest.fixture
def config(tiny_images: ImageFactory) -> RunConfig:
    return RunConfig(
        protocol="demo", dataset=str(two_splits(tiny_images)), validation_split=None, validation_fraction=0.25
    )


def test_small_images_of_one_size_lie_on_the_device(config, accelerator):
    assert chosen(config, accelerator, 16, 16) == "device"


@pytest.mark.parametrize(
    "settings",
    [{"train_crop": "rrc"}, {"aa": "rand-m9-mstd0.5"}, {"reprob": 0.1}, {"mixup": 0.2}, {"cutmix": 1.0}],
)
def test_what_only_timms_pipeline_can_do_goes_through_workers(config, accelerator, settings: dict[str, Any]):
    assert chosen(replace(config, **settings), accelerator, 16) == "workers"
    with pytest.raises(InputError, match=r"batches device cannot do .*use batches workers"):
        replace(config, batches="device", **settings)


def test_workers_views_come_in_the_models_memory_format(recipe: Runner, tiny_images: ImageFactory, monkeypatch):
    seen = set()
    forward = IGDistillationTask.forward

    def watched(task, input, *args, **options):
        seen.add(input.is_contiguous(memory_format=torch.channels_last))
        return forward(task, input, *args, **options)

    monkeypatch.setattr(IGDistillationTask, "forward", watched)
    assert recipe(*tiny_run(two_splits(tiny_images), "--batches", "workers")).code == 0
    assert seen == {True}


def test_models_of_another_input_size_go_through_workers(config, accelerator):
    assert chosen(config, accelerator, 16, 32) == "workers"


def test_images_of_several_sizes_go_through_workers(config, accelerator, tiny_images):
    folder = two_splits(tiny_images, kind="folder", name="several")
    (folder / "train" / "class_1" / "wide.png").write_bytes(
        (tiny_images(kind="folder", n=1, size=24, name="wide") / "train" / "class_0" / "0000.png").read_bytes()
    )
    assert chosen(replace(config, dataset=str(folder)), accelerator, 16) == "workers"


def test_large_images_go_through_workers_and_are_not_read(tiny_images, accelerator, monkeypatch):
    monkeypatch.setattr(batches_module, "LARGEST_SIDE", 15)
    monkeypatch.setattr(RunData, "fitting_images", property(lambda self: pytest.fail("all images were decoded")))
    config = RunConfig(protocol="demo", dataset=str(two_splits(tiny_images)), validation_split=None)
    assert chosen(config, accelerator, 16) == "workers"


def test_images_that_fill_more_than_a_quarter_of_the_memory_go_through_workers(config, accelerator, monkeypatch):
    needed = 12 * 16 * 16 * 8
    monkeypatch.setattr(batches_module, "_memory_per_process", lambda accelerator: 4.0 * needed)
    assert chosen(config, accelerator, 16) == "device"
    monkeypatch.setattr(batches_module, "_memory_per_process", lambda accelerator: 4.0 * needed - 1)
    assert chosen(config, accelerator, 16) == "workers"


def test_the_choice_is_named_in_the_runs_settings_and_kept(
    recipe: Runner, config: RunConfig, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("timm_igkd.runs.job.write_report", leave_empty_page)
    options = tiny_run(Path(config.dataset), "--teacher-epochs", 0, "--teacher", f"local-dir:{teacher_folder}")
    assert recipe(*options).code == 0
    written = parse_config(RunConfig, ["--config", str(tmp_path / "runs" / "run" / "config.yaml")])
    assert written.batches == "device"
    monkeypatch.setattr(RunData, "fitting_images", property(lambda self: pytest.fail("all images were decoded")))
    again = recipe(*options)
    assert again.code == 0
    assert again.output.count("complete, skipped") == 5
    outcome = recipe(*options, "--batches", "workers")
    assert outcome.code == 2
    assert "was run with batches = 'device', now it is 'workers'" in outcome.error


def test_both_roads_give_the_same_images_in_the_same_order(config, accelerator):
    """The numbers they draw differ; without draws their batches are equal up to the rounding of a division."""
    plain = replace(config, train_crop="none", overlay_prob=0.0, batch_size=4)
    task = IGDistillationTask(tiny_teacher(size=16), distill_loss_weight=0, verbose=False)
    found = [
        list(
            batches_module.create_batches(replace(plain, batches=road), RunData(plain), task, None, accelerator).epoch(
                3
            )
        )
        for road in ("workers", "device")
    ]
    assert len(found[0]) == len(found[1]) == 3
    for first, second in zip(*found, strict=True):
        assert torch.equal(first.labels, second.labels)
        assert torch.allclose(first.student, second.student, atol=1e-6)
