"""Which runs can stand side by side: what their numbers come from is the same, but for the rounding of processors."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from studies.cells import Cell
from studies.map_means import are_same_but_for_rounding
from timm_igkd.errors import InputError


class Origin(NamedTuple):
    """What a run's numbers come from, beside its settings; runs that are compared share it.

    Hashes are empty where a run had no such thing, or where its row is older than the column.

    Attributes:
        data_hash: of training and test images.
        transfer_hash: of the transfer images.
        teacher_hash: of the teacher's weights, and with them of its logits.
        store: name of the maps it was overlaid with or explained by, see `Cell.store_read`.
        maps_hash: of their files.
        maps_means: by which they are told from maps that another processor rounded.
        numerics: in words how it was computed: what moves numbers and is no setting of its cell.
    """

    data_hash: str
    transfer_hash: str
    teacher_hash: str
    store: str
    maps_hash: str
    maps_means: str
    numerics: str

    @classmethod
    def of(cls, row: Mapping[str, str]) -> "Origin":
        """Return the origin of a row."""
        cell = json.loads(row["settings"] or "{}").get("cell", {})
        names = ("overlay_prob", "overlay_source", "explanation_loss_weight", "map_method")
        store = Cell(**{name: cell[name] for name in names if name in cell}).store_read or "maps"
        versions = json.loads(row["versions"] or "{}")
        compiled = versions.get("compile", "none")
        numerics = f"device {row['device']}, precision {versions.get('precision')}, compile {compiled}"
        kept = {name: row[name] for name in cls._fields if name in row}
        return cls(**kept, store=store, numerics=numerics)

    def check_beside(
        self,
        other: "Origin",
        path: Path,
        same_maps: Collection[str] = (),
        remedy: str = "give another output_dir",
    ) -> None:
        """Raise InputError where a run of this origin cannot stand beside one of `other`, which `path` holds.

        Of `same_maps`, hashes, all are taken as the same maps where means cannot show it: one of the two has none.
        """
        kinds = {"images": "data_hash", "transfer images": "transfer_hash", "teacher": "teacher_hash"}
        is_decided = {self.maps_hash, other.maps_hash} <= {*same_maps} and not (self.maps_means and other.maps_means)
        is_rounding = is_decided or are_same_but_for_rounding(self.maps_means, other.maps_means)
        if self.store == other.store and not is_rounding:
            kinds["maps"] = "maps_hash"
        for what, name in kinds.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine and theirs and mine != theirs:
                raise InputError(
                    f"{path} holds runs with other {what} ({name} {theirs}, this run's is {mine}); {remedy}"
                )
        if self.numerics != other.numerics:
            raise InputError(
                f"{path} holds runs with {other.numerics}, this run has {self.numerics}; runs that are compared must "
                f"be computed alike: start it as the others were, or {remedy}"
            )


def source_of(row: Mapping[str, str]) -> tuple[str, str, str]:
    """Return what runs of equal settings and seeds are told apart by: images, teacher, and how it was computed."""
    return row["data_hash"], row["teacher_hash"], Origin.of(row).numerics


def decided(origins: Collection[Origin], same_maps: Collection[str]) -> set[str]:
    """Return the hashes of all maps that a decision is of: those it names, and what only rounding tells from these."""
    named = [origin for origin in origins if origin.maps_hash in same_maps]
    near = {
        origin.maps_hash
        for origin in origins
        for one in named
        if origin.store == one.store and are_same_but_for_rounding(origin.maps_means, one.maps_means)
    }
    return {*same_maps} | near
