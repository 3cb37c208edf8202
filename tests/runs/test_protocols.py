"""Protocols: presets under the YAML file, which is under the flags; the resolved config says all."""

import dataclasses

import pytest

from timm_igkd.errors import InputError
from timm_igkd.runs.parsing import parse_config, save_config
from timm_igkd.runs.protocols import PRESETS, PerProtocol, unused_settings
from timm_igkd.runs.settings import RunConfig

MINE = ["--dataset", "some/flowers", "--teacher", "resnet50"]


def parse(*argv) -> RunConfig:
    return parse_config(RunConfig, [str(word) for word in argv])


def test_every_protocol_gives_every_setting_that_has_no_default_of_its_own():
    open_settings = {item.name for item in dataclasses.fields(RunConfig) if isinstance(item.default, PerProtocol)}
    for protocol, preset in PRESETS.items():
        assert set(preset) == open_settings, protocol


def test_without_arguments_it_is_the_digits_demo_from_random_weights():
    config = parse()
    assert config == RunConfig()
    assert (config.protocol, config.name, config.dataset, config.teacher) == ("demo", "demo", "digits", "resnet10t")
    assert (config.student, config.compare, config.seeds) == ("test_resnet", "arms", 1)
    assert (config.teacher_init, config.student_init) == ("random", "random")
    assert (config.overlay_prob, config.distill_loss_weight, config.temperature) == (0.1, 0.01, 2.5)


def test_a_dataset_of_ones_own_gets_the_modern_protocol_and_its_name():
    config = parse(*MINE)
    assert (config.protocol, config.name) == ("modern", "flowers")
    assert (config.teacher_init, config.student_init) == ("pretrained", "teacher")  # the student is the teacher cut
    assert parse(*MINE, "--student", "resnet18").student_init == "pretrained"
    assert (config.overlay_prob, config.teacher_view, config.sched) == (0, "same", "cosine")


def test_the_last_rate_of_a_protocol_is_at_most_the_first():
    assert parse(*MINE).min_lr == 1e-5
    assert parse(*MINE, "--lr", 1e-6).min_lr == 1e-6
    config = parse(*MINE, "--teacher-epochs", 1, "--teacher-lr", 5e-6)
    assert (config.training("teacher").min_lr, config.training("student").min_lr) == (5e-6, 1e-5)
    with pytest.raises(InputError, match=r"min_lr 0\.01 is above lr 0\.001, and the rate would rise to it"):
        parse(*MINE, "--min-lr", 0.01)


def test_the_smallest_area_is_of_resized_crops_alone(tmp_path):
    assert parse(*MINE, "--scale-min", 0.9).scale_min == 0.9
    for protocol, more in (("fast", []), ("modern", ["--train-crop", "pad"])):
        with pytest.raises(InputError, match="scale_min goes with train_crop rrc alone, got pad; drop it"):
            parse(*MINE, "--protocol", protocol, "--scale-min", 0.9, *more)
    save_config(parse(*MINE, "--protocol", "fast"), tmp_path / "config.yaml")  # which holds the protocol's
    assert parse("--config", tmp_path / "config.yaml").train_crop == "pad"


def test_paper_protocol_is_the_papers_settings():
    config = parse(*MINE, "--protocol", "paper")
    assert (config.opt, config.lr, config.batch_size, config.epochs) == ("adam", 1e-3, 64, 100)
    assert (config.sched, config.weight_decay, config.warmup_epochs) == ("none", 0, 0)
    assert (config.distill_loss_weight, config.task_loss_weight, config.temperature) == (0.01, None, 2.5)
    assert (config.n_steps, config.map_baseline, config.map_target, config.map_output) == (50, "mean", "label", "logit")
    assert (config.overlay_prob, config.overlay_weight, config.overlay_max_power) == (0.1, 0.5, 2)
    assert (config.train_crop, config.hflip, config.smoothing) == ("pad", 0.5, 0)
    assert (config.stored_logits, config.student_init, config.student_drop) == (True, "random", 5)
    assert (config.validation_split, config.validation_fraction) == (None, 0)  # the last epoch is reported


def test_fast_protocol_is_that_of_the_studies():
    from studies.cells import PROTOCOLS

    config = parse(*MINE, "--protocol", "fast")
    known = {item.name for item in dataclasses.fields(RunConfig)}
    for name, value in PROTOCOLS["fast"].items():
        if name in known:
            assert getattr(config, name) == value, name
    assert config.train_crop == "pad"


def test_flags_win_over_the_file_and_the_file_over_the_protocol(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("protocol: paper\nlr: 0.5\nepochs: 7\n")
    config = parse(*MINE, "--config", path, "--epochs", 3)
    assert (config.protocol, config.lr, config.epochs, config.opt) == ("paper", 0.5, 3, "adam")
    assert parse(*MINE, "--config", path, "--protocol", "modern").opt == "adamw"


@pytest.mark.parametrize("protocol", PRESETS)
def test_resolved_settings_name_everything_and_read_back_equal(protocol, tmp_path):
    config = parse(*MINE, "--protocol", protocol)
    save_config(config, tmp_path / "config.yaml")
    assert parse("--config", tmp_path / "config.yaml") == config
    assert "PerProtocol" not in (tmp_path / "config.yaml").read_text()


def test_help_names_each_protocols_value(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: demo resnet10t, modern to be given, paper to be given, fast to be given)" in text
    assert "(default: demo 20, modern 30, paper 100, fast 12)" in text


def test_teacher_taken_as_it_is_has_its_weights_whatever_the_protocol():
    assert parse("--teacher-epochs", 0).teacher_init == "pretrained"
    with pytest.raises(InputError, match="learned nothing"):
        parse("--teacher-epochs", 0, "--teacher-init", "random")


def test_unknown_protocol_offers_the_nearest():
    with pytest.raises(InputError, match="did you mean 'paper'"):
        parse("--protocol", "papier")
    with pytest.raises(InputError, match="did you mean 'paper'"):
        RunConfig(protocol="papier")  # type: ignore[arg-type]


def test_a_number_of_cut_entries_alone_asks_for_the_truncated_teacher():
    assert RunConfig().student == "test_resnet"
    assert RunConfig(student_drop=3).student is None
    with pytest.raises(InputError, match="student_drop 3 is for a truncated teacher, but the student is resnet18"):
        RunConfig(student="resnet18", student_drop=3)


@pytest.mark.parametrize("dataset", [".", "..", "images", "user/images"])
def test_a_run_is_named_after_its_folder_however_that_is_written(dataset, tmp_path, monkeypatch):
    (tmp_path / "images" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "images" / ("inner" if dataset == ".." else ""))
    assert RunConfig(dataset=dataset, teacher="resnet18").name == "images"


def test_runs_are_kept_in_the_home_folder_where_the_settings_say_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = RunConfig(output_dir="~/runs", name="mine")
    assert (config.run_dir, config.output_dir) == (tmp_path / "runs" / "mine", "~/runs")


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ([], []),
        (["--overlay-source", "noise", "--overlay-weight", 0.9], ["overlay_weight 0.9", "overlay_source noise"]),
        (["--overlay-source", "noise", "--overlay-prob", 0.1, "--n-steps", 20], []),
        (["--map-method", "grad_cam"], ["map_method grad_cam"]),
        (["--n-steps", 20], ["n_steps 20"]),
        (["--map-method", "grad_cam", "--explanation-loss-weight", 1], []),
        (["--teacher-lr", 0.01], ["teacher_lr 0.01"]),
        (["--teacher-lr", 0.01, "--teacher-epochs", 1], []),
        (["--distill-loss-weight", 0, "--temperature", 2, "--attention-loss-weight", 1], ["temperature 2.0"]),
        (
            ["--model-ema-decay", 0.9, "--explanation-map", "grad_cam"],
            ["explanation_map grad_cam", "model_ema_decay 0.9"],
        ),
        (["--model-ema-decay", 0.9, "--model-ema"], []),
    ],
)
def test_what_changes_nothing_is_told(flags, names):
    """A wish that is not met would train plain KD without a word."""
    found = unused_settings(parse(*MINE, *flags))
    assert [line.removeprefix("note: ").partition(" changes nothing, ")[0] for line in found] == names
    if "overlay_source noise" in names:
        assert found[0] == "note: overlay_weight 0.9 changes nothing, overlay_prob is 0"


@pytest.mark.parametrize("protocol", PRESETS)
def test_of_a_protocols_own_settings_none_is_told(protocol):
    assert unused_settings(parse(*MINE, "--protocol", protocol)) == []


def test_a_list_or_mapping_goes_on_where_its_flag_is_repeated():
    """As those of all other commands do."""
    config = parse("--teacher-args", "drop_rate=0.1", "--teacher-args", "drop_path_rate=0.2", "width=3")
    assert config.teacher_args == {"drop_rate": 0.1, "drop_path_rate": 0.2, "width": 3}
    assert parse("--trackers", "tensorboard", "--trackers", "wandb").trackers == ("tensorboard", "wandb")
    assert parse("--export", "onnx", "--export", "onnx-int8").export == ("onnx", "onnx-int8")
    with pytest.raises(InputError, match="drop_rate"):
        parse("--teacher-args", "drop_rate=0.1", "--teacher-args", "drop_rate=0.2")
