"""What a student may cost; read by the command line, so nothing heavy is imported here."""

import sys
from dataclasses import dataclass

from timm_igkd.errors import InputError

AUTO = "auto"
"""The student of a run that is to be chosen for a budget."""


@dataclass(frozen=True)
class Budget:
    """Limits of a student's ONNX file, at least one of the two.

    Attributes:
        max_latency_ms: of one image, on one thread of this machine in onnxruntime.
        max_size_mb: of the file, in 10^6 bytes.
        int8: the int8 file may be the one within the limits, where it is.

    Raises:
        InputError: no limit, or one that is not above 0 and finite.
    """

    max_latency_ms: float | None = None
    max_size_mb: float | None = None
    int8: bool = False

    def __post_init__(self) -> None:
        limits = {name: value for name, value in vars(self).items() if name != "int8" and value is not None}
        if not limits:
            raise InputError("students are chosen for a budget, got none; give --max-latency-ms X or --max-size-mb X")
        for name, value in limits.items():
            if not 0 < value <= sys.float_info.max:
                raise InputError(f"{name} must be above 0 and finite, got {value:g}")

    def __str__(self) -> str:
        """Return the limits in words."""
        limits = ((self.max_latency_ms, "ms"), (self.max_size_mb, "MB"))
        return " and ".join(f"{value:g} {unit}" for value, unit in limits if value is not None)

    def allows(self, latency_ms: float, size_mb: float) -> bool:
        """Return whether a file is within the limits."""
        pairs = ((latency_ms, self.max_latency_ms), (size_mb, self.max_size_mb))
        return all(limit is None or value <= limit for value, limit in pairs)
