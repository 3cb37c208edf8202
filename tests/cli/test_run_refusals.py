"""`timm-igkd run` where it cannot overlay: one line of ours, and the script's own errors left alone."""

import pytest
import torch
from run_command_parts import MODEL, TRAIN, WARNINGS, image_folder, ramp_store

from timm_igkd import with_plugin
from timm_igkd.cli import main as cli
from timm_igkd.errors import InputError, message_of

pytestmark = WARNINGS


@pytest.mark.parametrize("workers", [0, 2])
def test_maps_of_other_data_end_the_script_with_our_line(command, folder, tiny_images, tmp_path, workers):
    other = ramp_store(tmp_path / "other", "", image_folder(tiny_images, seed=7, name="other_images"))
    outcome = command("run", "--maps", other, "--", TRAIN, folder, *MODEL, "--workers", workers)
    assert outcome.code == 2
    assert "image 0 (0000.png) of" in outcome.error
    assert "has no map: its pixels are in none of the 40 rows" in outcome.error


def test_an_error_in_a_worker_is_one_clean_line(command, folder, maps, tmp_path):
    damaged = sorted((folder / "train" / "class_0").iterdir())[3]
    damaged.write_bytes(b"cut")
    outcome = command("run", "--maps", maps, "--", TRAIN, folder, *MODEL, "--workers", 1)
    assert outcome.code == 2
    assert outcome.error.startswith(f"timm-igkd: error: image 3 ({damaged.name}) of")
    assert "Traceback" not in outcome.error


def test_a_prefix_of_the_maps_is_refused_before_training(command, folder, tmp_path):
    prefix = ramp_store(tmp_path / "prefix", "", folder, count=30)
    outcome = command("run", "--maps", prefix, "--", TRAIN, folder, *MODEL)
    assert outcome.code == 2
    assert "the store covers the first 30 of 40 images" in outcome.error


def test_greyscale_training_is_refused(command, folder, maps, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom timm.data import create_dataset\n"
        "create_dataset('', root=sys.argv[1], split='train', is_training=True, input_img_mode='L')\n"
    )
    outcome = command("run", "--maps", maps, "--", script, folder)
    assert (outcome.code, "need RGB images, the script asks for 'L'" in outcome.error) == (2, True)


@pytest.mark.parametrize(
    "body", ["", "raise SystemExit(0)", "create_dataset('', root=sys.argv[1], split='validation')"]
)
def test_a_script_without_a_training_dataset_is_named(command, folder, maps, tmp_path, body):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nfrom timm.data import create_dataset\n{body}\n")
    outcome = command("run", "--maps", maps, "--", script, folder)
    assert outcome.code == 2
    assert f"{str(script)!r} ended without asking timm.data.create_dataset for a training dataset" in outcome.error


@pytest.mark.parametrize("wrapped", ["{}", "Subset({}, [3, 5])"])
def test_a_script_that_overlays_its_images_itself_is_told_when_it_does(command, folder, maps, tmp_path, wrapped):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom timm.data import create_dataset\nfrom torch.utils.data import Subset\n"
        "from timm_igkd import IGOverlayDataset, MapStore\n"
        "images = create_dataset('', root=sys.argv[1], split='train', is_training=True)\n"
        f"IGOverlayDataset({wrapped.format('images')}, MapStore(sys.argv[2]))\nprint('made')\n"
    )
    outcome = command("run", "--maps", maps, "--", script, folder, maps)
    assert (outcome.code, "made" in outcome.output) == (2, False)
    assert "is overlaid already" in outcome.error
    assert "(run a script that overlays them without `timm-igkd run`)" in outcome.error


def test_run_says_first_what_it_overlays(maps, tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("import sys; print('script', file=sys.stderr)")
    assert cli.main(["run", "--maps", str(maps), "--overlay-prob", "0.25", "--", str(script)]) == 2
    first, second, _ = capsys.readouterr().err.splitlines()
    assert f"overlays aligned maps of {maps} (n = 40) on a share of 0.25 of the training images" in first
    assert "tigkd in its --aa replaces --overlay-prob" in first
    assert second == "script"


def test_the_scripts_own_errors_and_exit_codes_are_its_own(folder, maps, tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit(7)")
    with pytest.raises(SystemExit, match="7"):
        cli.main(["run", "--maps", str(maps), "--", str(script)])
    script.write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "--maps", str(maps), "--", str(script)])
    script.write_text(f"open({str(tmp_path / 'none' / 'x')!r})")
    with pytest.raises(SystemExit, match="1"):
        cli.main(["run", "--maps", str(maps), "--", str(script)])
    assert "FileNotFoundError" in capsys.readouterr().err


def test_processes_that_the_script_spawns_are_refused(command, folder, maps, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nimport torch.multiprocessing as mp\nfrom timm.data import create_dataset\n"
        "create_dataset('', root=sys.argv[1], split='train', is_training=True)\n"
        "if __name__ == '__main__':\n    mp.spawn(print, nprocs=1)\n"
    )
    outcome = command("run", "--maps", maps, "--", script, folder)
    assert outcome.code == 2
    assert "start them by torchrun --no-python --nproc-per-node N timm-igkd run" in outcome.error
    assert torch.multiprocessing.spawn.__module__ == "torch.multiprocessing.spawn"


def test_a_script_with_the_plugin_keeps_its_own_errors_too(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text(f"open({str(tmp_path / 'none' / 'x')!r})")
    with pytest.raises(SystemExit, match="1"):
        with_plugin.main([str(script)])
    assert "FileNotFoundError" in capsys.readouterr().err
    script.write_text("raise KeyboardInterrupt")
    with pytest.raises(SystemExit, match="130"):
        with_plugin.main([str(script)])
    assert "same command" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--overlay-prob", "1.5"], r"overlay_prob must be in [0, 1], got 1.5"),
        (["--overlay-weight", "-1"], r"overlay_weight must be in [0, 1], got -1"),
        (["--overlay-probb", "1"], "unknown argument '--overlay-probb' (did you mean '--overlay-prob'?)"),
        (["--maps", "nowhere"], "nowhere"),
        (["--", "missing.py"], "script 'missing.py' does not exist"),
        ([], "expected a script to run and its arguments, got none"),
    ],
)
def test_bad_arguments_are_one_line(command, maps, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    outcome = command("run", "--maps", maps, *argv)
    assert outcome.code == 2
    assert message in outcome.error


def test_a_workers_error_is_its_last_line():
    text = (
        "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
        "timm_igkd.errors.InputError: the first\n\nThe above exception was the direct cause of:\n\n"
        "Traceback (most recent call last):\n  File y\ntimm_igkd.errors.InputError: image 3: no map\n"
    )
    assert message_of(InputError(text)) == "image 3: no map"
    assert message_of(InputError("image 3: no map")) == "image 3: no map"
