"""score.json: how faithful a store's maps are, beside its manifest; `evaluation.faithfulness` measures it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from timm_igkd.attribution.ig_options import METHOD_NAMES, IGOptions
from timm_igkd.errors import InputError, check_range
from timm_igkd.intervals import Interval
from timm_igkd.maps.manifest import Provenance
from timm_igkd.records import read_record

SCORE = "score.json"
ScoredMaps = Literal["own", "random", "sobel", "centre"]
CONTROLS: tuple[ScoredMaps, ...] = ("random", "sobel", "centre")
_WORDS = {"random": "Random pixels", "sobel": "Sobel edges of the image", "centre": "Distance from the centre"}


@dataclass(frozen=True, kw_only=True)
class MapScore:
    """How the target's probability follows one kind of maps, over all images.

    Attributes:
        maps: "own": the store's; else what they are compared with.
        deletion: area under the curve as the pixels of highest attribution go first; low is faithful.
        insertion: area under the curve as they come first; high is faithful.
        deletion_gap: the store's area minus this one, image by image; None for its own.
        insertion_gap: likewise.
        deletion_curve: mean probability after each equal share of the pixels, from none to all.
        insertion_curve: likewise.
    """

    maps: ScoredMaps
    deletion: Interval
    insertion: Interval
    deletion_gap: Interval | None
    insertion_gap: Interval | None
    deletion_curve: tuple[float, ...]
    insertion_curve: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """Deletion and insertion of a store's maps beside controls of the same images.

    Attributes:
        options: which maps.
        weights_sha256: of their teacher.
        keys_hash: of their store.
        n: images scored, evenly spread over the store.
        steps: equal shares of the pixels.
        deleted: what takes the place of a deleted pixel.
        inserted_into: what pixels are inserted into.
        seed: of the random maps.
        scores: the store's own first.
        versions: of the packages.
    """

    options: IGOptions
    weights_sha256: str
    keys_hash: str
    n: int
    steps: int
    deleted: str
    inserted_into: str
    seed: int
    scores: tuple[MapScore, ...]
    versions: Mapping[str, str | None]

    def __post_init__(self) -> None:
        check_range("n", self.n, 2)
        check_range("steps", self.steps, 1)

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return a table: maps, deletion, insertion, and what the store's own differ from them in each."""
        own = METHOD_NAMES[self.options.method]
        return [
            (
                _WORDS.get(score.maps, f"{own[0].upper()}{own[1:]}"),
                str(score.deletion),
                str(score.insertion),
                "" if score.deletion_gap is None else str(score.deletion_gap),
                "" if score.insertion_gap is None else str(score.insertion_gap),
            )
            for score in self.scores
        ]


def read_score(folder: Path, provenance: Provenance) -> Faithfulness | None:
    """Return what score.json beside a store's manifest says; None where there is none, or of other maps.

    Raises:
        InputError: a damaged file.
    """
    path = folder / SCORE
    if not path.exists():
        return None
    try:
        found = read_record(Faithfulness, path)
    except InputError as error:
        raise InputError(f"{error}; delete it, or write it again with: timm-igkd score") from error
    scored = found.options.used, found.weights_sha256, found.keys_hash
    maps = provenance.options.used, provenance.teacher.weights_sha256, provenance.keys_hash
    return found if scored == maps else None
