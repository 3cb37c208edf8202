"""Bad inputs for every command, made by rule from small valid ones with draws of fixed seeds; see cli/test_fuzz.py."""

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import datasets
import yaml
from fixture_parts import tiny_image

from timm_igkd.cli import arguments
from timm_igkd.cli import main as cli
from timm_igkd.cli.definitions import COMMANDS
from timm_igkd.runs.settings import RunConfig

DAMAGES_EACH = int(os.environ.get("TIMM_IGKD_FUZZ_DAMAGES", "2"))  # of every file and command; more finds more
SETTINGS_EACH = int(os.environ.get("TIMM_IGKD_FUZZ_SETTINGS", "3"))
IMAGES = "--dataset images --split"
COMMON = {
    "maps": f"maps --teacher local-dir:teacher {IMAGES} train --n-steps 1 --out out",
    "maps of folders": "maps --teacher local-dir:teacher --dataset classes --split train --n-steps 1 --out out",
    "maps again": f"maps --teacher local-dir:teacher {IMAGES} train --n-steps 1 --logits --out store",
    "verify": f"verify --maps store {IMAGES} train",
    "score": f"score --maps store --teacher local-dir:teacher {IMAGES} train --steps 2 --out s.json",
    "students": "students --teacher local-dir:teacher --max-latency-ms 5",
    "export": "export --model local-dir:teacher --out exported",
    "preview": f"preview --maps store {IMAGES} train --out p.png",
    "evaluate": f"evaluate --model local-dir:teacher {IMAGES} test --out m.json",
    "weights": f"evaluate --model test_resnet --model-args num_classes=2 {IMAGES} test --out m.json --checkpoint",
    "push-maps": "push-maps store --repo-id user/name",
    "push-student": "push-student runs/run --repo-id user/name",
    "push seeds": "push-student runs/run --repo-id user/name --seed-runs runs/other",
    "run": "run --maps store -- script.py",
    "distill": "distill --config config.yaml --name new",
    "distill again": "distill --config config.yaml",
    "study": "study --config study.yaml",
}


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        name: of the case.
        argv: of the command, or of the study.
        prepare: makes the bad input in the current folder, with random numbers of its own.
        codes: how it may end; 0 and ACCEPTED are the same.
    """

    name: str
    argv: list[str]
    prepare: Callable[[random.Random], None] = lambda draws: None
    codes: tuple[int, ...] = (2,)


def case(name: str, command: str, *more: str, **options: Any) -> Case:
    words = COMMON[command].split()
    at = words.index("--") if "--" in words else len(words)  # of `run`, whose script comes last
    return Case(f"{command}: {name}", [*words[:at], *more, *words[at:]], **options)


# ---- options ----

TWENTY = "9" * 20
NUMBERS = ("-1", "0", "nan", "inf", TWENTY, "1e400", "x", "")
TEXTS = ("", "nope", "a\0b", "y" * 300, "..", "new\nline", "\udcff", "train[", "a b", "{}")
NAMES = ("nope", "new\nline", "train[", "a b", "{}")  # files and folders may be called so
FINE = {
    "--aa": ("",),
    "--dataset": ("nope", ".."),
    "--teacher-epochs": ("0",),
    "--name": ("", *NAMES),
    "--out": (*NAMES, ".."),
    "--output-dir": TEXTS,
}
for _value, _flags in {  # of the above, what else an option takes
    "0": "attention-loss-weight color-jitter corruptions cutmix distill-loss-weight explanation-loss-weight hflip lr "
    "max-drop mean min-lr mixup momentum model-ema-decay overlay-prob overlay-weight reprob scale-min seed smoothing "
    "task-loss-weight teacher-mean validation-fraction warmup-epochs weight-decay workers",
    "-1": "mean seed teacher-mean",
    TWENTY: "attention-loss-weight batch-size calibration clip-grad color-jitter corruptions count cutmix limit lr "
    "explanation-loss-weight max-latency-ms max-size-mb "
    "mixup mean min-lr momentum overlay-max-power std task-loss-weight teacher-mean teacher-std "
    "temperature warmup-epochs weight-decay",
}.items():
    FINE |= {f"--{flag}": (*FINE.get(f"--{flag}", ()), _value) for flag in _flags.split()}


def values_of(flag: str, kinds: set[Any]) -> tuple[str, ...]:
    values = NUMBERS if {int, float} & kinds else TEXTS
    return tuple(value for value in values if value not in FINE.get(flag, ()))


def option_cases() -> Iterator[Case]:
    commands = next(action for action in cli.build_parser()._actions if isinstance(action.choices, dict)).choices
    for name in COMMANDS:
        for action in commands[name]._actions:
            if not action.option_strings or action.nargs == 0:
                continue
            flag = action.option_strings[0]
            kinds = {int} if action.type in (arguments.steps_argument, arguments.shard_argument) else {action.type}
            values = ("nope", "") if action.choices else values_of(flag, kinds)
            for value in values:
                count = action.nargs if isinstance(action.nargs, int) else 1
                yield case(f"{flag} {value[:30]!r}", name, flag, *[value] * count)


def setting_cases() -> Iterator[Case]:
    hints = get_type_hints(RunConfig)
    for field in fields(RunConfig):
        kinds = set(get_args(hints[field.name]) or (hints[field.name],))
        flag = f"--{field.name.replace('_', '-')}"
        values = values_of(flag, kinds)
        for value in random.Random(field.name).sample(values, min(SETTINGS_EACH, len(values))):
            yield case(f"{flag} {value[:30]!r}", "distill", flag, value)


MODEL_ARGUMENTS = (
    "in_chans=0 in_chans=x drop_rate=nan drop_rate=2 features_only=true foo=bar output_stride=3 act_layer=nope "
    "pretrained=true block=1 pretrained_cfg={url:x} checkpoint_path=teacher.pth.tar scriptable=true a a=[ =1 "
    "a={b:{c:[hf-hub:x]}}"
).split()
MODELS = (
    "local-dir: local-dir:images local-dir:store local-dir:script.py hf-hub: resnet19 resnet18.nope file:x a/b".split()
)


def model_cases() -> Iterator[Case]:
    for flag, command in (("--teacher", "maps"), ("--model", "evaluate"), ("--teacher", "distill")):
        own = "test_resnet" if command == "distill" else "local-dir:teacher"
        epochs = ["--teacher-init", "random", "--teacher-epochs", "1"] if command == "distill" else []
        for given in MODEL_ARGUMENTS:
            yield case(f"{flag}-args {given}", command, flag, own, f"{flag}-args", given, *epochs)
        for name in MODELS:
            yield case(f"{flag} {name}", command, flag, name)
        yield case(f"{flag} of the Hub", command, flag, "hf-hub:user/none", codes=(1,))
    for command in ("maps", "verify", "evaluate", "distill"):
        yield case("dataset of the Hub", command, "--dataset", "user/none", codes=(1,))


# ---- files ----


def flipped(data: bytes, draws: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(20):
        changed[draws.randrange(len(changed))] ^= 1 << draws.randrange(8)
    return bytes(changed)


CONTENTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty": lambda data, draws: b"",
    "half": lambda data, draws: data[: len(data) // 2],
    "a little": lambda data, draws: data[:-3],
    "flipped": flipped,
    "text": lambda data, draws: b"no such thing\n",
    "null": lambda data, draws: b"null",
    "list": lambda data, draws: b"[1, 2]",
    "names": lambda data, draws: b"{}",
    "deep list": lambda data, draws: b"[" * 20_000 + b"]" * 20_000,
    "deep names": lambda data, draws: b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "not UTF-8": lambda data, draws: b'{"architecture": "\xff"}',
    "zeros": lambda data, draws: bytes(len(data)),
    "picture": lambda data, draws: Path("classes/train/class_0/0000.png").read_bytes(),
    "pickle": lambda data, draws: b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}
PLACES: dict[str, Callable[[Path], None]] = {
    "folder": lambda path: path.mkdir(),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path.name),
    "pipe": lambda path: os.mkfifo(path),
    "gone": lambda path: None,
}
READERS = {
    "images/train-*.parquet": "maps verify preview distill study",
    "images/test-*.parquet": "evaluate distill study",
    "classes/train/class_1/0001.png": "maps_of_folders",
    "teacher/config.json": "maps evaluate score export distill study",
    "teacher/model.safetensors": "maps evaluate export distill study",
    "teacher.safetensors": "weights",
    "teacher.pth.tar": "weights",
    "store/manifest.json": "verify score preview push-maps run maps_again",
    "store/provenance.json": "verify preview push-maps run",
    "store/data/*.parquet": "verify score preview push-maps run",
    "runs/run/config.yaml": "push-student push_seeds",
    "runs/other/config.yaml": "push_seeds",
    "runs/other/metrics.json": "push_seeds",
    "runs/run/metrics.json": "push-student distill_again",
    "runs/run/environment.json": "push-student",
    "runs/run/student/config.json": "push-student distill_again",
    "runs/run/student/model.safetensors": "push-student distill_again",
    "runs/run/teacher/config.json": "distill_again",
    "runs/run/maps/provenance.json": "push-student",
    "runs/run/predictions.npz": "distill_again",
    "runs/run/.stages/*.json": "distill_again",
    "config.yaml": "distill",
    "study.yaml": "study",
}
OPTIONAL = {  # files that need not be there, or are made again in seconds: what leads nowhere is no file
    ("runs/run/metrics.json", "push-student"),
    ("runs/run/config.yaml", "push-student"),
    ("runs/run/environment.json", "push-student"),
    ("runs/run/maps/provenance.json", "push-student"),
    ("runs/run/.stages/*.json", "distill again"),
    ("runs/run/metrics.json", "distill again"),
    ("runs/run/predictions.npz", "distill again"),
}


def damage(pattern: str, kind: str) -> Callable[[random.Random], None]:
    def prepare(draws: random.Random) -> None:
        path = draws.choice(sorted(Path().glob(pattern)))
        data = path.read_bytes()
        path.unlink()
        if kind in PLACES:
            PLACES[kind](path)
        else:
            path.write_bytes(CONTENTS[kind](data, draws))

    return prepare


def file_cases() -> Iterator[Case]:
    for pattern, commands in READERS.items():
        for command in (name.replace("_", " ") for name in commands.split()):
            kinds = [*CONTENTS, *PLACES]
            draws = random.Random(f"{pattern} {command}")
            for kind in draws.sample(kinds, min(DAMAGES_EACH, len(kinds))):
                if (pattern, kind) == ("config.yaml", "names"):
                    continue  # no settings: the digits demo
                nothing = kind in ("gone", "loop", "dangling link") and (pattern, command) in OPTIONAL
                codes = (0, 2) if kind == "flipped" or nothing else (2,)
                more = [pattern] if command == "weights" else []
                yield case(f"{pattern} {kind}", command, *more, prepare=damage(pattern, kind), codes=codes)


# ---- leaves of JSON and YAML ----

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**30, -0.5, float("nan"), float("inf"), "", "x", "\0", "https://user:secret@host/x"),
    *([], {}, [[[[]]]], {"a": {"b": [None]}}, ["x"] * 3, "y" * 5000),
)


def replace_leaf(pattern: str) -> Callable[[random.Random], None]:
    """Return what puts an odd value at a random place of a JSON or YAML file."""

    def prepare(draws: random.Random) -> None:
        path = draws.choice(sorted(Path().glob(pattern)))
        content = yaml.safe_load(path.read_text())
        at = content
        while True:
            key = draws.choice(list(at) if isinstance(at, dict) else range(len(at)))
            if not (isinstance(at[key], dict | list) and at[key]) or draws.random() < 0.3:
                break
            at = at[key]
        at[key] = draws.choice(ODD)
        dump = yaml.safe_dump if path.suffix == ".yaml" else json.dumps
        path.write_text(dump(content))

    return prepare


def leaf_cases() -> Iterator[Case]:
    for pattern, commands in READERS.items():
        if pattern.endswith((".json", ".yaml")):
            for command in (name.replace("_", " ") for name in commands.split()):
                for number in range(DAMAGES_EACH):
                    yield case(f"{pattern} leaf {number}", command, prepare=replace_leaf(pattern), codes=(0, 2))


# ---- rows ----


def write_split(split: str, columns: dict[str, Any], features: dict[str, Any] | None = None) -> None:
    path = next(Path("images").glob(f"{split}-*"))
    kinds = datasets.Features(features) if features else None
    datasets.Dataset.from_dict(columns, features=kinds).to_parquet(str(path))


PICTURES = [tiny_image(index, index % 2, 16, 0) for index in range(8)]
NAMED = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["class_0", "class_1"])}
ENCODED = {**NAMED, "image": datasets.Image(decode=False)}
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "text labels": ({"image": PICTURES, "label": ["cat", "dog"] * 4}, None),
    "float labels": ({"image": PICTURES, "label": [0.9, 1.0] * 4}, None),
    "true labels": ({"image": PICTURES, "label": [True, False] * 4}, None),
    "listed labels": ({"image": PICTURES, "label": [[0], [1, 0]] * 4}, None),
    "one label is null": ({"image": PICTURES, "label": [0, None, *[1] * 6]}, NAMED),
    "one label is 7": ({"image": PICTURES, "label": [0, 7, *[1] * 6]}, {**NAMED, "label": datasets.Value("int64")}),
    "one label is -1": ({"image": PICTURES, "label": [0, -1, *[1] * 6]}, NAMED),
    "other names": (
        {"image": PICTURES, "label": [0, 1] * 4},
        {**NAMED, "label": datasets.ClassLabel(names=["a", "b"])},
    ),
    "one class": ({"image": PICTURES, "label": [0] * 8}, {**NAMED, "label": datasets.ClassLabel(names=["z"])}),
    "no label": ({"image": PICTURES}, None),
    "no image": ({"label": [0, 1] * 4}, {"label": NAMED["label"]}),
    "image is text": ({"image": ["a.png"] * 8, "label": [0, 1] * 4}, {**NAMED, "image": datasets.Value("string")}),
    "foreign path": ({"image": [{"bytes": None, "path": "/etc/hostname"}] * 8, "label": [0, 1] * 4}, ENCODED),
    "bytes of a text": ({"image": [{"bytes": b"GIF89a;", "path": None}] * 8, "label": [0, 1] * 4}, ENCODED),
    "no rows": ({"image": [], "label": []}, NAMED),
}


def row_cases() -> Iterator[Case]:
    for kind, rows in ROWS.items():
        for command, split in (("maps", "train"), ("verify", "train"), ("evaluate", "test"), ("distill", "test")):
            if (kind, command) in (("other names", "verify"), ("bytes of a text", "distill")):
                continue  # a store counts labels; test images are decoded when the student is there
            yield case(kind, command, prepare=lambda draws, split=split, rows=rows: write_split(split, *rows))


CASES = [*option_cases(), *setting_cases(), *model_cases(), *file_cases(), *leaf_cases(), *row_cases()]
