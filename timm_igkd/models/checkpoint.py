"""Names and weights: where they lead, read without running their code; one line for what timm and the Hub raise."""

import argparse
import functools
import os
import pickle
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models import clean_state_dict
from torch import Tensor

from timm_igkd.errors import InputError, InputTypeError, MissingFileError, RunError, UserError, first_line, nearest
from timm_igkd.hub.errors import hub_error
from timm_igkd.hub.weights import WEIGHT_FILES, cached_file, fetch_file, fetch_url, url_file
from timm_igkd.models.folder_config import models_of_run, read_folder_config

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pth.tar")
_RAW_KEYS, _EMA_KEYS = ("state_dict", "model"), ("state_dict_ema", "model_ema")  # of timm's checkpoints
_NO_MODEL = "has no timm config.json and weights; choose a repository of a timm model"


def flag_name(role: str, option: str) -> str:
    """Return the command line's name of an option of the model that plays `role`."""
    if role == "model":
        return "--model-args" if option == "args" else f"--{option}"
    return f"--{role}-{option}"


def has_weights(spec: str) -> bool:
    """Return whether a name promises weights: folders and repositories do, timm's may not, one unknown is no answer."""
    if ":" in spec or not timm.is_model(spec):
        return True
    try:
        cfg = timm.get_pretrained_cfg(spec)
    except RuntimeError:  # an unknown tag
        return True
    return bool(cfg and cfg.has_weights)


def expand_home(spec: str) -> str:
    """Return a model's name with `~` in the folder of local-dir: as the home folder, which no shell does there."""
    source, separator, rest = spec.partition(":")
    return f"{source}:{os.path.expanduser(rest)}" if source == "local-dir" and separator else spec


def check_spec(spec: Any, role: str, needs_weights: bool) -> str:
    """Return a model's name, `~` in it as the home folder.

    Args:
        spec: a timm name, `hf-hub:user/name` or `local-dir:folder`.
        role: whose flags an error names.
        needs_weights: the architecture alone is not enough.

    Raises:
        InputTypeError: no text. InputError, MissingFileError: a name that leads nowhere on this machine.
    """
    if not isinstance(spec, str):
        remedy = f"local-dir:{spec}" if isinstance(spec, os.PathLike) else "hf-hub:user/name or local-dir:folder"
        raise InputTypeError(f"{role} must be a timm name, got {type(spec).__name__}; give one, or {remedy}")
    spec = expand_home(spec)
    source, separator, rest = spec.partition(":")
    if not separator:
        _check_registered(spec, role, needs_weights)
    elif source == "local-dir":
        _check_folder(Path(rest), role, needs_weights)
    elif source != "hf-hub" or not rest:
        raise InputError(f"model {spec!r} is neither a timm name nor hf-hub:user/name nor local-dir:folder")
    return spec


def _check_registered(name: str, role: str, needs_weights: bool) -> None:
    if name.endswith(".onnx"):
        raise InputError(f"{name!r} is an exported file, which only evaluate reads; name the model it was made from")
    path = Path(os.path.expanduser(name))
    if not timm.is_model(name) and os.path.isfile(path):
        raise InputError(_file_for_model(path, role))
    if not timm.is_model(name) and os.path.isdir(path):
        raise InputError(f"model {name!r} is a folder; write {models_of_run(path) or f'local-dir:{path}'}")
    if "/" in name or "\\" in name:
        raise InputError(f"model {name!r} looks like a path or a Hub id; write local-dir:{name} or hf-hub:{name}")
    if not timm.is_model(name):
        hint = nearest(name.split(".")[0], timm.list_models())
        raise InputError(f"unknown model {name!r}{hint}; timm.list_models() shows the names")
    architecture = name.split(".")[0]
    tagged = timm.list_models(f"{architecture}.*", include_tags=True)
    if name != architecture and name not in tagged:
        raise InputError(f"unknown pretrained tag in {name!r}{nearest(name, tagged)}; {architecture} has {tagged}")
    if needs_weights and not has_weights(name):
        raise InputError(f"timm has no pretrained weights for {name!r}; give {flag_name(role, 'checkpoint')} FILE")


def _file_for_model(path: Path, role: str) -> str:
    """Return what to say to a file in a model's place."""
    if (path.parent / "config.json").is_file():
        return f"model {str(path)!r} is a file of a model's folder; write local-dir:{path.parent}"
    flag = flag_name(role, "checkpoint")
    return f"model {str(path)!r} is a file; name the timm model whose weights it holds, and give it by {flag} {path}"


def _check_folder(folder: Path, role: str, needs_weights: bool) -> None:
    if os.path.isfile(folder):
        raise InputError(_file_for_model(folder, role))
    read_folder_config(folder)
    if needs_weights and not any(file.name.endswith(_WEIGHT_SUFFIXES) and file.is_file() for file in folder.iterdir()):
        raise MissingFileError(f"model folder {str(folder)!r} has no weights; expected model.safetensors")


def start_files(spec: str, checkpoint: str | Path | None = None) -> list[Path]:
    """Return the files on this machine that a model's weights come from; none where a Hub's file is not cached."""
    source, _, rest = expand_home(spec).partition(":")
    own = [] if checkpoint is None else [Path(os.path.expanduser(checkpoint))]
    if source == "local-dir":
        files = sorted(path for path in Path(rest).glob("[!.]*") if path.is_file() and _is_of_model(path.name))
        return [*files, *own]
    if own:
        return own
    repo_id, _, revision = rest.partition("@")
    url = ""
    if source != "hf-hub":
        repo_id, url = _origin(spec)
    found = cached_file(repo_id, WEIGHT_FILES, revision or None) if repo_id else url_file(url) if url else None
    return [] if found is None or not found.exists() else [found]


def _is_of_model(name: str) -> bool:
    return name == "config.json" or name.endswith(_WEIGHT_SUFFIXES)


def fetch_weights(name: str) -> Path | None:
    """Return the file of a timm name's weights, downloaded where it is not on this machine; None: timm has none.

    Raises:
        what `fetch_file` and `fetch_url` raise.
    """
    repo_id, url = _origin(name)
    return fetch_file(repo_id, WEIGHT_FILES) if repo_id else fetch_url(url) if url else None


def _origin(name: str) -> tuple[str, str]:
    """Return the repository of a timm name's weights, else their address, else two empty texts."""
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    url = known.url if known and isinstance(known.url, str) else ""
    return (known.hf_hub_id or "", url) if known else ("", "")


def read_checkpoint(file: Path, use_ema: bool, role: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or of timm's .pth.tar, without running what it holds.

    Args:
        file: the checkpoint.
        use_ema: take the EMA weights of a .pth.tar, an error where it has none.
        role: whose flags an error names.

    Raises:
        MissingFileError: no such file.
        InputError: corrupt file, pickled code, no tensors.
    """
    if not file.is_file():
        raise MissingFileError(f"no checkpoint file {str(file)!r} ({flag_name(role, 'checkpoint')})")
    if file.suffix == ".safetensors":
        if use_ema:
            raise InputError(f"{str(file)!r} is safetensors, which holds no separate EMA weights; leave use_ema out")
        with translated_errors(str(file), role, weights=str(file)):
            return clean_state_dict(safetensors.torch.load_file(file))
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's checkpoints carry their arguments
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, OSError) as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"holds pickled code ({code[1]}), never run" if code else "is corrupt or no PyTorch checkpoint"
        raise InputError(f"checkpoint {str(file)!r} {reason}; save its weights as safetensors") from error
    weights = content
    if isinstance(content, dict):
        raw, averaged = ([key for key in keys if content.get(key) is not None] for keys in (_RAW_KEYS, _EMA_KEYS))
        if use_ema and not averaged:
            raise InputError(f"checkpoint {str(file)!r} holds no EMA weights; leave use_ema out")
        found = averaged if use_ema else raw
        weights = content[found[0]] if found else content
        if raw and averaged and not use_ema:
            _note_ema(str(file), flag_name(role, "use-ema"))
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise InputError(f"checkpoint {str(file)!r} holds no state dict of tensors; save model.state_dict()")
    return clean_state_dict(weights)


@functools.cache  # a run reads a checkpoint several times
def _note_ema(file: str, flag: str) -> None:
    print(
        f"note: {file} holds weights and their moving average (EMA); the weights are taken, {flag} takes it",
        file=sys.stderr,
    )


@contextmanager
def translated_errors(spec: str, role: str, weights: str | None = None) -> Iterator[None]:
    """Turn what timm, the Hub's client and safetensors raise into one line; a message never quotes theirs on access."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise _one_line_error(error, spec, role, weights) from error


def _one_line_error(error: Exception, spec: str, role: str, weights: str | None) -> UserError:
    found = hub_error(error, repr(spec), missing_file=_NO_MODEL)
    if found is not None:
        return found
    if isinstance(error, SafetensorError | pickle.UnpicklingError | EOFError) or "weights_only=True" in str(error):
        return InputError(
            f"the weights of {weights or spec!r} are corrupt or pickled code; use a sound safetensors file"
        )
    if "loading state_dict" in str(error) or "inconsistent with input_size" in str(error):
        return _mismatch_error(error, spec, role, weights)
    if isinstance(error, OSError):
        return RunError(f"cannot fetch or read {spec!r} ({type(error).__name__}); check the network and the disk")
    text = f"{type(error).__name__}: {first_line(error)}"
    return InputError(f"model {spec!r} cannot be built ({text}); correct {flag_name(role, 'args')} or its config.json")


def _mismatch_error(error: Exception, spec: str, role: str, weights: str | None) -> InputError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    detail = (lines[1] if len(lines) > 1 else lines[0])[:200]
    origin = f"the weights in {weights!r} do not fit" if weights else "the stored weights do not fit"
    remedy = f"give the model they were trained as, by name and {flag_name(role, 'args')}"
    sizes = re.findall(r"size mismatch for (\S+)\.(?:weight|bias): [^\n]*?Size\(\[(\d+)", str(error))
    if len({name for name, _ in sizes}) == 1 and "key(s)" not in str(error):
        remedy += f", for instance num_classes={sizes[0][1]}"
    return InputError(f"{origin} model {spec!r} ({detail}); {remedy}")
