"""Building map stores at scale: two processes against one, resident memory of a large build, bytes on disk.

    python benchmarks/map_scale.py                                      # what the result file does not have yet
    python benchmarks/map_scale.py --parts memory --overwrite --shared ../shared

Parts, all with the released CIFAR-10 student as teacher and `timm-igkd maps` as the command:
    processes  one process against two of torchrun, one thread each: images per second of the whole command (start-up
               included), in alternating rounds, and whether the stores are equal byte by byte
    memory     all 50,000 training maps with few steps (the number of steps moves no memory beyond one batch): peak
               resident memory of the process and its children, and the bytes of the store
    disk       a store of the paper's 50 steps for the first --disk_rows images: bytes per map, and for 50,000 of them

Writes one JSON file, part by part. Linux only: memory is read from /proc.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from paired import facts, origin

from timm_igkd.files import write_json

PARTS = ("processes", "memory", "disk")
NUM_TRAIN = 50_000
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def maps_command(args: argparse.Namespace, out: Path, steps: int, *options: object) -> list[str]:
    """Return the arguments of one build, after the interpreter."""
    checkpoint = args.shared / "weights/paper_students/kd_92.29.safetensors"
    command = ["-m", "timm_igkd", "maps", "--teacher", "mobilenetv2_cifar", "--teacher-args", "drop_blocks=5"]
    command += ["--teacher-checkpoint", checkpoint, "--teacher-mean", 0, 0, 0, "--teacher-std", 1, 1, 1]
    command += ["--dataset", args.shared / "data/cifar10", "--split", "train", "--n-steps", steps, "--out", out]
    return [str(word) for word in (*command, *options)]


def resident_bytes(root: int) -> int:
    """Return the resident memory of a process and all below it, each page of each process counted."""
    children: dict[int, list[int]] = {}
    sizes = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except (OSError, ProcessLookupError):
            continue  # it has ended
        process = int(fields["Pid"])
        sizes[process] = 1024 * int(fields.get("VmRSS", "0").split()[0])
        children.setdefault(int(fields["PPid"]), []).append(process)
    waiting, total = [root], 0
    while waiting:
        process = waiting.pop()
        total += sizes.get(process, 0)
        waiting += children.get(process, [])
    return total


def build(arguments: list[str], threads: int | None = 1) -> dict[str, Any]:
    """Run one build; return its seconds and its peak resident memory, sampled every 0.2 s."""
    variables = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ""}  # a CPU's figures, whatever the machine
    variables |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    with tempfile.TemporaryFile("w+") as errors:
        started, peak = time.perf_counter(), 0
        process = subprocess.Popen(
            [sys.executable, *arguments], env=variables, stdout=subprocess.DEVNULL, stderr=errors
        )
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - started
        if process.returncode != 0:
            errors.seek(0)
            raise SystemExit(errors.read()[-2000:])
    return {"seconds": round(seconds, 2), "peak_resident_mb": round(peak / 2**20)}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def store_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure_processes(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    options = ("--limit", args.rows)
    rounds, equal = [], True
    for number in range(args.rounds):
        stores = {name: folder / f"{name}{number}" for name in ("one", "two")}
        order = ("one", "two") if number % 2 == 0 else ("two", "one")
        found = {}
        for name in order:
            words = maps_command(args, stores[name], args.steps, *options)
            found[name] = build(words if name == "one" else [*TORCHRUN, *words])
        equal = equal and contents(stores["one"]) == contents(stores["two"])
        rounds.append(found)
        print(f"processes round {number}: {found}", flush=True)
    ratios = [found["one"]["seconds"] / found["two"]["seconds"] for found in rounds]
    rates = {
        f"images_per_s_{name}": args.rows / statistics.median(found[name]["seconds"] for found in rounds)
        for name in ("one", "two")
    }
    return rates | {
        "n": args.rows,
        "n_steps": args.steps,
        "threads_per_process": 1,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "stores_byte_equal": equal,
        "rounds": rounds,
    }


def measure_memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    found = build(maps_command(args, folder / "all", args.memory_steps), threads=None)
    rows = json.loads((folder / "all/provenance.json").read_text())["n"]
    size = store_bytes(folder / "all")
    return found | {
        "n": rows,
        "n_steps": args.memory_steps,
        "store_bytes": size,
        "images_per_s": rows / found["seconds"],
    }


def measure_disk(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    shard_rows = -(-NUM_TRAIN // 256)  # of the store of all 50,000, so that headers weigh the same
    found = build(
        maps_command(args, folder / "some", 50, "--limit", args.disk_rows, "--shard-size", shard_rows), threads=None
    )
    size = store_bytes(folder / "some" / "data")
    return found | {
        "n": args.disk_rows,
        "n_steps": 50,
        "shard_bytes": size,
        "bytes_per_map": size / args.disk_rows,
        "estimated_bytes_of_50000": round(size / args.disk_rows * NUM_TRAIN),
    }


def main() -> None:
    """Measure the parts and merge them into the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1024, help="images of `processes`")
    parser.add_argument("--steps", type=int, default=16, help="steps of `processes`")
    parser.add_argument("--memory_steps", type=int, default=2)
    parser.add_argument("--disk_rows", type=int, default=980)
    parser.add_argument("--overwrite", action="store_true", help="measure parts again that the file has")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/map_scale_cpu.json"))
    default_shared = Path(os.environ.get("TIMM_IGKD_SHARED", "../shared"))
    parser.add_argument("--shared", type=Path, default=default_shared, help="folder with data/ and weights/")
    args = parser.parse_args()
    if not args.shared.is_dir():
        raise SystemExit(f"{args.shared} does not exist; name the folder that CONTRIBUTING.md describes by --shared")
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    measures = {"processes": measure_processes, "memory": measure_memory, "disk": measure_disk}
    for part in args.parts:
        if part in result and not args.overwrite:
            there = origin(result[part])
            print(f"{part}: already in {args.out}, measured on {there}; measure it again with --overwrite or --out")
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = measures[part](args, Path(folder))
        result[part] = facts() | found
        write_json(args.out, result)
        print(part, {name: value for name, value in found.items() if name != "rounds"}, flush=True)


if __name__ == "__main__":
    main()
