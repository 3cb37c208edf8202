"""The command line answers at once: whatever needs no model and no dataset is said before torch is imported."""

import importlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from command_lines import RECIPES, subprocess_environment

from timm_igkd.cli.definitions import COMMANDS
from timm_igkd.cli.exit_codes import exit_within_imports
from timm_igkd.cli.main import main
from timm_igkd.runs import job
from timm_igkd.runs.settings import RunConfig

HEAVY = ("torch", "timm", "datasets", "accelerate", "captum", "pyarrow")
ANSWERED = """
import sys
from {module} import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
loaded = [name for name in {heavy} if name in sys.modules]
print("code", code, loaded)
"""
NONE, DIGITS = "/no/such/path", "--dataset digits --split train"
PRETRAINED, STUDENT = "distill --teacher-init pretrained", "distill --student resnet18 --student-init pretrained"
REFUSED = {
    "mapz": "invalid choice: 'mapz'",
    "": "required",
    f"preview --maps . --out p.png {DIGITS} --cout 3": "mean '--count'",
    f"preview --maps . --out p.png {DIGITS} --count x": "invalid int",
    "maps --teacher resnet18": "required: --dataset, --split, --out",
    f"maps --teacher resnet18 --teacher-checkpoint {NONE} {DIGITS} --out maps": f"no checkpoint file '{NONE}'",
    f"verify --maps {NONE} {DIGITS}": f"map store '{NONE}' does not exist",
    f"run --maps {NONE} -- train.py": "does not exist",
    "run --maps .": "expected a script to run",
    "run --maps . -- -m": "expected a script to run",
    f"run --maps . -- {NONE}": f"script '{NONE}' does not exist",
    "run --maps . --overlay-prob 2 -- typo.yaml": "overlay_prob must be in [0, 1], got 2",
    f"evaluate --model resnet18 --checkpoint {NONE} {DIGITS} --out m.json": f"no checkpoint file '{NONE}'",
    f"push-maps {NONE} --repo-id user/name": f"no folder '{NONE}'",
    f"push-student {NONE} --repo-id user/name": f"no folder '{NONE}'",
    f"push-student . --repo-id user/name --seed-runs {NONE}": f"no folder '{NONE}'",
    f"evaluate --model x --model-args a=1 b=2 a=1 {DIGITS} --out m.json": "'a' is given twice; leave one out",
    f"maps --teacher x --teacher-args a=1 --teacher-args a=2 {DIGITS} --out m": "--teacher-args: 'a' is given twice",
    "students --teacher x --max-size-mb 1 --teacher-args a=1 a=2": "--teacher-args: 'a' is given twice",
    "distill --teacher-args a=1 a=2": "--teacher-args must be key=value",
    "distill --epochz 3": "did you mean '--epochs'?",
    "distill --epochs x": "--epochs",
    "distill --aa rand-m9 --batches device": "batches device cannot do aa",
    f"distill --config {NONE}": f"'{NONE}'",
    "distill --config typo.yaml": "typo.yaml has an unknown key 'epochz' (did you mean 'epochs'",
    f"{PRETRAINED} --teacher-epochs 0 --maps {NONE}": f"map store '{NONE}' does not exist",
    f"{PRETRAINED} --teacher-checkpoint {NONE}": f"no checkpoint file '{NONE}' (--teacher-checkpoint)",
    f"{STUDENT} --student-checkpoint {NONE}": f"no checkpoint file '{NONE}' (--student-checkpoint)",
}
ASKED = ["--help", "--version", "distill --help", *(f"{name} --help" for name in COMMANDS)]


def answer(tmp_path: Path, *argv: str, module: str = "timm_igkd.cli.main") -> tuple[str, str, str]:
    """Return (what main printed last, the rest of stdout, stderr)."""
    code = ANSWERED.format(heavy=HEAVY, module=module)
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=subprocess_environment(tmp_path, PYTHONPATH=f"{RECIPES.parent}{os.pathsep}{RECIPES}"),
    )
    *output, last = done.stdout.splitlines()
    return last, "\n".join(output), done.stderr


@pytest.mark.parametrize("line", [*ASKED, *REFUSED])
def test_question_is_answered_without_torch_timm_or_datasets(line, tmp_path):
    (tmp_path / "typo.yaml").write_text("epochz: 3\n")
    last, output, error = answer(tmp_path, *line.split())
    assert last == f"code {2 if line in REFUSED else 0} []"
    assert len(error.splitlines()) == (line in REFUSED), error
    assert REFUSED.get(line, "") in error
    assert line in REFUSED or output


HELPS = [["--help"], ["distill", "--help"], ["maps", "--help"], ["run", "--help"], ["distill", "--epochs", "x…\udcff"]]


@pytest.mark.parametrize("line", HELPS, ids=["door", "distill", "maps", "run", "error"])
@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1"])
def test_what_stdout_cannot_hold_is_written_as_its_number(line, encoding, tmp_path):
    environment = subprocess_environment(tmp_path, PYTHONIOENCODING=encoding)
    command = [sys.executable, "-m", "timm_igkd", *line]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert done.returncode == (0 if "--help" in line else 2), done.stderr
    assert b"Traceback" not in done.stderr
    if "distill" in line:
        assert rb"\u2026" in done.stdout + done.stderr


def test_streams_that_cannot_be_reconfigured_stay(monkeypatch):
    from timm_igkd import __main__

    for stream in (io.StringIO(), None):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stream)
            patched.setattr(sys, "argv", ["timm-igkd", "mapz"])
            with pytest.raises(SystemExit) as ended:
                __main__.entry()
            assert ended.value.code == 2
            assert sys.stdout is stream


def test_help_of_the_recipe_is_the_doors(tmp_path):
    last, output, error = answer(tmp_path, "--help", module="train_igkd")
    assert (last, error) == ("code 0 []", "")
    assert "accelerate launch recipes/train_igkd.py" in output


def test_run_that_has_begun_needs_the_checkpoint_no_more(tmp_path, monkeypatch):
    """Its stages may be complete; the job itself says what it still needs."""
    (tmp_path / "runs" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    begun: list[RunConfig] = []
    monkeypatch.setattr(job, "distill", begun.append)
    assert main(["distill", "--name", "run", "--teacher-init", "pretrained", "--teacher-checkpoint", NONE]) == 0
    assert [config.teacher_checkpoint for config in begun] == [NONE]


def test_every_command_names_a_function_that_is_there():
    for command in COMMANDS.values():
        function = getattr(importlib.import_module(f"timm_igkd.cli.{command.module}"), command.function)
        assert (function.__doc__ or "").startswith(command.summary)


# ---- Ctrl-C ----


def interrupted(
    tmp_path: Path, ready: str, *argv: str, delay: float = 0.0, door: Sequence[str] = ("-m", "timm_igkd")
) -> tuple[int, str, str]:
    """Start timm-igkd, interrupt it `delay` after it has mapped a library whose path holds `ready`."""
    process = subprocess.Popen(
        [sys.executable, *door, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=subprocess_environment(tmp_path),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    maps = Path(f"/proc/{process.pid}/maps")
    end = time.monotonic() + 60
    while process.poll() is None and ready not in maps.read_text() and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    return process.returncode, output, error


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("ready", "delay"),
    [
        ("_multiarray_umath", 0.0),
        ("libtorch_cpu", 0.0),
        ("libtorch_cpu", 0.3),
        pytest.param("libtorch_cpu", 0.7, marks=pytest.mark.slow),
        pytest.param("libtorch_cpu", 1.0, marks=pytest.mark.slow),
        pytest.param("libtorch_cpu", 1.5, marks=pytest.mark.slow),
        pytest.param("torchvision", 0.0, marks=pytest.mark.slow),
        pytest.param("libarrow", 0.0, marks=pytest.mark.slow),
    ],
)
def test_interrupt_is_one_line_and_130_from_the_first_second_on(ready, delay, tmp_path):
    """Digits, a teacher without weights: the command would end with 2 after its imports."""
    argv = [
        "maps",
        "--teacher",
        "test_resnet",
        "--dataset",
        "digits",
        "--split",
        "none",
        "--out",
        str(tmp_path / "maps"),
    ]
    code, output, error = interrupted(tmp_path, ready, *argv, delay=delay)
    assert (code, output) == (130, "")
    (line,) = error.splitlines()
    assert line.startswith("timm-igkd: error: interrupted")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_the_recipe_that_is_a_door_ends_likewise(tmp_path):
    door = [str(RECIPES / "train_igkd.py")]
    code, output, error = interrupted(tmp_path, "libtorch_cpu", "--output-dir", str(tmp_path / "runs"), door=door)
    assert (code, output) == (130, "")
    (line,) = error.splitlines()
    assert "error: interrupted" in line


def test_a_door_prints_what_an_encoding_cannot_hold(tmp_path):
    """Thin spaces, and names that the user gave."""
    env = subprocess_environment(tmp_path) | {"PYTHONIOENCODING": "latin-1"}
    code = "from timm_igkd.__main__ import entry\nentry(lambda: print('\\u202f') or 7)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (7, "\\u202f\n", "")


@pytest.mark.parametrize(
    "script", ["recipes/train_igkd.py", "recipes/study.py", "recipes/study_report.py", "hub/push_student.py"]
)
def test_scripts_are_such_doors(script):
    text = (RECIPES.parent / script).read_text()
    assert text.endswith('if __name__ == "__main__":\n    entry(main)\n')


def test_interrupt_outside_an_import_is_pythons():
    with pytest.raises(KeyboardInterrupt):
        exit_within_imports(signal.SIGINT, sys._getframe())


def test_ignored_interrupts_stay_ignored(tmp_path):
    """As under nohup: the process a shell starts in the background ignores SIGINT."""
    code = "import signal, sys; from timm_igkd.__main__ import entry; sys.argv[1:] = ['--version']\n"
    code += "signal.signal(signal.SIGINT, signal.SIG_IGN)\ntry: entry()\nexcept SystemExit: pass\n"
    code += "print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    environment = subprocess_environment(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.splitlines()[-1] == "True", done.stderr


@pytest.mark.parametrize(
    "swallowed",
    [
        "os.register_at_fork(before=interrupt); fork()",
        "Loader()",
        "weakref.finalize(type('Dropped', (), {})(), interrupt)",
    ],
    ids=["fork", "__del__", "finalize"],
)
def test_an_interrupt_where_python_swallows_exceptions_is_not_lost(tmp_path, swallowed):
    """Python runs hooks around a fork and swallows what they raise: logging has some, this one is in their place."""
    code = f"""
import multiprocessing, os, signal, time, weakref
from timm_igkd.cli.exit_codes import exit_within_imports
signal.signal(signal.SIGINT, exit_within_imports)
sent = []
def interrupt():
    if not sent:
        sent.append(os.kill(os.getpid(), signal.SIGINT))
        for _ in range(1000):
            pass
class Loader:
    def __del__(self):
        interrupt()
def fork():
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
    worker.start()
    worker.join()
try:
    {swallowed}
    time.sleep(300)  # a wait is ended
    print("lost")
except KeyboardInterrupt:
    print("interrupted after", len(sent))
"""
    environment = subprocess_environment(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.stdout, done.stderr) == ("interrupted after 1\n", "")
