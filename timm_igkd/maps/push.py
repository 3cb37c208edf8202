"""Map stores on the Hub: pushed as a dataset whose maps the viewer shows, fetched by name into the local cache."""

from collections.abc import Mapping
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import snapshot_download

from timm_igkd.errors import InputError, MissingFileError, RunError
from timm_igkd.files import given_path
from timm_igkd.hub.cache_notice import cache_use_is_told, cached_revision_is_kept
from timm_igkd.hub.cards import public_dataset, public_name
from timm_igkd.hub.errors import with_retries
from timm_igkd.hub.names import is_repo_id
from timm_igkd.hub.transport import (
    TIMEOUT_S,
    Publication,
    Pushed,
    check_repo_id,
    hub_session,
    publish,
    repo_label,
    require_login,
)
from timm_igkd.maps.card import PICTURE, dataset_card, map_picture
from timm_igkd.maps.manifest import Manifest, Provenance, read_manifest
from timm_igkd.maps.scores import SCORE, read_score
from timm_igkd.maps.store_files import check_order, check_shard, require_complete, shard_name, shard_paths
from timm_igkd.records import record_bytes

STORE_FILES = ["manifest.json", "provenance.json", SCORE, "data/*.parquet"]
_Kind = TypeVar("_Kind", Manifest, Provenance)


def push_maps(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    *,
    overwrite_card: bool = False,
    replace: bool = False,
    create_pr: bool = False,
    timeout_s: float = TIMEOUT_S,
) -> Pushed:
    """Publish a finished store as a dataset of the Hub, in one commit; pushing again updates it.

    Args:
        folder: of the store.
        repo_id: user/name.
        private: create the dataset private.
        overwrite_card: replace a card that was edited by hand on the Hub.
        replace: replace what the dataset holds where that is no map store, or one by another method, or of a teacher,
            data set or split of another name.
        create_pr: open a pull request in place of a commit on main; the dataset must be there.
        timeout_s: longest silence of the Hub before a request is given up and made again.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        MissingFileError: no store there.
        InputError: unfinished or corrupt store, or a bad name.
        RunError: no login, no access, no network, or the name is taken: by what `replace` is for.
    """
    folder = given_path("folder", folder)
    check_repo_id(repo_id, timeout_s)
    provenance = require_complete(folder)
    require_login(repo_id)
    manifest = _public(read_manifest(folder))
    files: dict[str, bytes | Path] = {
        "manifest.json": record_bytes(manifest),
        "provenance.json": record_bytes(_public(provenance)),
    }
    score, keys = read_score(folder, provenance), list[str]()
    if score is not None:
        files[SCORE] = record_bytes(score)
    for shard, path in enumerate(shard_paths(folder, provenance)):
        keys += check_shard(path, provenance, shard).column("key").to_pylist()
        files[f"data/{shard_name(provenance, shard)}"] = path
    check_order(folder, provenance, keys)
    if provenance.options.has_maps:
        files[PICTURE] = map_picture(folder, provenance)
    return publish(
        Publication(
            repo_id=repo_id,
            repo_type="dataset",
            files=files,
            card=dataset_card(provenance, repo_id, score),
            marker="manifest.json",
            marker_key="shard_rows",
            stale=lambda name: name in (PICTURE, SCORE) or (name.startswith("data/") and name.endswith(".parquet")),
            message=_title(manifest),
            held_instead=lambda there: _held_instead(manifest, there),
            private=private,
            overwrite_card=overwrite_card,
            replace=replace,
            create_pr=create_pr,
            timeout_s=timeout_s,
        )
    )


def _title(manifest: Manifest) -> str:
    """Return what a commit or pull request is called: the same for a store that has grown."""
    dataset, content = manifest.dataset, manifest.options.content
    return f"{content[:1].upper()}{content[1:]} of {manifest.teacher.name} for {dataset.name}, split {dataset.split}"


def _held_instead(ours: Manifest, there: Mapping[str, Any]) -> str | None:
    """Return whose maps a manifest on the Hub is of, where these are of a teacher, data set or split of another name.

    Other weights of the teacher, or other images of the split, are a newer state of the same; another architecture of
    the teacher, or other classes, are another of that name: of a folder only the last part is told.
    """
    held = {"data set": ("dataset", "name"), "split": ("dataset", "split"), "teacher": ("teacher", "name")}
    held |= {"method": ("options", "method")}
    for what, (part, name) in held.items():
        mine, theirs = getattr(getattr(ours, part), name), there.get(part)
        found = theirs.get(name, "ig" if what == "method" else None) if isinstance(theirs, dict) else mine
        if found != mine:
            return f"maps or logits of {what} {found!r}, these are of {mine!r}"
    dataset, teacher, architecture = there.get("dataset"), there.get("teacher"), ours.teacher.architecture
    if isinstance(dataset, dict) and (dataset.get("class_names") or []) != list(ours.dataset.class_names or ()):
        return f"maps or logits of another data set {ours.dataset.name!r}, of other classes"
    if isinstance(teacher, dict) and teacher.get("architecture", architecture) != architecture:
        return f"maps or logits of another teacher {ours.teacher.name!r}, a {teacher['architecture']!r}"
    return None


def _public(manifest: _Kind) -> _Kind:
    """Return a manifest or provenance; of a teacher or dataset in a local folder only the folder's own name is told."""
    dataset = replaced(manifest.dataset, name=public_dataset(manifest.dataset.name, manifest.dataset.revision))
    teacher = replaced(manifest.teacher, name=public_name(manifest.teacher.name))
    return replaced(manifest, dataset=dataset, teacher=teacher)


def repository_of(path: str | Path, revision: str | None) -> tuple[str, str | None] | None:
    """Return (repo id, revision) where `path` names a dataset of the Hub, None where it is a folder.

    A folder that exists wins; "user/name", "user/name@revision" and the same after "hf-hub:" are names.

    Raises:
        InputError: a revision of a folder, or two revisions.
    """
    name, at, named = str(path).removeprefix("hf-hub:").partition("@")
    is_name = isinstance(path, str) and "/" in name and is_repo_id(name) and bool(at) == bool(named)
    if not is_name or Path(path).exists():
        if revision is not None:
            raise InputError(
                f"revision {revision!r} is of a dataset on the Hub, but {str(path)!r} is a folder; leave it out"
            )
        return None
    if named and revision and named != revision:
        raise InputError(f"{path!r} names revision {named!r}, and revision is {revision!r}; give one of them")
    return name, revision or named or None


def fetch_maps(repo_id: str, revision: str | None = None, timeout_s: float = TIMEOUT_S) -> Path:
    """Return the folder of a store on the Hub in the local cache, downloaded where it is not there yet.

    Raises:
        RunError: no such dataset, no access, or no network and not in the cache. InputError: no map store.
    """

    def download() -> str:
        return snapshot_download(
            repo_id, repo_type="dataset", revision=revision, allow_patterns=STORE_FILES, library_name="timm-igkd"
        )

    label = repo_label(repo_id, "dataset")
    try:
        with cached_revision_is_kept(repo_id, "dataset", revision), hub_session(timeout_s), cache_use_is_told(label):
            folder = Path(with_retries(download, label, timeout_s))
    except RunError as error:
        raise RunError(f"{error} (there is no folder {repo_id!r} either)") from error
    try:
        require_complete(folder)
    except (InputError, MissingFileError) as error:
        raise InputError(f"{label} is no complete map store ({error}); push one with: timm-igkd push-maps") from error
    return folder
