"""What a training leaves of each epoch."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

from timm_igkd.files import write_atomic

# What a step gives, averaged over steps and processes. The order is that of the reduction over processes: a set's
# order would differ from process to process, and each number would be averaged with another.
TERMS = ("loss", "task_loss", "distill_loss", "attention_loss", "explanation_loss", "top1_train")


@dataclass(frozen=True)
class EpochRecord:
    """One epoch; what was not computed is None.

    Attributes:
        epoch: from 0.
        lr: the largest of the groups' rates at its last step.
        loss: mean of the weighted sum of the terms.
        task_loss: mean of cross-entropy over the labelled images, not weighted.
        distill_loss: mean of the distillation loss, not weighted.
        attention_loss: mean of the attention transfer loss, not weighted.
        explanation_loss: mean of the explanation loss, not weighted.
        top1_train: percent of the augmented training images that have labels; None where none has.
        val_loss: mean over the validation images, after the epoch.
        val_top1: percent of the validation images, after the epoch.
        seconds: of the training steps.
    """

    epoch: int
    lr: float
    loss: float
    task_loss: float | None = None
    distill_loss: float | None = None
    attention_loss: float | None = None
    explanation_loss: float | None = None
    top1_train: float | None = None
    val_loss: float | None = None
    val_top1: float | None = None
    seconds: float = 0.0

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "EpochRecord":
        """Return the record that `asdict` gave; terms that came later may be missing.

        Raises:
            ValueError: names or values of another kind.
        """
        names = {item.name for item in fields(cls)}
        if not names - {"explanation_loss"} <= set(content) <= names:
            raise ValueError(f"an epoch has the fields {sorted(content)}")
        for name, value in content.items():
            if not isinstance(value, int | float) and not (value is None and name not in ("epoch", "lr", "loss")):
                raise ValueError(f"{name} of an epoch is {value!r}")
        return cls(**content)

    def computed(self) -> dict[str, float]:
        """Return what was computed, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def write_history(path: Path, records: Sequence[EpochRecord]) -> None:
    """Write a CSV, one row per epoch; what was not computed is empty."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([item.name for item in fields(EpochRecord)])
    writer.writerows(astuple(record) for record in records)
    write_atomic(path, text.getvalue().encode())
