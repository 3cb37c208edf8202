"""An ONNX file in int8: onnxruntime's static quantisation, in the QDQ form that every runtime reads."""

import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
from timm_igkd.random_streams import fixed_noise

_WEIGHTED = ("Conv", "Gemm", "MatMul")
_BATCH = 32
MOST_VERIFIED = 1000
"""Images that verify a file where no test split is named."""
_WORTH = 0.9  # of the divergence: for less the last layer, in float the larger part of many a student, is not kept


def quantise(
    source: Path, target: Path, batches: Iterable[Tensor], *, float_edges: bool = False, per_channel: bool = True
) -> None:
    """Write the int8 file of an ONNX file.

    Activations are uint8 over the range of their extremes in `batches`, one scale each: with int8 ones onnxruntime's
    x86 kernels are hardly faster than float. Weights are int8 with one scale per output channel: one for all of a layer
    costs a MobileNet 7 points of top1 (docs/edge.md). Weights that the source computes, such as standardised ones, are
    made constants first.

    Args:
        source: float32, of input `image`.
        target: to write.
        batches: (N, C, H, W) float32 each, as the model takes them.
        float_edges: leave first and last layers with weights in float, see `edge_layers`, where there are others.
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
            _fold_weights(shaped)
            layers, edges = weighted_layers(proto := onnx.load(shaped)), edge_layers(proto)
            quantize_static(
                shaped,
                target,
                Batches(),
                per_channel=per_channel,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=edges if float_edges and set(layers) - set(edges) else [],
            )
        except Exception as error:  # of onnx and onnxruntime, each with types of its own
            raise RunError(f"the file cannot be quantised: {first_line(error)}; export it without int8") from error
        finally:
            shaped.unlink(missing_ok=True)


def _fold_weights(path: Path) -> None:
    """Make constants of the weights and biases that a file computes; as results of its nodes they would be activations.

    The exporter folds small tensors alone; others, such as position tables, stay as they are: folded they would grow.
    """
    from onnxscript import ir, optimizer

    model = ir.load(path)
    constants, computed = set(model.graph.initializers.values()), set[str | None]()
    for node in model.graph:  # in the order of the data
        inputs = {value for value in node.inputs if value is not None}
        if node.op_type == "Constant" or (inputs and inputs <= constants):
            constants.update(node.outputs)
    weights = [value for node in model.graph if node.op_type in _WEIGHTED for value in node.inputs[1:]]
    left = [value for value in weights if value is not None and value in constants]
    while left:
        made_by = left.pop().producer()
        if made_by is not None and made_by.op_type != "Constant" and made_by.outputs[0].name not in computed:
            computed.update(value.name for value in made_by.outputs)
            left += [value for value in made_by.inputs if value is not None]
    if computed:
        limits = {"input_size_limit": sys.maxsize, "output_size_limit": sys.maxsize}
        optimizer.fold_constants(
            model, onnx_shape_inference=False, should_fold=lambda node: node.outputs[0].name in computed, **limits
        )
        optimizer.remove_unused_nodes(model)
        ir.save(model, path)


def check_quantisable(source: Path, input_size: Sequence[int]) -> None:
    """Raise RunError where an ONNX file cannot be quantised, in either way, or onnxruntime does not run the result.

    Args:
        source: float32, of any weights; files beside it are written and removed.
        input_size: (C, H, W) of the noise that it is calibrated with.
    """
    noise, target = fixed_noise(2, *input_size), source.with_suffix(".int8")
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


def edge_layers(proto: object) -> list[str]:
    """Return the first layer with weights of an ONNX model and the last: two where heads are averaged, as in DeiT."""
    graph, layers = proto.graph, weighted_layers(proto)  # type: ignore[attr-defined]
    made_by = {name: node for node in graph.node for name in node.output}
    ends = {node.output[0]: node for node in graph.node if node.name in layers}
    last = _upstream(made_by, [output.name for output in graph.output], ends) & ends.keys()
    before = set[str]().union(*(_upstream(made_by, ends[name].input, ()) for name in last))  # skipped blocks
    kept = {ends[name].name for name in last - before}
    return [name for name in layers if name == layers[0] or name in kept]


def _upstream(made_by: Mapping[str, Any], values: Iterable[str], ends: Collection[str]) -> set[str]:
    """Return the first outputs of all nodes that values are computed from, looking no further than those in `ends`."""
    left, seen = list(values), set[str]()
    while left:
        node = made_by.get(left.pop())
        if node is not None and node.output[0] not in seen:
            seen.add(node.output[0])
            left += [] if node.output[0] in ends else node.input
    return seen


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
        count: of it, to calibrate with, see `spread_indices`; as many others to compare with.
    """
    chosen = spread_indices(len(images), count, known_labels(images))[:2]
    calibrating, comparing = (FedBatches(model, Subset(images, one)) for one in chosen)
    with_edges = target.with_suffix(".edges")
    for float_edges, path in ((False, target), (True, with_edges)):
        quantise(source, path, calibrating, float_edges=float_edges)
        write_metadata(path, metadata)
    models = [model, load_onnx_model(target), load_onnx_model(with_edges)]
    with torch.inference_mode():  # an image is decoded once for all three
        answers = [[one(batch) for one in models] for batch in comparing]
    expected, whole, edges = (torch.cat(logits) for logits in zip(*answers, strict=True))
    divergences = [teacher_agreement(logits, expected)["teacher_kl"] for logits in (whole, edges)]
    better = divergences[1] < _WORTH * divergences[0]
    if better:
        os.replace(with_edges, target)
    with_edges.unlink(missing_ok=True)
    calibrated, compared = (images_of(images, len(one)) for one in chosen)
    return Quantisation(calibrated, compared, better, *divergences)


class FedBatches:
    """All images as the model takes them, in batches that are read anew each time they are gone through."""

    def __init__(self, model: nn.Module, images: Any):
        self.transform = create_transform(**model_data_config(model), is_training=False)
        self.images = images

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.images), _BATCH):
            batch = range(start, min(start + _BATCH, len(self.images)))
            yield torch.stack([self.transform(read_item(self.images, i)[0]) for i in batch])


def spread_indices(total: int, count: int, labels: np.ndarray | None = None) -> tuple[list[int], list[int], list[int]]:
    """Return the images to calibrate with, as many others to compare with, and others again to verify the file on.

    All are evenly spread over a split, see `evenly_spread`; the last are at most a thousand, none where all are taken.

    Args:
        total: images of the split.
        count: of each of the first two, at most a third of the split, of two images one.
        labels: [total] of the split, where they are known.
    """
    if total < 2:
        raise InputError(f"the calibration split has {total} images, expected at least two; name another")
    count = min(count, max(1, total // 3))
    calibrating = evenly_spread(total, count, labels)
    others = np.delete(np.arange(total), calibrating)
    comparing = others[evenly_spread(len(others), count, None if labels is None else labels[others])]
    left = np.setdiff1d(others, comparing)
    verifying = left[evenly_spread(len(left), MOST_VERIFIED, None if labels is None else labels[left])]
    return calibrating, comparing.tolist(), verifying.tolist()
