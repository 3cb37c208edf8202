"""A few numbers by which equal maps are told from others: processors round differently, which changes every hash."""

import numpy as np

from timm_igkd import MapStore

NUM_MAPS = 32
MOST = 0.01
"""Two stores are the same but for rounding if their mean levels (0 to 255) differ by at most this on average. Maps of
CIFAR-10 by oneDNN's convolutions for SSE 4.1 and for AVX2 differ by 0.0007, by 200 and 256 steps by 0.03, by 50 and
automatic steps by 0.6 (benchmarks/map_rounding.py)."""


def maps_means(store: MapStore) -> str:
    """Return the mean level, 0 to 255, of each of 32 maps of a store, evenly spaced: numbers with spaces between."""
    rows = np.linspace(0, len(store) - 1, min(NUM_MAPS, len(store))).round().astype(int)
    return " ".join(f"{store.levels(row).mean():.3f}" for row in rows)


def are_same_but_for_rounding(means: str, others: str) -> bool:
    """Return whether two stores' means are as near as rounding leaves them; False where one's are not known."""
    try:
        a, b = (np.array(text.split(), dtype=float) for text in (means, others))
    except ValueError:
        return False
    return len(a) == len(b) > 0 and float(np.abs(a - b).mean()) <= MOST
