"""Cards of the Hub: filled from a template, with a mark by which a card that was edited by hand is told apart."""

import hashlib
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import RepoCard

from timm_igkd.errors import MissingFileError, without_credentials
from timm_igkd.hub.client import quiet
from timm_igkd.hub.names import is_repo_id

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "templates", _PACKAGE.parent / "hub" / "templates")  # of a wheel, of a checkout
_OVERLAY_PAPER, _DISTILLATION_PAPER = "2506.14440", "1503.02531"  # on arXiv
_MARK = re.compile(r"\s*<!-- made by timm-igkd, sha256 ([0-9a-f]{16}) -->\s*\Z")


def read_template(name: str) -> str:
    """Return a card template: beside the package in a wheel, from hub/templates in a checkout.

    Raises:
        MissingFileError: in neither place; the installation is not whole.
    """
    for folder in _FOLDERS:
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    raise MissingFileError(
        f"card template {name!r} is in none of {[str(folder) for folder in _FOLDERS]}; reinstall timm-igkd"
    )


def citations(method_paper: str | None) -> str:
    """Return BibTeX of the papers that a card builds on: of the overlay, of an attribution method, of distillation.

    Args:
        method_paper: the method's number on arXiv; None: no map was used.
    """
    entries = read_template("citations.bib").strip().split("\n\n")
    cited = [f"eprint = {{{number}}}" for number in (_OVERLAY_PAPER, method_paper, _DISTILLATION_PAPER) if number]
    return "\n\n".join(entry for entry in entries if any(number in entry for number in cited))


class Markdown(str):
    """Text that is Markdown already; any other text that a template puts out is escaped."""


def render_card(template: str, **values: Any) -> str:
    """Fill a template and sign the result. Whatever text is filled in is escaped, here and nowhere else.

    Args:
        template: file name under hub/templates. Filters: `code` (inline code), `cell` (a table's cell), `verbatim`
            (inside a code block), `markdown` (text of our own that holds marks).
        values: what it uses; a missing one is an error.
    """
    from jinja2 import Environment, StrictUndefined  # here: who only trains does without

    environment = Environment(
        autoescape=False,  # that of jinja is HTML's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_escaped,
    )
    environment.filters |= {"code": code, "cell": cell, "verbatim": verbatim, "markdown": Markdown}
    return sign(environment.from_string(read_template(template)).render(**values))


def _escaped(value: Any) -> Any:
    return _plain(value) if isinstance(value, str) and not isinstance(value, Markdown) else value


def sign(card: str) -> str:
    """Append the hash by which `is_untouched` knows the card."""
    return f"{card.rstrip()}\n\n<!-- made by timm-igkd, sha256 {_digest(card)} -->\n"


def is_untouched(card: str) -> bool:
    """Return whether a card is one of ours as it was written; line ends and outer white space do not count."""
    text = card.replace("\r\n", "\n")
    found = _MARK.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def is_ours(card: str) -> bool:
    """Return whether a card is one of ours, edited or not."""
    return _MARK.search(card.replace("\r\n", "\n")) is not None


def metadata(card: str) -> dict[str, Any]:
    """Return the metadata of a card's first lines; empty where there is none that can be read."""
    with quiet("huggingface_hub"):  # it warns of a card without
        try:
            return RepoCard(card, ignore_metadata_errors=True).data.to_dict()
        except (ValueError, yaml.YAMLError):
            return {}


def _digest(card: str) -> str:
    return hashlib.sha256(card.replace("\r\n", "\n").strip().encode()).hexdigest()[:16]


def code(value: Any) -> Markdown:
    """Return a value as inline code of Markdown, on one line, also inside a table."""
    return Markdown("`" + verbatim(value).replace("|", "\\|") + "`")


def verbatim(value: Any) -> Markdown:
    """Return a value as text of a code block: one line that cannot end the block."""
    return Markdown(" ".join(str(value).replace("`", "'").split()))


def cell(value: Any) -> Markdown:
    """Return a value as plain text of Markdown, also of a table's cell: no mark and no HTML of its own."""
    return value if isinstance(value, Markdown) else _plain(str(value).strip())


def _plain(text: str) -> Markdown:
    """Return text without marks; spaces at its ends stay, for a template's own words have some."""
    spaced = re.sub(r"[ \t\r\n\f\v]+", " ", text)  # thin spaces before units stay
    return Markdown(re.sub(r"([\\`*_|<>\[\]])", r"\\\1", spaced))


def public_name(name: str) -> str:
    """Return the name of a model or file as a card shows it: of a local path, relative or not, only the last part.

    Of "." and ".." that is the name of the folder that they mean here.
    """
    name = without_credentials(name)
    path = name.removeprefix("local-dir:")
    if not path or name.startswith("hf-hub:") or "://" in name:
        return name
    last = Path(path).name
    return (Path(path).resolve().name or "/") if last in ("", "..") else last


def public_dataset(name: str, revision: str | None) -> str:
    """Return the name of a dataset as a card shows it: the id of one of the Hub, else the last part of its path."""
    return hub_dataset_id(name, revision) or public_name(name)


def hub_dataset_id(name: str, revision: str | None) -> str | None:
    """Return the Hub id of a dataset, None for a local one; only a dataset of the Hub has a resolved revision."""
    from_hub = name.startswith("hfds/") and not Path(name).exists()
    name = name.removeprefix("hfds/")
    return name if (from_hub or revision) and is_repo_id(name) else None
