"""Latencies of a study's networks: measured once, before runs go side by side, and read by all its processes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.models import get_model_input_config
from torch import nn

from timm_igkd.evaluation.latency import describe_hardware, time_model
from timm_igkd.files import exclusive, read_mapping, write_json

_SECONDS = 0.5


class Latencies:
    """Latencies kept in a study's work folder.

    Args:
        folder: the work folder.
        device: measured on.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.path, self.device = folder / "latency.json", device

    def latency_ms(self, architecture: list[Any], create_model: Callable[[], nn.Module]) -> dict[str, float]:
        """Return median latencies in ms at batch 1 and 64 with the threads used, as the columns of a row.

        Args:
            architecture: what names the network.
            create_model: makes it, where it was not measured on this device yet.
        """
        key = json.dumps([*architecture, describe_hardware(self.device)])
        with exclusive(self.path.with_suffix(".lock")):
            known = read_mapping(self.path) if self.path.exists() else {}
            if key not in known:
                model = create_model().to(self.device).eval()
                times = time_model(model, get_model_input_config(model)["input_size"], self.device, seconds=_SECONDS)
                known[key] = {f"latency_ms_{batch}": times[f"batch_{batch}"]["median"] for batch in (1, 64)}
                known[key]["latency_threads"] = torch.get_num_threads()
                write_json(self.path, known)
        return known[key]
