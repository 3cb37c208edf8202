"""All metrics of one run: clean, corrupted and foreign test images, calibration, agreement, IG similarity, cost."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from studies.cells import Cell
from studies.config import StudyConfig
from studies.data import StudyData
from studies.prediction import Evaluated, normalized, predict
from timm_igkd.attribution.chunk_size import activation_chunk
from timm_igkd.attribution.correlation import map_correlation
from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.ig_options import IGOptions
from timm_igkd.attribution.options import reduce_channels
from timm_igkd.errors import DivergedError
from timm_igkd.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from timm_igkd.evaluation.metrics import classification_metrics, teacher_agreement
from timm_igkd.models.loading import count_macs, count_parameters

_SIMILARITY_STEPS = 32


class RunEvaluator:
    """Evaluates students of one study; what depends on the teacher alone is computed once.

    Args:
        config: which evaluations are asked for.
        data: images and teacher.
    """

    def __init__(self, config: StudyConfig, data: StudyData):
        self.config, self.data = config, data
        self._teacher_maps: Tensor | None = None

    def evaluate(self, student: nn.Module, cell: Cell) -> tuple[dict[str, Any], Tensor]:
        """Return the metrics of a row and the predicted class of every test image, [n] int64 on the CPU.

        Args:
            student: on the data's device; left in eval mode.
            cell: what it was trained by.

        Raises:
            DivergedError: it gives a test image NaN or infinity.
        """
        test = self.data.test
        student.eval()
        logits = predict(student, test.images.images)
        if not logits.isfinite().all():  # the last step's doing, or the batch norms': no training loss saw it
            raise DivergedError("the trained student answers NaN or infinity", cell.epochs)
        metrics: dict[str, Any] = {"n_test": len(test.images)}
        metrics |= classification_metrics(logits.cpu(), test.images.labels.cpu())
        metrics |= self._against_teacher(logits, test)
        metrics |= self._cost(student, cell)
        metrics |= self._corruptions(student)
        metrics |= self._transfer(student)
        metrics |= self._similarity(student)
        return metrics, logits.argmax(1).cpu()

    def _against_teacher(self, logits: Tensor, test: Evaluated) -> dict[str, Any]:
        if test.teacher_logits is None:
            return {}
        hits = test.teacher_logits.argmax(1) == test.images.labels
        found = teacher_agreement(logits.cpu(), test.teacher_logits.cpu())
        return found | {"teacher_top1": 100 * hits.double().mean().item()}

    def _cost(self, student: nn.Module, cell: Cell) -> dict[str, Any]:
        parameters = count_parameters(student)
        found: dict[str, Any] = {"num_parameters": parameters, "macs": count_macs(student)}
        if self.config.latency:
            found |= self.data.latency_ms(cell)
        if self.data.teacher is not None:
            found["compression"] = count_parameters(self.data.teacher) / parameters
            found["teacher_macs"] = self.data.teacher_macs
            found |= self.data.teacher_latency_ms() if self.config.latency else {}
        return found

    def _corruptions(self, student: nn.Module) -> dict[str, Any]:
        count = min(self.config.corruption_images, len(self.data.test.images))
        if count == 0:
            return {}
        labels, found = self.data.test.images.labels[:count], {}
        for kind in CORRUPTIONS:
            for severity in SEVERITIES:
                hits = predict(student, self.data.corrupted(kind, severity)).argmax(1) == labels
                found[f"corruption/{kind}/{severity}"] = 100 * hits.double().mean().item()
        return {"corruption_top1": sum(found.values()) / len(found), "corruption_n": count} | found

    def _transfer(self, student: nn.Module) -> dict[str, Any]:
        """Student's and teacher's accuracy on other images of the same classes, over all their classes."""
        if self.data.transfer is None:
            return {}
        images, names = self.data.transfer.images, self.data.train.class_names
        hits = (predict(student, images.images).argmax(1) == images.labels).double().cpu()
        labels = images.labels.cpu()
        per_class = {int(label): 100 * hits[labels == label].mean().item() for label in labels.unique()}
        found = {}
        if self.data.transfer.teacher_logits is not None:
            teacher_hits = self.data.transfer.teacher_logits.argmax(1) == images.labels
            found["teacher_transfer_top1"] = 100 * teacher_hits.double().mean().item()
        return found | {
            "transfer_top1": 100 * hits.mean().item(),
            "transfer_balanced_top1": sum(per_class.values()) / len(per_class),
            "transfer_n": len(labels),
            "transfer_per_class": {names[label] if names else str(label): top1 for label, top1 in per_class.items()},
        }

    def _similarity(self, student: nn.Module) -> dict[str, Any]:
        """Mean correlation of the student's and the teacher's IG maps of the true class, image by image."""
        if self.data.teacher is None or self.config.ig_images == 0:
            return {}
        if self._teacher_maps is None:
            self._teacher_maps = self._maps(self.data.teacher)
        correlations = map_correlation(self._maps(student), self._teacher_maps)
        return {"ig_correlation": correlations.mean().item(), "ig_correlation_n": len(correlations)}

    def _maps(self, model: nn.Module) -> Tensor:
        """IG maps from black, the same picture for all models; 0 after normalisation would be another for each."""
        images = self.data.test.images.subset(torch.arange(min(self.config.ig_images, len(self.data.test.images))))
        inputs, device = normalized(model, images.images), self.data.device
        shape = tuple(inputs.shape[1:])
        chunk = activation_chunk(model, shape, device)
        engine = FastEngine(copy.deepcopy(model).eval(), IGOptions(n_steps=_SIMILARITY_STEPS), chunk, shape, device)
        black = normalized(model, torch.zeros_like(images.images[:1]))
        attribution = engine.attribute(inputs, black, images.labels, engine.forward(inputs))
        return reduce_channels(attribution.values, "abs_sum").cpu()
