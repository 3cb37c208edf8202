"""What a cell trains on: its maps, its teacher's logits, the images that are left; and maps of what it learnt."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from study_runs import rows_of

from studies import evaluation as study_evaluation
from studies.config import StudyConfig
from studies.data import StudyData
from studies.evaluation import map_correlation
from timm_igkd import MapStore
from timm_igkd.errors import InputError
from timm_igkd.models.loading import weights_hash


class Affine(torch.nn.Module):
    """weight * x + bias, a number per channel."""

    def __init__(self, weight: list[float], bias: list[float]):
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(torch.tensor(v).view(1, 3, 1, 1)) for v in (weight, bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x + self.bias


def test_arms_of_one_seed_start_from_the_same_weights(settings, tmp_path):
    config = StudyConfig(**settings)
    data = StudyData(config, torch.device("cpu"))
    first, same, other = (
        weights_hash(data.create_student(config.cells[cell], seed))
        for cell, seed in [("Student", 0), ("KD&IG", 0), ("KD", 1)]
    )
    assert first == same
    assert first != other


@pytest.mark.parametrize("name", ["corruption_images", "ig_images"])
def test_first_images_of_one_class_are_refused(settings, name):
    def prepare(number: int, labels: list[int]) -> None:
        config = StudyConfig(**settings | {"cells": {"Student": {}}, name: number})
        data = StudyData(config, torch.device("cpu"))
        images = replace(data.test.images, labels=torch.tensor(labels))
        data.__dict__["test"] = replace(data.test, images=images)
        data.prepare()

    by_class = [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(InputError, match=rf"the first 2 test images \({name}\) hold 1 of 4 classes.* set {name} to 8"):
        prepare(2, [0, 0, 0, 1, 2, 2, 3, 3])
    rare = [0, 0, 0, 0, 1, 0, 2, 3]
    for number, labels in ((4, rare), (4, by_class[::2] * 2), *((number, by_class) for number in (0, 7, 8, 100))):
        prepare(number, labels)


def test_random_teachers_maps_are_not_the_teachers(settings):
    config = StudyConfig(
        **settings
        | {"cells": {name: {"overlay_prob": 0.5, "overlay_source": name} for name in ("aligned", "random_teacher")}}
    )
    data = StudyData(config, torch.device("cpu"))
    data.prepare()
    own, random = (data.training_images(cell, 0).maps for cell in config.cells.values())
    assert not torch.equal(own, random)
    hashes = [data.maps_identity(cell)["maps_hash"] for cell in config.cells.values()]
    assert all(hashes)
    assert len(set(hashes)) == 2


def test_cells_of_other_maps_have_a_store_of_their_own_beside(run_study, settings):
    cells = {name: {"overlay_prob": 0.5, "map_method": name} for name in ("ig", "saliency")}
    cells["KD"] = {"distill_loss_weight": 0.1, "map_method": "saliency"}
    assert run_study(settings | {"cells": cells, "seeds": 2}).code == 0
    rows = {row["cell"]: row for row in rows_of(settings)}
    hashes = {name: row["maps_hash"] for name, row in rows.items()}
    assert hashes["ig"] == hashes["KD"] != hashes["saliency"]
    stores = {name: MapStore(Path(settings["work_dir"]) / name) for name in ("maps", "maps_saliency")}
    for cell, store in (("ig", "maps"), ("KD", "maps"), ("saliency", "maps_saliency")):
        means = [stores[store].levels(row).mean() for row in range(16)]
        assert [float(mean) for mean in rows[cell]["maps_means"].split()] == pytest.approx(means, abs=6e-4)
    assert [store.provenance.options.method for store in stores.values()] == ["ig", "saliency"]
    data = StudyData(StudyConfig(**settings | {"cells": cells}), torch.device("cpu"))
    own, other = (data.training_images(data.config.cells[name], 0).maps for name in ("ig", "saliency"))
    assert not torch.equal(own, other)


def test_shuffled_logits_are_those_of_other_images(settings):
    cells = {name: {"distill_loss_weight": 0.1, "logits": name} for name in ("aligned", "shuffled")}
    config = StudyConfig(**settings | {"cells": cells})
    data = StudyData(config, torch.device("cpu"))
    own, other = (data.training_images(cell, 0).logits for cell in config.cells.values())
    assert torch.equal(own.sort(0).values, other.sort(0).values)
    assert not (own == other).all(1).any()


def test_validation_images_are_cut_from_training_and_the_test_split_is_not_read(settings, monkeypatch):
    config = StudyConfig(**settings | {"evaluate_on": "validation", "train_limit": None, "test_split": "no such split"})
    data = StudyData(config, torch.device("cpu"))
    held_out, kept = data.test.images.images, data.training_images(config.cells["Student"], 0).images
    assert len(held_out) + len(kept) == 16
    assert len(held_out) == 2
    assert not any(torch.equal(image, other) for image in held_out for other in kept)


def test_ig_maps_start_from_the_same_picture_whatever_the_normalisation(settings):
    """A model that undoes another mean and std has the teacher's maps."""
    config = StudyConfig(**settings | {"ig_images": 3})
    data = StudyData(config, torch.device("cpu"))
    evaluator = study_evaluation.RunEvaluator(config, data)
    mean, std = data.teacher.pretrained_cfg["mean"], data.teacher.pretrained_cfg["std"]
    other = torch.nn.Sequential(
        Affine([1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]), data.teacher
    )
    other.pretrained_cfg = data.teacher.pretrained_cfg | {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    metrics, _ = evaluator.evaluate(other, config.cells["Student"])
    assert metrics["ig_correlation"] == pytest.approx(1, abs=1e-5)


def test_map_correlation_is_pearsons_and_0_for_constant_maps():
    maps = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    others = torch.stack([2 * maps[0] + 1, torch.rand(4, 5), torch.zeros(4, 5)])
    found = map_correlation(maps, others)
    assert found[0] == pytest.approx(1)
    assert found[1] == pytest.approx(np.corrcoef(maps[1].flatten(), others[1].flatten())[0, 1], abs=1e-6)
    assert found[2] == 0
