import dataclasses
import errno
import math
import os
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import pytest
import yaml

from timm_igkd.errors import InputError, MissingFileError
from timm_igkd.runs.parsing import parse_config, save_config, setting


@dataclass(frozen=True)
class Settings:
    name: str = "digits"
    learning_rate: float = field(default=0.1, metadata={"help": "at 100 % of the schedule's peak"})
    epochs: int = 10
    amp: bool = False
    limit: int | None = None
    n_steps: int | Literal["auto"] = 32
    engine: Literal["captum", "fast"] = "fast"
    mean: tuple[float, float, float] | None = None
    seeds: tuple[int, ...] = (0, 1)
    layers: list[str] = field(default_factory=list)
    teacher_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Required:
    dataset: str
    split: str = "train"


def parse(*argv):
    return parse_config(Settings, argv)


@pytest.fixture
def write_yaml(tmp_path):
    def write(text):
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return f"--config={path}"

    return write


def test_no_arguments_give_the_defaults():
    assert parse() == Settings()


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--name", "a b"], "name", "a b"),
        (["--name="], "name", ""),
        (["--name=a_b=c"], "name", "a_b=c"),
        (["--name", "3"], "name", "3"),
        (["--learning-rate", "1e-3"], "learning_rate", 1e-3),
        (["--learning_rate=1e-3"], "learning_rate", 1e-3),
        (["--learning-rate", "-2.5"], "learning_rate", -2.5),
        (["--learning-rate=-1e-3"], "learning_rate", -1e-3),
        (["--epochs", "3", "--epochs", "4"], "epochs", 4),
        (["--amp"], "amp", True),
        (["--amp", "TRUE"], "amp", True),
        (["--amp=false"], "amp", False),
        (["--amp", "--no-amp"], "amp", False),
        (["--limit", "5"], "limit", 5),
        (["--limit", "None"], "limit", None),
        (["--n-steps", "auto"], "n_steps", "auto"),
        (["--n_steps", "64"], "n_steps", 64),
        (["--engine", "captum"], "engine", "captum"),
        (["--mean", "0.5", "-.5", "1"], "mean", (0.5, -0.5, 1.0)),
        (["--mean", "none"], "mean", None),
        (["--seeds", "1", "2", "3"], "seeds", (1, 2, 3)),
        (["--seeds"], "seeds", ()),
        (["--layers", "a", "b"], "layers", ["a", "b"]),
        (["--teacher-args", "a=1e-3", "b=text", "c=[1, 2]", "d=None", "e=true", "f="], "teacher_args", None),
    ],
)
def test_flags_are_read_by_field_type(argv, name, value):
    if name == "teacher_args":
        value = {"a": 1e-3, "b": "text", "c": [1, 2], "d": None, "e": True, "f": None}
    found = getattr(parse(*argv), name)
    assert found == value
    assert type(found) is type(value)


def test_yaml_is_read_by_field_type(write_yaml):
    text = """
        learning_rate: 1e-3
        epochs: "3"
        amp: yes
        limit: none
        n-steps: auto
        mean: [0, 1.5, 2e-1]
        seeds: [4]
        teacher_args: {drop_blocks: 1, rate: 5e-2}
    """
    found = parse(write_yaml(text))
    assert found.learning_rate == 1e-3
    assert found.epochs == 3
    assert found.amp is True
    assert found.limit is None
    assert found.n_steps == "auto"
    assert found.mean == (0.0, 1.5, 0.2)
    assert found.seeds == (4,)
    assert found.teacher_args == {"drop_blocks": 1, "rate": 0.05}


def test_flags_win_over_the_file_wherever_they_stand(write_yaml):
    config = write_yaml("epochs: 3\nname: from-file")
    assert parse("--epochs", "5", config) == dataclasses.replace(Settings(), epochs=5, name="from-file")
    assert parse(config, "--epochs", "5").epochs == 5


def test_default_none_wins_over_the_file_when_given_as_flag(write_yaml):
    assert parse(write_yaml("limit: 3"), "--limit", "none").limit is None


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--epohcs", "3"], r"unknown argument '--epohcs' \(did you mean '--epochs'\?\)"),
        (["--learning_rat=3"], r"unknown argument '--learning-rat=3' \(did you mean '--learning-rate'\?\)"),
        (["--learn", "3"], "unknown argument '--learn'"),
        (["--zzzz"], "unknown argument '--zzzz'; see --help"),
        (["train.py"], "unknown argument 'train.py'"),
        (["--name"], "--name: expected one argument"),
        (["--epochs", "3.5"], "--epochs must be int, got '3.5'"),
        (["--learning-rate", "fast"], "--learning-rate must be float, got 'fast'"),
        (["--amp", "maybe"], r"--amp must be true\|false, got 'maybe'"),
        (["--limit", "x"], r"--limit must be int\|none, got 'x'"),
        (["--engine", "captun"], r"--engine must be captum\|fast, got 'captun' \(did you mean 'captum'\?\)"),
        (["--n-steps", "autos"], r"--n-steps must be int\|auto, got 'autos' \(did you mean 'auto'\?\)"),
        (["--mean", "1", "2"], r"--mean must be float float float\|none, got '1 2'"),
        (["--seeds", "1", "b"], "--seeds must be int …, got '1 b'"),
        (["--teacher-args", "drop"], "--teacher-args must be key=value …, got 'drop'"),
        (["--teacher-args", "a=1", "a=2"], "--teacher-args must be key=value …, got 'a=1 a=2'"),
        (["--teacher-args", "a=[1"], "--teacher-args must be key=value …"),
        (["--teacher-args", "a={? [b]}"], "--teacher-args must be key=value …"),
        (["--teacher-args", f"a={'[' * 5000}"], "--teacher-args must be key=value …"),
        (["--teacher-args", f"a={'[' * 30}{']' * 30}"], "--teacher-args must be key=value …"),
        (["--name", "a\0b"], "--name must be str, got"),
        (["--name", "\udcff"], "--name must be str, got"),
    ],
)
def test_bad_flag_is_one_line_that_names_it(argv, match, capsys):
    with pytest.raises(InputError, match=match) as raised:
        parse(*argv)
    assert "\n" not in str(raised.value)
    assert capsys.readouterr() == ("", "")


BILLION = "teacher_args:\n  a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("epohcs: 3", r"settings.yaml has an unknown key 'epohcs' \(did you mean 'epochs'\?\)"),
        ("config: x.yaml", "unknown key 'config'"),
        ("epochs: true", "epochs in .*settings.yaml must be int, got True"),
        ("epochs: 3.0", "epochs in .* must be int, got 3.0"),
        ("epochs:", "epochs in .* must be int, got None"),
        ("learning_rate: [1]", r"learning_rate in .* must be float, got \[1\]"),
        ("learning_rate: true", "learning_rate in .* must be float, got True"),
        ("amp: 1", r"amp in .* must be true\|false, got 1"),
        ("name: 3", "name in .* must be str, got 3; put it in quotes"),
        ("seeds: 3", "seeds in .* must be int …, got 3"),
        ("mean: [1, 2]", r"mean in .* must be float float float\|none"),
        ("teacher_args: [1]", "teacher_args in .* must be key=value …"),
        ("teacher_args: {1: 2}", "teacher_args in .* must be key=value …"),
        ("epochs: 1\nepochs: 2", "not valid YAML: duplicate key 'epochs'.* line 2"),
        ("n_steps: 1\nn-steps: 2", "gives 'n_steps' twice"),
        ("teacher_args: {a: 1, a: 2}", "duplicate key 'a'"),
        ("epochs: [1", "not valid YAML"),
        ("? [a]", "not valid YAML: .*unhashable key"),
        ("? [a]\n: 1\n? [a]\n: 2", "not valid YAML: .*unhashable key"),
        ("teacher_args: {? {b: 1} : 2}", "not valid YAML: .*unhashable key"),
        ("name: 2024-13-45", "not valid YAML"),
        ("name: !!bool x", "not valid YAML"),
        ("name: !!timestamp x", "not valid YAML"),
        ("name: " + "[" * 5000, "not valid YAML: nested too deeply"),
        (BILLION, "not valid YAML: it holds too many values"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
        ("- epochs", "must hold `name: value` lines, found list"),
        ("", "must hold `name: value` lines, found NoneType"),
    ],
)
def test_bad_file_is_one_line_that_names_the_key(text, match, write_yaml):
    with pytest.raises(InputError, match=match) as raised:
        parse(write_yaml(text))
    assert "\n" not in str(raised.value)


def test_file_that_is_not_utf8_is_an_input_error(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(InputError, match="not valid YAML"):
        parse("--config", str(path))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"absent\.yaml"):
        parse("--config", str(tmp_path / "absent.yaml"))
    with pytest.raises(MissingFileError, match="must be a YAML file"):
        parse("--config", str(tmp_path))


def test_merge_keys_of_yaml_are_no_duplicates(write_yaml):
    text = "teacher_args:\n  a: &base {x: 1, y: 2}\n  b: {<<: *base, y: 3}"
    assert parse(write_yaml(text)).teacher_args["b"] == {"x": 1, "y": 3}


def test_field_without_default_must_be_given(write_yaml):
    with pytest.raises(InputError, match="--dataset is required"):
        parse_config(Required, [])
    assert parse_config(Required, ["--dataset", "digits"]) == Required("digits")
    assert parse_config(Required, [write_yaml("dataset: digits")]) == Required("digits")


def test_checks_of_the_dataclass_reach_the_user():
    @dataclass(frozen=True)
    class Checked:
        p: float = 0.1

        def __post_init__(self):
            if not 0 <= self.p <= 1:
                raise InputError(f"p must be in [0, 1], got {self.p}")

    with pytest.raises(InputError, match=r"p must be in \[0, 1\], got 2"):
        parse_config(Checked, ["--p", "2"])


def test_help_lists_flags_with_defaults(capsys):
    with pytest.raises(SystemExit) as raised:
        parse_config(Settings, ["-h"], prog="recipe", description="first line\n    second line")
    assert raised.value.code == 0
    text = capsys.readouterr().out
    assert "usage: recipe" in text
    assert "first line\n    second line" in text
    assert "at 100 % of the schedule's peak (default: 0.1)" in text
    for shown in ("--n-steps int|auto", "(default: none)", "(default: 0 1)", "(default: false)", "--config YAML"):
        assert shown in text


@pytest.mark.parametrize(
    "config",
    [
        Settings(),
        Settings(name="1e-3", layers=["1e5", "none", "true", "", "é", "a: b", "# no", "2024-01-01"]),
        Settings(name="two\nlines", learning_rate=1e-17, limit=3, n_steps="auto", mean=(0.1, 1 / 3, 1e22), amp=True),
        Settings(learning_rate=math.inf, seeds=(), teacher_args={"a": {"b": [1, "1", 1.0]}, "c": None, "d": "1e-3"}),
    ],
)
def test_saved_config_reads_back_equal(config, tmp_path):
    path = tmp_path / "run" / "config.yaml"
    save_config(config, path)
    found = parse("--config", str(path))
    assert found == config
    assert repr(found) == repr(config)
    save_config(found, path)
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]


def test_saved_config_is_plain_yaml_in_field_order(tmp_path):
    shared_list = [1, 2]
    save_config(Settings(teacher_args={"a": shared_list, "b": shared_list}), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert "&" not in text
    assert list(yaml.safe_load(text)) == [part.name for part in dataclasses.fields(Settings)]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failed_save_keeps_the_old_file(failing, tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    save_config(Settings(), path)
    before = path.read_bytes()

    def full_disk(*args):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(os, failing, full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_config(Settings(epochs=1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_every_instance_gets_a_copy_of_a_default_with_what_it_holds():
    @dataclass
    class Settings:
        options: dict[str, int] = setting("of a model", {"drop": 5}, stages=("student",))

    first, second = Settings(), parse_config(Settings, [])
    first.options["drop"] = 6
    assert second.options == Settings().options == {"drop": 5}
    assert fields(Settings)[0].metadata == {"help": "of a model", "stages": ("student",)}
