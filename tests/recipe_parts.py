"""What tests of whole runs share: weights, files and history of a run's folder."""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor


def weights(run: Path, name: str = "student") -> dict[str, Tensor]:
    return safetensors.torch.load_file(run / name / "model.safetensors")


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def history(run: Path, name: str = "student") -> list[dict[str, str]]:
    lines = [line.split(",") for line in (run / f"{name}_history.csv").read_text().splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
