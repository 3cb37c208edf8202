"""What the settings of a distillation may be, known before torch is imported."""

import math
from typing import Literal

from timm_igkd.errors import InputError, check_number

TeacherViewMode = Literal["same", "clean"]
"""What a teacher in the loop sees of an overlaid image: the overlay too, or the image without it."""
ExplanationMap = Literal["input_x_gradient", "grad_cam"]
"""How the student explains itself; both take one more gradient, and none along a path."""
JoinedChannels = Literal["abs_sum", "positive"]
"""How colour channels of input times gradient become one: as those of the store, whose signed maps are rectified."""


def check_temperature(temperature: float) -> float:
    """Return a softmax temperature; an InputError unless it is positive and finite."""
    check_number("temperature", temperature)
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be positive and finite, got {temperature:g}; the paper's is 2.5")
    return temperature
