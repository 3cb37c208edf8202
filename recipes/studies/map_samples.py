"""Some of the maps that a study's runs read, kept beside its rows.

Processors round differently, so maps that another machine computed have another hash. By the sample they are told from
maps of another method, other steps or another teacher.

<output_dir>/maps.npz    `<maps_hash>/maps`: [n, H, W] uint8, `<maps_hash>/logits`: [n, classes] float32; of n rows
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from studies.arrays import ArrayFile
from timm_igkd import MapStore

NUM_SAMPLED = 32
MEAN_LEVELS = 0.1
"""Most that maps differ on average, of 255 levels, to be the same but for rounding. By oneDNN's convolutions for SSE
4.1 and AVX2 maps of CIFAR-10 differ by 0.002, by 50 steps and automatic ones by 1.3 (benchmarks/map_rounding.py)."""
MEAN_LOGITS = 0.01
"""Most that logits differ on average; by these convolutions 0.00001 at most."""

Sample = dict[str, np.ndarray]


def sample_maps(store: MapStore) -> Sample:
    """Return `maps` and, where the store has them, `logits` of some of its rows, evenly spaced."""
    rows = np.linspace(0, len(store) - 1, min(NUM_SAMPLED, len(store))).round().astype(int)
    sample = {"maps": np.stack([store.levels(row) for row in rows])}
    if store.has_logits:
        sample["logits"] = np.stack([store.logits(row) for row in rows])
    return sample


class MapSamples:
    """The samples of one study's output folder, by the hash of the maps they are of.

    Args:
        folder: of the study's rows.
        rows: their file, named in errors.
    """

    def __init__(self, folder: Path, rows: Path):
        self._file = ArrayFile(folder / "maps.npz", rows)

    def read(self, maps_hash: str) -> Sample:
        """Return the sample of these maps, empty where there is none."""
        names = [name for name in self._file.names() if name.partition("/")[0] == maps_hash]
        return {name.partition("/")[2]: self._file.read(name) for name in names}

    def add(self, samples: Mapping[str, Sample]) -> None:
        """Add samples by hash; what is there already is left as it is."""
        new = {f"{key}/{name}": array for key, sample in samples.items() for name, array in sample.items()}
        there = self._file.names()
        self._file.add({name: array for name, array in new.items() if name not in there})


def are_same_but_for_rounding(a: Sample, b: Sample) -> bool:
    """Return whether two samples are of maps that differ by rounding at most."""
    if not a or a.keys() != b.keys():
        return False
    most = {"maps": MEAN_LEVELS, "logits": MEAN_LOGITS}
    return all(
        a[name].shape == b[name].shape and np.abs(a[name].astype(float) - b[name].astype(float)).mean() <= most[name]
        for name in a
    )
