"""The Hub's identifiers of licenses, as its documentation of repository cards lists them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from timm_igkd.errors import InputError, nearest
from timm_igkd.report.run_facts import Part, origin

OWN = "apache-2.0"
"""License of weights trained from a random start, unless the user names another."""
LICENSES = frozenset(
    """
    apache-2.0 mit openrail openrail++ bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 lgpl-lr isc h-research intel-research lppl-1.3c ms-pl apple-ascl
    apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
    """.split()
)


def check_license(name: str) -> str:
    """Return an identifier of the Hub's list; an InputError that offers the nearest for anything else."""
    if name not in LICENSES:
        raise InputError(
            f"license must be an identifier of the Hub's list such as apache-2.0, got {name!r}"
            f"{nearest(name, sorted(LICENSES))}; one that is not listed is 'other'"
        )
    return name


def license_of_start(pretrained_cfg: Mapping[str, Any], config: Mapping[str, Any], part: Part = "student") -> str:
    """Return the license that a model's weights stand under by what they started from.

    Args:
        pretrained_cfg: of the model; timm tells in it the license of pretrained weights.
        config: of its run; empty: nothing is known of the start, so the license that `pretrained_cfg` tells holds.
        part: which model of the run it is.

    Returns:
        apache-2.0 after a random start, "unknown" where nothing is told; see `license_metadata` for what the Hub does
        not list.
    """
    found = origin(config, part) if config else "pretrained"
    if found == "teacher":
        found = origin(config, "teacher")
    if found == "random":
        return OWN
    return (pretrained_cfg.get("license") if found == "pretrained" else None) or "unknown"


def license_metadata(license: str) -> dict[str, Any]:
    """Return the metadata of a card for a license: one that the Hub does not list goes by its name."""
    return {"license": license} if license in LICENSES else {"license": "other", "license_name": license}


def tell_license_of_start(model: nn.Module, config: Mapping[str, Any], part: Part) -> None:
    """Note in the `pretrained_cfg` of a run's model the license that it has by its start, see `license_of_start`."""
    pretrained_cfg: Any = model.pretrained_cfg
    tell_license(model, license_of_start(pretrained_cfg, config, part))


def tell_license(model: nn.Module, license: str) -> None:
    """Note in a model's `pretrained_cfg` which license its weights stand under, and so in what is saved of it."""
    model.pretrained_cfg = {**model.pretrained_cfg, "license": None if license == "unknown" else license}  # type: ignore
