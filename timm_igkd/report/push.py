"""Students on the Hub: safetensors, config.json and a card in one commit, downloaded again and compared."""

import copy
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from timm_igkd.errors import InputError, MissingFileError, RunError, check_kind, listed
from timm_igkd.eval_mode import bare_model
from timm_igkd.files import given_path, read_mapping
from timm_igkd.hub.errors import with_retries
from timm_igkd.hub.transport import TIMEOUT_S, Publication, Pushed, check_repo_id, hub_session, publish, require_login
from timm_igkd.models.arguments import check_of_timm, model_data_config
from timm_igkd.models.loading import load_model, save_model, weights_hash
from timm_igkd.random_streams import fixed_noise
from timm_igkd.report.card import model_card
from timm_igkd.report.companions import (
    EVAL_RESULT,
    EXPORTS,
    LEFT_BEHIND,
    eval_result,
    exported_files,
    without_exports,
)
from timm_igkd.report.licenses import check_license, tell_license
from timm_igkd.report.run_facts import RunFacts, read_run

_SIGNATURE = "pushed_by"
"""Key of config.json by which a repository is known as an earlier push."""


def push_student(
    student: nn.Module | str | Path,
    repo_id: str,
    *,
    private: bool = False,
    overwrite_card: bool = False,
    replace: bool = False,
    create_pr: bool = False,
    maps_repo: str | None = None,
    seed_runs: Sequence[str | Path] = (),
    eval_task: str | None = None,
    license: str | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Pushed:
    """Publish a student so that `timm.create_model("hf-hub:user/name", pretrained=True)` loads it.

    Pushing again updates weights and card; where nothing changed, nothing is committed. The published student is
    downloaded into an empty cache and compared each time. What a run exported (its export/) goes along.

    Args:
        student: a run folder (its student/), a timm folder (config.json and weights), or a timm model.
        repo_id: user/name.
        private: create the repository private.
        overwrite_card: replace a card that was edited by hand on the Hub.
        replace: replace what the repository holds where it was not pushed from here.
        create_pr: open a pull request in place of a commit on main; the repository must be there.
        maps_repo: user/name of the maps or logits on the Hub that it learnt from, linked from the card.
        seed_runs: run folders that differ in their seed alone; the card then tells mean, spread and interval.
        eval_task: also file the run's top-1 accuracy under this task of its data set, a benchmark on the Hub.
        license: identifier of the Hub; None: that of the weights it started from, see `license_of_start`; of a model
            in memory, whose start is not known, "unknown".
        timeout_s: longest silence of the Hub before a request is given up and made again.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        MissingFileError: no student there.
        InputError: a student that timm cannot build, a bad name, metrics or an export of another student, `maps_repo`
            of a run that read no maps, or an `eval_task` without metrics on a data set of the Hub.
        RunError: no login, no access, no network, a repository that holds another model, or the download does not match
            what was pushed.
    """
    check_kind("student", student, (nn.Module, str, os.PathLike), "a folder or a timm model", "name a run's folder")
    if isinstance(student, nn.Module):
        student = bare_model(student)
        check_of_timm(student, "push_student")
    student = student if isinstance(student, nn.Module) else given_path("student", student)
    seed_runs = [given_path("each of seed_runs", run) for run in listed("seed_runs", seed_runs, "run folders")]
    if seed_runs and isinstance(student, nn.Module):
        raise InputError("runs of other seeds belong to a run folder, but the student is a model; leave them out")
    if license is not None:
        check_license(license)
    check_repo_id(repo_id, timeout_s)
    if maps_repo is not None:
        check_repo_id(maps_repo, option="--maps-repo")
    with tempfile.TemporaryDirectory() as temporary:
        folder, run = _prepare(student, Path(temporary) / "student", seed_runs)
        if maps_repo is not None and run.config and not run.reads_store:
            raise InputError(
                "--maps-repo links the maps or logits that a student learnt from, and this run read none; leave it out"
            )
        model: Any = load_model(f"local-dir:{folder}", role="student")
        files = _files(student, model, folder, run, eval_task)
        told = run if any(name.startswith(EXPORTS) for name in files) else without_exports(run)
        require_login(repo_id)
        pushed = publish(
            Publication(
                repo_id=repo_id,
                repo_type="model",
                files=files,
                card=model_card(model, repo_id, told, maps_repo=maps_repo, license=license),
                marker="config.json",
                marker_key=_SIGNATURE,
                held_instead=lambda there: _held_instead(model, there),
                stale=lambda name: name in LEFT_BEHIND,
                message=f"Student {model.pretrained_cfg['architecture']}",
                private=private,
                overwrite_card=overwrite_card,
                replace=replace,
                create_pr=create_pr,
                timeout_s=timeout_s,
            )
        )
    verify_published(model, pushed, timeout_s)
    if run.config and run.metrics is None:
        print(f"warning: {str(student)!r} has no metrics.json: the card tells no results", file=sys.stderr)
    return pushed


def _files(
    student: nn.Module | str | Path, model: nn.Module, folder: Path, run: RunFacts, eval_task: str | None
) -> dict[str, bytes | Path]:
    """Return all files but the card by their names on the Hub; errors as of `push_student`.

    Args:
        student: as it was given.
        model: the same, loaded.
        folder: with its config.json and model.safetensors.
        run: what is known of it.
        eval_task: of the run's data set, or None.
    """
    files: dict[str, bytes | Path] = {"model.safetensors": folder / "model.safetensors"}
    files["config.json"] = _signed(folder / "config.json")
    if eval_task is not None:
        files[EVAL_RESULT] = eval_result(run, eval_task)
    if run.metrics and run.metrics.weights_sha256 not in (None, weights_hash(model)):
        raise InputError(
            f"metrics.json of {str(student)!r} is of other weights than its student/; push the folder student/, "
            "which has no results, or evaluate it in a run of its own"
        )
    if not isinstance(student, nn.Module):
        files |= exported_files(Path(student) / "export", weights_hash(model), run)
    return files


def _held_instead(model: Any, there: Mapping[str, Any]) -> str | None:
    """Return what student a config.json on the Hub is of where it tells other classes apart; else ours is newer."""
    config = there.get("pretrained_cfg")
    names = there.get("label_names", config.get("label_names") if isinstance(config, dict) else None)
    if there.get("num_classes", model.num_classes) != model.num_classes:
        return f"a student of {there['num_classes']} classes, this one has {model.num_classes}"
    theirs, ours = _named(names), _named(model.pretrained_cfg.get("label_names"))
    if theirs and ours and theirs != ours:
        return f"a student of other classes ({min(theirs - ours, default='')!r})"
    return None


def _named(label_names: Any) -> set[str]:
    """Return the names of classes, by their numbers or in order; none of what is neither."""
    found = label_names.values() if isinstance(label_names, Mapping) else label_names
    return {str(name) for name in found} if isinstance(label_names, Mapping | list | tuple) else set()


def _signed(config: Path) -> bytes:
    """Return a config.json with what tells our pushes from those of others; timm reads past it."""
    return (json.dumps(read_mapping(config) | {_SIGNATURE: "timm-igkd"}, indent=2) + "\n").encode()


def _prepare(student: nn.Module | str | Path, empty: Path, seed_runs: Sequence[str | Path]) -> tuple[Path, RunFacts]:
    """Return a folder with config.json and model.safetensors, and what is known of the run."""
    if isinstance(student, nn.Module):
        described: Any = copy.copy(student)
        tell_license(described, "unknown")  # timm tells there that of the weights it has of this architecture
        save_model(described, empty)
        return empty, RunFacts()
    root = Path(student)
    if not root.is_dir():
        raise MissingFileError(f"no folder {str(root)!r}; expected a run folder or a timm folder with config.json")
    is_run = not (root / "config.json").exists()
    folder = root / "student" if is_run else root
    if not (folder / "config.json").exists():
        raise MissingFileError(
            f"{str(root)!r} holds neither student/config.json (a finished run) nor config.json (a timm folder); "
            "finish the run, or save the model with timm"
        )
    if seed_runs and not is_run:
        raise InputError(
            f"runs of other seeds belong to a run folder, but {str(root)!r} is a timm folder; leave them out"
        )
    run = read_run(root, [Path(other) for other in seed_runs]) if is_run else RunFacts()
    if (folder / "model.safetensors").exists():
        return folder, run
    save_model(load_model(f"local-dir:{folder}", role="student"), empty)
    return empty, run


def verify_published(model: nn.Module, pushed: Pushed, timeout_s: float = TIMEOUT_S) -> None:
    """Download a student that was just pushed into an empty cache and compare it with what was pushed.

    Raises:
        RunError: weights, preprocessing or outputs differ, or it cannot be downloaded.
    """

    def download() -> nn.Module:
        with tempfile.TemporaryDirectory() as cache:
            name = f"hf-hub:{pushed.repo_id}@{pushed.commit}"
            return timm.create_model(name, pretrained=True, cache_dir=cache).eval()

    with hub_session(timeout_s):
        found = with_retries(download, f"the Hub's model {pushed.repo_id!r}", timeout_s)
    problem = _difference(model, found)
    if problem:
        raise RunError(
            f"{pushed.repo_id!r} was pushed, but does not come back from the Hub as it is here: {problem}; do not use "
            f"commit {pushed.commit[:12]}, push again"
        )


def _difference(model: nn.Module, found: nn.Module) -> str | None:
    if weights_hash(model) != weights_hash(found):
        return "the weights differ"
    here, there = model_data_config(model), model_data_config(found)
    changed = [key for key in here if here[key] != there.get(key)]
    if changed:
        return f"{changed[0]} of the preprocessing is {there.get(changed[0])}, here {here[changed[0]]}"
    images = fixed_noise(2, *here["input_size"], draw=torch.randn)
    with torch.inference_mode():
        expected, output = model(images), found(images)
    if not torch.allclose(expected, output, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-12):
        return f"outputs differ by up to {float((expected - output).abs().max()):.3g} on a fixed input"
    return None
