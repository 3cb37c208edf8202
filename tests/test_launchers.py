"""Two machines, each with a launcher of its own under one address: as one launcher with as many processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from command_lines import RECIPES, subprocess_environment, tiny_run, two_splits

from timm_igkd import MapStore
from timm_igkd.files import read_mapping

LAUNCH = Path(__file__).resolve().parents[1] / "docs" / "launch"
LIMIT_S = 300


@pytest.mark.parametrize(("name", "machines", "processes"), [("one_machine", 1, 8), ("two_machines", 2, 16)])
def test_accelerate_reads_the_files_of_the_docs(name, machines, processes):
    found = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert (found.num_machines, found.num_processes, found.mixed_precision) == (machines, processes, "bf16")


@pytest.mark.parametrize("name", ["maps", "distill"])
def test_job_scripts_are_whole_shell_scripts(name):
    subprocess.run(["bash", "-n", str(LAUNCH / f"{name}.sbatch")], check=True)


@pytest.mark.parametrize(
    ("array", "given", "shard"), [("0-15", [], "3/16"), ("3", [], "3/16"), ("0-31", ["32"], "3/32")]
)
def test_a_task_of_the_array_computes_the_same_shard_whenever_it_is_submitted(tmp_path, array, given, shard):
    command = tmp_path / "timm-igkd"
    command.write_text('#!/bin/sh\necho "$@"\n')
    command.chmod(0o755)
    slurm = {"SLURM_CPUS_PER_TASK": "8", "SLURM_ARRAY_TASK_ID": "3"}
    slurm["SLURM_ARRAY_TASK_COUNT"] = "1" if array == "3" else array.split("-")[1]
    found = subprocess.run(
        ["bash", str(LAUNCH / "maps.sbatch"), "local-dir:teacher", "images", "maps", *given],
        env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split()[-4:] == ["--out", "maps", "--shard", shard]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(
    tmp_path: Path,
    options: list[object],
    *flags: str,
    program: tuple[str, ...] = ("-m", "timm_igkd", "distill"),
    **environment: str,
) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *flags, *program, *map(str, options)],
        env=subprocess_environment(tmp_path / "home", **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, output[-2000:]


@pytest.mark.slow
def test_two_launchers_train_the_student_of_one_launcher_with_two_processes(tiny_images, tmp_path):
    images = two_splits(tiny_images, size=32)
    options = tiny_run(images, "--overlay-prob", 0.5)
    together = launch(tmp_path, [*options, "--output-dir", tmp_path / "one"], "--standalone", "--nproc-per-node=2")
    finish([together])
    address = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    machines = [f"--node-rank={rank}" for rank in (0, 1)]
    apart = [launch(tmp_path, [*options, "--output-dir", tmp_path / "two"], *address, rank) for rank in machines]
    finish(apart)
    files = [tmp_path / name / "run" / "student" / "model.safetensors" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert read_mapping(tmp_path / "two" / "run" / "metrics.json")["n"] == 8


TWO_PROCESSES = ("--standalone", "--nproc-per-node=2")


@pytest.mark.slow
def test_a_training_of_two_processes_that_was_killed_ends_with_the_weights_of_one_that_was_not(tiny_images, tmp_path):
    options = tiny_run(two_splits(tiny_images, n=64, size=32), "--overlay-prob", 0, "--epochs", 8)
    finish([launch(tmp_path, [*options, "--output-dir", tmp_path / "whole"], *TWO_PROCESSES)])
    killed = [*options, "--output-dir", tmp_path / "killed"]
    process = launch(tmp_path, killed, *TWO_PROCESSES)
    begun = time.monotonic()
    while not (tmp_path / "killed" / "run" / "student_training" / "last.pt").exists():
        assert process.poll() is None, process.communicate()[0][-2000:]
        assert time.monotonic() - begun < LIMIT_S
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for worker in [*map(int, workers), process.pid]:  # each worker is a session of its own
        os.kill(worker, signal.SIGKILL)
    process.communicate(timeout=LIMIT_S)
    assert (tmp_path / "killed" / "run" / "student_training" / "last.pt").exists()
    alone = launch(tmp_path, [*killed, "--resume"], "--standalone", "--nproc-per-node=1")
    output, _ = alone.communicate(timeout=LIMIT_S)
    assert "was begun with num_processes = 2, now it is 1; launch it as before" in output
    finish([launch(tmp_path, [*killed, "--resume"], *TWO_PROCESSES)])
    files = [tmp_path / name / "run" / "student" / "model.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_a_program_of_two_processes_distils_twice(tiny_images, tmp_path):
    program = tmp_path / "twice.py"
    program.write_text(
        "import sys\nfrom timm_igkd import RunConfig, distill\nfrom timm_igkd.runs.parsing import parse_config\n"
        "for name in ('first', 'second'):\n"
        "    distill(parse_config(RunConfig, [*sys.argv[1:], '--name', name], prog='twice'))\n"
    )
    options = tiny_run(two_splits(tiny_images, size=32), "--overlay-prob", 0, "--output-dir", tmp_path / "runs")
    finish([launch(tmp_path, options, *TWO_PROCESSES, program=(str(program),))])
    assert {path.parent.name for path in (tmp_path / "runs").glob("*/metrics.json")} == {"first", "second"}


@pytest.mark.slow
def test_two_processes_of_the_minimal_recipe_have_one_teacher(tmp_path):
    """Each ends with statistics of its own last batch in its batch norms; maps of two teachers would be refused."""
    options = [*"--teacher-epochs 1 --epochs 1 --n-steps 2 --limit 128 --out".split(), tmp_path / "run"]
    finish([launch(tmp_path, options, *TWO_PROCESSES, program=(str(RECIPES / "minimal.py"),))])
    assert len(MapStore(tmp_path / "run" / "maps")) == 128


DIFFERENT_TEACHERS = """
import sys
import torch
from accelerate import PartialState
from tiny_parts import ImageList, noise_image, tiny_teacher
from timm_igkd import IGOptions, compute_maps
from timm_igkd.errors import InputError

state = PartialState(cpu=True)
teacher = tiny_teacher()
teacher.bn1.running_mean += state.process_index
images = ImageList([noise_image(seed) for seed in range(4)], [0, 1, 0, 1])
try:
    compute_maps(teacher, images, sys.argv[1], options=IGOptions(n_steps=2), shard_size=1, progress=False)
except InputError as error:
    print(f"process {state.process_index}: {error}")
"""


@pytest.mark.slow
def test_a_store_has_one_teacher_in_all_processes(tmp_path):
    """Else rows would be of another teacher than the one that the manifest names, and verified."""
    program = tmp_path / "program.py"
    program.write_text(DIFFERENT_TEACHERS)
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    process = launch(tmp_path, [tmp_path / "maps"], *TWO_PROCESSES, program=(str(program),), **environment)
    output, _ = process.communicate(timeout=LIMIT_S)
    for number in (0, 1):
        assert f"process {number}: the teacher of process 1 has other weights than that of process 0" in output
    assert not (tmp_path / "maps").exists()
