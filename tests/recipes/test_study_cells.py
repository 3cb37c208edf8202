"""Which two cells are an overlay against none, or aligned maps against a control, and differ in nothing else."""

import pytest
from study_parts import IG, KD

from studies.cells import create_cell, is_aligned_against_control, is_overlay_against_none

EXPLAINED = {"explanation_loss_weight": 1}


def test_aligned_maps_at_another_setting_are_no_control():
    cell = create_cell("a", KD | IG)
    assert is_aligned_against_control(cell, create_cell("b", KD | IG | {"overlay_source": "blank"}))
    assert not is_aligned_against_control(cell, cell)
    assert not is_overlay_against_none(cell, cell)
    blank = KD | IG | {"overlay_source": "blank"}
    assert not is_aligned_against_control(cell, create_cell("b", blank | {"drop": 1}))
    assert is_aligned_against_control(cell, create_cell("b", blank | {"teacher_view": "same"}))
    live = create_cell("a", KD | IG | {"logits": "live"})
    assert not is_aligned_against_control(live, create_cell("b", blank | {"logits": "live", "teacher_view": "same"}))


@pytest.mark.parametrize(
    ("a", "b", "alone"),
    [
        (KD | IG, KD, True),
        (KD | IG | {"overlay_weight": 0.3, "overlay_max_power": 1.0}, KD, True),
        (KD | IG | {"map_method": "grad_cam"}, KD, True),
        (KD | IG, KD | {"overlay_source": "blank", "explanation_map": "grad_cam", "save": True}, True),
        (IG | {"temperature": 4, "loss_type": "dkd", "logits": "live"}, {"model_ema_decay": 0.5}, True),
        (KD | IG | {"teacher_view": "clean"}, KD | {"teacher_view": "same"}, True),
        (KD | IG | {"teacher_view": "clean", "logits": "live"}, KD | {"teacher_view": "same", "logits": "live"}, True),
        (KD | IG | {"temperature": 4}, KD, False),
        (KD | IG | {"model_ema_decay": 0.5, "model_ema": True}, KD | {"model_ema": True}, False),
        (KD | IG | EXPLAINED, KD, False),
        (KD | IG | EXPLAINED | {"map_method": "grad_cam"}, KD | EXPLAINED, False),
        (KD | IG | EXPLAINED, KD | EXPLAINED, True),
        (KD | IG | {"overlay_source": "blank"}, KD, False),
        (KD | IG, KD | {"overlay_prob": 0.2}, False),
        (KD | IG, {}, False),
    ],
)
def test_an_overlay_is_held_against_none_where_nothing_else_differs_in_the_runs(a, b, alone):
    assert is_overlay_against_none(create_cell("a", a), create_cell("b", b)) is alone
