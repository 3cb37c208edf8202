"""An ONNX file in int8: onnxruntime's static quantisation, in the QDQ form that every runtime reads."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import Subset

from timm_igkd.data.items import known_labels, read_item
from timm_igkd.data.labels import evenly_spread
from timm_igkd.errors import InputError, RunError, UserError, first_line
from timm_igkd.evaluation.metrics import teacher_agreement
from timm_igkd.evaluation.onnx_file import OnnxMetadata, open_session, quiet_libraries, write_metadata
from timm_igkd.evaluation.onnx_model import load_onnx_model
from timm_igkd.export.record import Quantisation, images_of
from timm_igkd.models.arguments import model_data_config

_WEIGHTED = ("Conv", "Gemm", "MatMul")
_BATCH = 32
MOST_VERIFIED = 1000
"""Images that verify a file where no test split is named."""
_WORTH = 0.9  # of the divergence: for less the last layer, in float the larger part of many a student, is not kept


def quantise(
    source: Path, target: Path, batches: Sequence[Tensor], *, float_edges: bool = False, per_channel: bool = True
) -> None:
    """Write the int8 file of an ONNX file.

    Activations are uint8 over the range of their extremes in `batches`, one scale each: with int8 ones onnxruntime's
    x86 kernels are hardly faster than float. Weights are int8 with one scale per output channel: one for all of a layer
    costs a MobileNet 7 points of top1 (docs/edge.md).

    Args:
        source: float32, of input `image`.
        target: to write.
        batches: (N, C, H, W) float32 each, as the model takes them.
        float_edges: leave the first and the last layer with weights in float.
        per_channel: False for one scale per layer, to compare.

    Raises:
        RunError: onnxruntime cannot quantise the file.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, object] | None:
            batch = next(self.left, None)
            return None if batch is None else {"image": batch.numpy()}

    shaped = target.with_suffix(".shaped")
    with quiet_libraries():
        try:
            quant_pre_process(source, shaped, skip_optimization=True, skip_symbolic_shape=True)
            edges = weighted_layers(onnx.load(shaped))
            quantize_static(
                shaped,
                target,
                Batches(),
                per_channel=per_channel,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=[edges[0], edges[-1]] if float_edges and edges else [],
            )
        except Exception as error:  # of onnx and onnxruntime, each with types of its own
            raise RunError(f"the file cannot be quantised: {first_line(error)}; export it without int8") from error
        finally:
            shaped.unlink(missing_ok=True)


def check_quantisable(source: Path, input_size: Sequence[int]) -> None:
    """Raise RunError where an ONNX file cannot be quantised, in either way, or onnxruntime does not run the result.

    Args:
        source: float32, of any weights; files beside it are written and removed.
        input_size: (C, H, W) of the noise that it is calibrated with.
    """
    noise, target = torch.rand(2, *input_size, generator=torch.Generator().manual_seed(0)), source.with_suffix(".int8")
    try:
        for float_edges in (False, True):
            quantise(source, target, [noise], float_edges=float_edges)
            open_session(target).run(None, {"image": noise.numpy()})
    except UserError:
        raise
    except Exception as error:  # onnxruntime's own, of no common kind
        raise RunError(
            f"onnxruntime does not run the int8 file: {first_line(error)}; export it without int8"
        ) from error
    finally:
        target.unlink(missing_ok=True)


def weighted_layers(proto: object) -> list[str]:
    """Return the names of the layers with weights of an ONNX model, in the order of the data."""
    graph = proto.graph  # type: ignore[attr-defined]
    weights = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type in _WEIGHTED and node.input[1] in weights]


def quantise_best(
    model: nn.Module, source: Path, target: Path, metadata: OnnxMetadata, images: Any, count: int
) -> Quantisation:
    """Write the int8 file with all layers in int8, or with first and last in float if that is nearer to PyTorch.

    The rule: in float if that lowers the mean KL(PyTorch || file) on images that calibrated nothing by a tenth or more.

    Args:
        model: in eval mode on the CPU.
        source: its float32 file.
        target: to write.
        metadata: for the file.
        images: map-style dataset of (PIL RGB image, label).
        count: of it, to calibrate with; as many others to compare with.
    """
    chosen = spread_indices(len(images), count, known_labels(images))[:2]
    calibrating, comparing = (as_fed(model, Subset(images, one)) for one in chosen)
    with torch.inference_mode():
        expected = torch.cat([model(batch) for batch in comparing])
    found, with_edges = {}, target.with_suffix(".edges")
    for float_edges, path in ((False, target), (True, with_edges)):
        quantise(source, path, calibrating, float_edges=float_edges)
        write_metadata(path, metadata)
        quantised = load_onnx_model(path)
        logits = torch.cat([quantised(batch) for batch in comparing])
        found[float_edges] = teacher_agreement(logits, expected)["teacher_kl"]
    better = found[True] < _WORTH * found[False]
    if better:
        os.replace(with_edges, target)
    with_edges.unlink(missing_ok=True)
    n = sum(map(len, calibrating))
    return Quantisation(images_of(images, n), images_of(images, len(expected)), better, found[False], found[True])


def as_fed(model: nn.Module, images: Any) -> list[Tensor]:
    """Return all images as the model takes them, in batches."""
    transform = create_transform(**model_data_config(model), is_training=False)
    return list(torch.stack([transform(read_item(images, i)[0]) for i in range(len(images))]).split(_BATCH))


def spread_indices(total: int, count: int, labels: np.ndarray | None = None) -> tuple[list[int], list[int], list[int]]:
    """Return the images to calibrate with, as many others to compare with, and others again to verify the file on.

    All are evenly spread over a split, see `evenly_spread`; the last are at most a thousand, none where all are taken.

    Args:
        total: images of the split.
        count: of each of the first two, at most half of the split.
        labels: [total] of the split, where they are known.
    """
    count = min(count, total // 2)
    if count < 1:
        raise InputError(f"the calibration split has {total} images, expected at least two; name another")
    calibrating = evenly_spread(total, count, labels)
    others = np.delete(np.arange(total), calibrating)
    comparing = others[evenly_spread(len(others), count, None if labels is None else labels[others])]
    left = np.setdiff1d(others, comparing)
    verifying = left[evenly_spread(len(left), MOST_VERIFIED, None if labels is None else labels[left])]
    return calibrating, comparing.tolist(), verifying.tolist()
