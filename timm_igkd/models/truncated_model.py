"""A timm model without its tail, as a timm architecture of its own: `igkd_truncated`.

The base is cut with timm's `prune_intermediate_layers`; a new head pools its last kept features.
"""

import re
from typing import Any, cast

import timm
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from timm_igkd.errors import InputError, nearest
from timm_igkd.models.arguments import check_model_arguments
from timm_igkd.models.cifar_network import SingleTrunk, check_drop

_MOST_LEFT = 0.995
"""Share of a model's parameters that its truncation may have; one that has more is not cut."""

COPIED_CFG_KEYS = (
    "input_size", "test_input_size", "min_input_size", "fixed_input_size", "interpolation", "crop_pct", "test_crop_pct",
    "crop_mode", "mean", "std", "license",
)  # fmt: skip
"""Entries of the base's pretrained_cfg that hold for the truncated model: preprocessing, not weights or labels."""


def check_cuttable(model: nn.Module, name: str) -> None:
    """Raise InputError unless the model's intermediate features can be cut from the end."""
    missing = [m for m in ("forward_intermediates", "prune_intermediate_layers") if not hasattr(model, m)]
    if missing:
        raise InputError(f"{name} cannot be truncated: it has no {missing[0]}; choose a timm model that has it")
    if getattr(model, "num_branches", 1) > 1:  # CrossViT, HRNet
        raise InputError(
            f"{name} cannot be truncated: its {len(cast(list, model.feature_info))} intermediate features are parallel "
            "branches, not one after the other; choose a model with a single trunk"
        )


def below_base(names: Any) -> Any:
    """Put `base.` before one module name or several, as pretrained_cfg['first_conv'] holds them."""
    if isinstance(names, (list, tuple)):
        return tuple(f"base.{name}" for name in names)
    return f"base.{names}" if names else None


def _prefixed_pattern(pattern: str) -> str:
    """Anchor a group_matcher pattern below `base.`; timm matches at the start of a name, with or without ^."""
    return r"^base\.(?:" + re.sub(r"(?<!\[)\^", "", pattern) + ")"


class TruncatedModel(SingleTrunk):
    """A timm model without its last `drop` intermediate features, under a new head: pool, dropout, linear.

    Args:
        base: timm architecture to cut.
        base_args: arguments that build the base.
        drop: entries cut from the end of the base's `forward_intermediates` list.
        num_classes: outputs of the classifier, 0 for none.
        in_chans: image channels.
        img_size: input size of a base that fixes it.
        drop_rate: dropout before the classifier.
        global_pool: a pooling of timm's over the NCHW features, "" for none.

    Raises:
        InputError: unknown base, base that cannot be cut, `drop` out of range.
    """

    base: Any

    def __init__(
        self,
        base: str,
        base_args: dict[str, Any],
        drop: int,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] | None = None,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        size = {} if img_size is None else {"img_size": img_size}
        self.base = timm.create_model(base, **{**base_args, **size, "num_classes": 0, "in_chans": in_chans, **factory})
        check_cuttable(self.base, base)
        self.feature_info = [{**info, "module": below_base(info.get("module"))} for info in self.base.feature_info]
        entries = len(self.feature_info)
        check_drop("drop", drop, entries - 1, f"{base} has {entries} feature entries")
        self.base_name, self.base_args, self.drop = base, base_args, 0
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        whole = sum(parameter.numel() for parameter in self.base.parameters())
        self._cut([entries - drop - 1], prune_norm=True)
        left = sum(parameter.numel() for parameter in self.base.parameters())
        if drop > 0 and left > _MOST_LEFT * whole:  # CoaT
            raise InputError(
                f"{base} without its last {drop} feature entries keeps {100 * left / whole:.1f} % of its parameters: "
                "they are computed together with those before; drop more, or choose a model with a single trunk"
            )
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **factory)
        self.head_hidden_size = self.head.num_features

    def _cut(self, indices: list[int], prune_norm: bool) -> None:
        self.base.prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=True)
        self.drop += len(self.feature_info) - 1 - max(indices)
        self.feature_info = self.feature_info[: max(indices) + 1]
        self.num_features: int = self.feature_info[-1]["num_chs"]

    def group_matcher(self, coarse: bool = False) -> Any:
        """Return the base's patterns that group parameters by depth."""
        matcher = self.base.group_matcher(coarse=coarse) if hasattr(self.base, "group_matcher") else {}
        if callable(matcher):
            return lambda name: matcher(name.removeprefix("base.")) if name.startswith("base.") else (float("inf"),)
        return {
            group: [(_prefixed_pattern(entry[0]), entry[1]) for entry in spec]
            if isinstance(spec, (list, tuple))
            else spec and _prefixed_pattern(spec)
            for group, spec in matcher.items()
        }

    def no_weight_decay(self) -> set[str]:
        """Return the base's parameters that take no weight decay."""
        names = self.base.no_weight_decay() if hasattr(self.base, "no_weight_decay") else ()
        return {f"base.{name}" for name in names}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in the backward pass."""
        self.base.set_grad_checkpointing(enable)

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place; the pooling stays unless given."""
        self.num_classes = num_classes
        reference = next(self.base.parameters())
        self.head.reset(num_classes, global_pool, device=reference.device, dtype=reference.dtype)
        self.head_hidden_size = self.head.num_features

    def _intermediates(self, x: Tensor, indices: list[int], norm: bool, stop_early: bool, only: bool) -> Any:
        wanted = sorted({*indices} if only else {*indices, len(self.feature_info) - 1})
        options = {"norm": norm, "stop_early": True, "output_fmt": "NCHW", "intermediates_only": True}
        found = self.base.forward_intermediates(x, indices=wanted, **options)
        return found if only else (found[-1], [f for i, f in zip(wanted, found, strict=True) if i in indices])

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut what lies behind the last chosen feature, and the classifier; return the chosen indices."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        if max_index < len(self.feature_info) - 1:
            self._cut(take_indices, prune_norm)
            self.head.in_features = self.num_features
            prune_head = True
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the (B, C, H, W) last kept features."""
        last = [len(self.feature_info) - 1]
        return self.base.forward_intermediates(x, indices=last, stop_early=True, intermediates_only=True)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of features, or what the linear layer would see."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, num_classes) logits of (B, C, H, W) images."""
        return self.forward_head(self.forward_features(x))


def cut_cfg(cfg: dict[str, Any], first_conv: Any) -> dict[str, Any]:
    """Return a truncated model's pretrained_cfg: the preprocessing of `cfg`, no weights, no labels."""
    kept = {key: cfg[key] for key in COPIED_CFG_KEYS if cfg.get(key) is not None}
    return dict(kept, architecture="igkd_truncated", first_conv=first_conv, classifier="head.fc")


default_cfgs = generate_default_cfgs({"igkd_truncated": {"classifier": "head.fc"}})


@register_model
def igkd_truncated(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    base: str = "",
    base_args: dict[str, Any] | None = None,
    **kwargs: Any,
) -> TruncatedModel:
    """A timm model `base` without its last `drop` intermediate features; see `TruncatedModel`."""
    if not timm.is_model(base):
        known = timm.list_models()
        raise InputError(f"igkd_truncated needs base=<a timm architecture>, got {base!r}{nearest(base, known)}")
    check_model_arguments(base_args or {}, "base_args of igkd_truncated")
    base_args = dict(base_args or {})
    for key in ("img_size", "in_chans", "num_classes"):
        value = base_args.pop(key, None)
        if value is not None and kwargs.get(key) is None:
            kwargs[key] = value
    if not pretrained_cfg:
        registered = timm.get_pretrained_cfg(base)
        cfg = registered.to_dict() if registered else {}
        if base_args.get("dynamic_img_size") or base_args.get("strict_img_size") is False:
            cfg["fixed_input_size"] = False
        pretrained_cfg = dict(cut_cfg(cfg, below_base(cfg.get("first_conv"))), num_classes=cfg.get("num_classes", 1000))
    return build_model_with_cfg(
        TruncatedModel,
        "igkd_truncated",
        pretrained,
        pretrained_cfg=pretrained_cfg,
        feature_cfg={"out_indices": 1, "feature_cls": "getter"},
        base=base,
        base_args=base_args,
        **kwargs,
    )
