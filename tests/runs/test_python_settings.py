"""RunConfig as Python gives it: every value is of its field's type, and config.yaml reads back to the same settings."""

import datetime
import enum
import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from timm_igkd import distill
from timm_igkd.errors import InputError, InputTypeError
from timm_igkd.runs.parsing import parse_config, save_config
from timm_igkd.runs.settings import RunConfig


class Engine(enum.StrEnum):
    CAPTUM = "captum"


# Every field with another value than its default, beside those that have to go with it.
GIVEN: list[dict[str, Any]] = [
    {
        "name": "null",
        "output_dir": "~/ü b\x85",
        "resume": True,
        "seed": 2**63 - 1,
        "dataset": "- a: #b",
        "teacher": "t",
    },
    {"protocol": "modern", "teacher": "resnet10t", "revision": "1e5", "image_column": "true", "label_column": "2024"},
    {"train_split": "none", "validation_split": "a\nb", "validation_fraction": 1e-17, "test_split": "0x1f"},
    {
        "train_limit": 9,
        "test_limit": 8,
        "corruptions": 7,
        "unlabeled": "~",
        "unlabeled_split": "no",
        "overlay_prob": 0.0,
    },
    {
        "teacher_args": {"a": {"b": [1, "1", 1.0, True]}, "c": None, "d": "1e-3", "": math.inf},
        "teacher_mean": (1, 0, 2),
    },
    {"teacher_checkpoint": "\u2028.pth", "teacher_std": (0.1, 1 / 3, 1e22), "teacher_init": "pretrained"},
    {"teacher_checkpoint": "a.pth.tar", "teacher_use_ema": True, "teacher_init": "pretrained"},
    {"teacher_epochs": 3, "teacher_lr": 1e-9, "teacher_init": "pretrained", "freeze_teacher_bn": True},
    {
        "student": "auto",
        "max_latency_ms": 5.5,
        "max_size_mb": 1.0,
        "freeze_student_bn": True,
        "student_init": "pretrained",
    },
    {
        "student": "x",
        "student_args": {"k": "v"},
        "student_checkpoint": "f",
        "student_use_ema": True,
        "student_init": "pretrained",
        "img_size": 8,
    },
    {"student": None, "student_drop": 4, "student_init": "teacher"},
    {"overlay_prob": 0.3, "overlay_weight": 0.4, "overlay_max_power": 3.0, "overlay_source": "sobel", "n_steps": 7},
    {"teacher_view": "clean", "teacher_epochs": 0, "maps": "store", "compare": None, "seeds": 1},
    {"engine": "captum", "n_steps": 9, "map_baseline": "black", "map_output": "probability", "map_size": 8},
    {"map_method": "saliency", "map_target": "predicted", "map_reduction": "positive"},
    {"max_steps": 72, "tolerance": 0.5, "loss_type": "dist", "distill_loss_weight": 0.25, "task_loss_weight": 2.0},
    {"temperature": 3.0, "attention_loss_weight": 0.8},
    {"explanation_loss_weight": 1.0, "explanation_map": "grad_cam", "compare": "arms", "seeds": 3},
    {"stored_logits": True, "epochs": 3, "batch_size": 6, "opt": "sgd", "lr": 0.3, "weight_decay": 0.0},
    {"layer_decay": 0.5, "momentum": 0.1, "sched": "none", "warmup_epochs": 0, "min_lr": 1e-7, "grad_accum_steps": 2},
    {"clip_grad": 1.0, "model_ema": True, "model_ema_decay": 0.5, "model_ema_warmup": False, "compile": True},
    {"train_crop": "rrc", "scale_min": 0.5, "hflip": 0.25, "aa": "3a", "color_jitter": 0.1, "reprob": 0.2},
    {"mixup": 0.1, "cutmix": 0.2, "smoothing": 0.1, "batches": "workers", "max_steps_per_epoch": 2, "workers": 3},
    {"trackers": ("wandb", "tensorboard"), "export": ("onnx-int8",)},
]


def read_back(config: RunConfig, folder: Path) -> RunConfig:
    save_config(config, folder / "config.yaml")
    return parse_config(RunConfig, ["--config", str(folder / "config.yaml")])


def test_every_field_is_given_another_value():
    plain = asdict(RunConfig())
    changed = {name for given in GIVEN for name, value in given.items() if value != plain[name]}
    assert sorted(changed) == sorted(field.name for field in fields(RunConfig))


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: next(iter(given)))
def test_what_is_accepted_reads_back_equal(given: Mapping[str, Any], tmp_path):
    config = RunConfig(**given)
    found = read_back(config, tmp_path)
    assert found == config
    assert repr(found) == repr(config)  # 1 is not 1.0
    assert replace(config) == config


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("output_dir", Path("out"), "out"),
        ("student_checkpoint", Path("a") / "b.pth", "a/b.pth"),
        ("lr", np.float64(1e-3), 1e-3),
        ("lr", np.float32(0.5), 0.5),
        ("lr", torch.tensor(0.25), 0.25),
        ("lr", torch.tensor(0.25, requires_grad=True), 0.25),
        ("lr", 1, 1.0),
        ("epochs", np.int64(3), 3),
        ("n_steps", np.uint8(3), 3),
        ("resume", np.bool_(True), True),
        ("opt", np.str_("sgd"), "sgd"),
        ("engine", Engine.CAPTUM, "captum"),
        ("teacher_std", np.array([0.25, 0.5, 1]), (0.25, 0.5, 1.0)),
        ("teacher_std", torch.tensor([0.25, 0.5, 1]), (0.25, 0.5, 1.0)),
        ("teacher_mean", [0, 1, np.float16(0.5)], (0.0, 1.0, 0.5)),
        ("trackers", "tensorboard", ("tensorboard",)),
        ("trackers", ["wandb", np.str_("trackio")], ("wandb", "trackio")),
        ("export", "onnx-int8", ("onnx-int8",)),
        ("export", [], ()),
        ("aa", "none", None),
        ("clip_grad", "None", None),
        ("teacher_mean", "none", None),
        ("teacher_args", MappingProxyType({"a": (1, (np.int8(2),)), "b": Path("c")}), {"a": [1, [2]], "b": "c"}),
    ],
)
def test_a_value_becomes_plain(name, given, expected, tmp_path):
    more = {"n_steps": 2} if name == "engine" else {}
    more |= {"student": "s", "student_init": "pretrained"} if name == "student_checkpoint" else {}
    config = RunConfig(**{**more, name: given})
    found = getattr(config, name)
    assert (found, type(found)) == (expected, type(expected))
    assert read_back(config, tmp_path) == config


def test_the_name_of_a_run_is_that_of_a_path():
    config = RunConfig(dataset=Path("a/b"), teacher=Path("c"))  # type: ignore[arg-type]
    assert (config.name, config.protocol, config.teacher) == ("b", "modern", "c")


LOOP: dict[str, Any] = {}
LOOP["a"] = [LOOP]
CHOICES = "pretrained|random|teacher"


@pytest.mark.parametrize(
    ("name", "given", "match"),
    [
        ("student_init", "foo", rf"student_init must be {CHOICES.replace('|', '.')}, got 'foo'$"),
        ("student_init", "pretraned", r"did you mean 'pretrained'\?"),
        ("protocol", "modren", r"protocol must be .*, got 'modren' \(did you mean 'modern'\?\)"),
        ("resume", "no", r"resume must be true\|false, got 'no'"),
        ("resume", "true", "got 'true'; give it without quotes"),
        ("resume", 1, r"resume must be true\|false, got 1"),
        ("compare", True, r"compare must be arms\|cost\|none, got True"),
        ("export", "onxx", r"export must be onnx\|onnx-int8 …, got 'onxx' \(did you mean 'onnx'\?\)"),
        ("export", ("onnx", "int8"), "got 'onnx int8'"),
        ("export", {"onnx"}, "export must be .*, got {'onnx'}; give text, numbers"),
        ("trackers", None, "trackers must be .* got None; leave it out for the default"),
        ("epochs", "3", "epochs must be int, got '3'; give it without quotes"),
        ("epochs", 1.5, "epochs must be int, got 1.5"),
        ("epochs", np.float64(3), "epochs must be int, got 3.0"),
        ("epochs", True, "epochs must be int, got True"),
        ("epochs", None, "epochs must be int, got None; leave it out"),
        ("lr", "1e-3", "lr must be float, got '1e-3'; give it without quotes"),
        ("lr", math.nan, "lr must be float, got nan"),
        ("lr", 10**400, "lr must be float, got 1000"),
        ("lr", 1j, "lr must be float, got 1j"),
        ("lr", torch.ones(2), r"lr must be float, got \[1.0, 1.0\]"),
        ("seed", 10**400, "seed must be in .*, got one of hundreds of digits"),
        ("seed", -(10**400), "seed must be in .*, got one of hundreds of digits"),
        ("n_steps", "5", r"n_steps must be int.auto, got '5'; give it without quotes"),
        ("n_steps", "atuo", r"did you mean 'auto'\?"),
        ("teacher_std", 0.5, r"teacher_std must be float float float\|none, got 0.5"),
        ("teacher_std", (0.5, 0.5), "teacher_std must be float float float"),
        ("teacher_std", (0.5, 0.5, math.nan), "teacher_std must be float float float"),
        ("teacher_std", ("0.5", "0.5", "0.5"), "teacher_std must be float float float"),
        ("name", 3, "name must be str, got 3; put it in quotes"),
        ("name", b"x", "name must be str, got b'x'"),
        ("dataset", Path("\udc80"), "dataset must be str"),
        ("dataset", None, "dataset must be str, got None; leave it out"),
        ("teacher_args", None, "teacher_args must be key=value …, got None; leave it out"),
        ("teacher_args", ["a=1"], "teacher_args must be key=value …"),
        ("teacher_args", [], "teacher_args must be key=value …"),
        ("teacher_args", {1: 2}, "teacher_args must be key=value …"),
        ("teacher_args", {"a": object()}, "teacher_args must be .*; give text, numbers, booleans, None, or lists and"),
        ("teacher_args", {"a": torch.float16}, "teacher_args must be"),
        ("teacher_args", {"a": math.nan}, "teacher_args must be"),
        ("teacher_args", {"a": datetime.date(2024, 1, 1)}, "teacher_args must be"),
        ("teacher_args", {("a", 1): 1}, "teacher_args must be"),
        ("teacher_args", LOOP, "teacher_args must be"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_value_of_another_type_is_one_line_that_names_the_field(name, given, match):
    with pytest.raises(InputError, match=match) as raised:
        RunConfig(**{name: given})
    assert len(str(raised.value).splitlines()) == 1


def test_arguments_of_a_model_are_a_copy():
    given = {"drop_blocks": [1]}
    config = RunConfig(teacher_args=given)
    given["drop_blocks"].append(2)
    assert config.teacher_args == {"drop_blocks": [1]}


@pytest.mark.parametrize(
    "config", [{}, {"epochs": 1}, "config.yaml", Path("config.yaml"), ["--epochs", "1"], RunConfig]
)
def test_distil_takes_settings_alone(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputTypeError, match=f"distill takes a RunConfig, got a {type(config).__name__}; give it"):
        distill(config)
    assert not list(tmp_path.iterdir())
