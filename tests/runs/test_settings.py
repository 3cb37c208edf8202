"""The settings of a run: which stages each one belongs to."""

import dataclasses
import subprocess
import sys

import pytest

from timm_igkd.errors import InputError
from timm_igkd.runs.settings import STAGES, RunConfig

TRAINED = RunConfig(teacher_epochs=1)
GIVEN = RunConfig(teacher_epochs=0)
# Every setting, by the first stage of a run with a given teacher whose output it changes.
FIRST_STAGE = {
    "teacher": {
        *("seed", "revision", "image_column", "label_column", "train_split", "train_limit"),
        *("validation_split", "validation_fraction"),
        *("teacher", "teacher_args", "teacher_checkpoint", "teacher_mean", "teacher_std", "teacher_epochs"),
        *("teacher_use_ema", "teacher_init", "teacher_lr", "freeze_teacher_bn", "img_size"),
    },
    "maps": {
        *("engine", "n_steps", "max_steps", "tolerance", "map_method", "map_baseline", "map_target"),
        "map_output",
        *("unlabeled", "unlabeled_split"),
        *("map_reduction", "map_size", "stored_logits", "maps"),
    },
    "student": {
        *("student", "student_args", "student_drop", "student_init", "student_checkpoint"),
        *("student_use_ema", "freeze_student_bn"),
        *("overlay_prob", "overlay_weight", "overlay_max_power", "overlay_source", "teacher_view"),
        *("loss_type", "distill_loss_weight", "task_loss_weight", "temperature", "attention_loss_weight", "epochs"),
        *("explanation_loss_weight", "explanation_map"),
    },
    "training": {  # of the teacher too, where it is trained
        *("batch_size", "opt", "lr", "weight_decay", "momentum", "sched", "warmup_epochs", "min_lr"),
        *("layer_decay", "grad_accum_steps", "clip_grad", "model_ema", "model_ema_decay", "max_steps_per_epoch"),
        "model_ema_warmup",
        *(
            "train_crop",
            "scale_min",
            "hflip",
            "aa",
            "color_jitter",
            "reprob",
            "mixup",
            "cutmix",
            "smoothing",
            "batches",
        ),
    },
    "evaluate": {"test_split", "test_limit", "corruptions"},
    "export": {"export"},
    "report": {"compare", "seeds"},
    "no stage": {
        *("name", "protocol", "output_dir", "resume", "compile", "workers", "trackers"),
        "dataset",  # what it holds is known by hashes: another path may lead to it
        *("max_latency_ms", "max_size_mb"),  # the student that they choose is one of `student`
    },
}


def test_every_setting_is_named_once():
    named = [name for names in FIRST_STAGE.values() for name in names]
    assert sorted(named) == sorted(item.name for item in dataclasses.fields(RunConfig))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_its_settings_and_those_of_the_stages_before(stage):
    before = STAGES[: STAGES.index(stage) + 1]
    expected = set().union(*(FIRST_STAGE.get(name, set()) for name in before))
    with_training = expected | FIRST_STAGE["training"]
    assert set(TRAINED.settings_of(stage)) == with_training
    assert set(GIVEN.settings_of(stage)) == (with_training if "student" in before else expected)


def test_every_setting_says_its_stages_and_its_help():
    for item in dataclasses.fields(RunConfig):
        assert set(item.metadata["stages"]) <= set(STAGES)
        assert item.metadata["help"]


def test_settings_are_read_without_torch_and_timm():
    code = "import sys, timm_igkd; timm_igkd.RunConfig; print({'torch', 'timm', 'torchvision'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("settings", [{"epochs": 10**20}, {"teacher_epochs": 10**20}, {"workers": 10**20}])
def test_a_count_that_nothing_could_be_made_for_is_refused(settings):
    with pytest.raises(InputError, match=f"{next(iter(settings))} must be in"):
        RunConfig(**settings)
