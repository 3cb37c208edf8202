"""Export a student: its files, verified against PyTorch, and the record of what was found."""

import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Subset

from timm_igkd.data.items import check_class_numbers, class_names, known_labels, refuse_among_images
from timm_igkd.data.labeled_images import LabeledImages
from timm_igkd.data.labels import evenly_spread
from timm_igkd.errors import InputError, check_count, check_images, check_kind, check_path, check_range
from timm_igkd.eval_mode import eval_mode, preprocessed_model
from timm_igkd.evaluation.evaluated_model import indices_for
from timm_igkd.evaluation.onnx_file import OPSET, require_onnx_packages, write_onnx
from timm_igkd.export.budget import Budget
from timm_igkd.export.int8 import MOST_VERIFIED, check_quantisable, quantise_best, spread_indices
from timm_igkd.export.record import (
    FILES,
    RECORD,
    ExportRecord,
    exported_before,
    onnx_environment,
    write_export_record,
)
from timm_igkd.export.verification import fastest, verify_files
from timm_igkd.files import given_path, output_file
from timm_igkd.models.loading import weights_hash
from timm_igkd.models.output_names import output_names
from timm_igkd.records import folder_written_apart


def export_student(
    model: nn.Module,
    out: str | Path,
    *,
    int8: bool = False,
    calibration: Any = None,
    calibration_images: int = 256,
    evaluation: Any = None,
    max_drop: float = 0.5,
    name: str | None = None,
    budget: Budget | None = None,
    progress: bool = True,
) -> ExportRecord:
    """Write a model's ONNX file, with `int8` a quantised one too; hold both against PyTorch and time them in turn.

    Logits and answers are compared on all of `evaluation`, else on up to a thousand images of `calibration` by which
    nothing was made, else on noise.

    Args:
        model: a timm classifier in float32, wrappers are taken off; its mode and device are the same afterwards.
        out: folder for the files and export.json, which comes last; an earlier export there is replaced, and what else
            is there stays.
        int8: also export in int8; needs `calibration`.
        calibration: map-style dataset of (PIL RGB image, label), of the training split; its classes are the outputs
            of a model that does not name them.
        calibration_images: of it, evenly spread.
        evaluation: the same of the test split, to measure top1 of the files; its labels may number the classes
            otherwise where it is a `LabeledImages`.
        max_drop: points of top1 that a file may lose against PyTorch.
        name: how the record calls the model; default: its architecture.
        budget: that the model was chosen for; a file beyond it is not recommended.
        progress: show progress bars where standard error is a terminal.

    Returns:
        The record. A file that lost more than `max_drop` is kept, and has `passed` false.

    Raises:
        InputTypeError: an argument of another kind, such as a model's name for a model.
        InputError: no `pretrained_cfg`, a package of the extra `onnx` is missing, int8 without images or with those of
            `evaluation`, classes that are not the model's, numbers out of range, an output that would replace something
            else than a file.
        RunError: the model cannot be exported or quantised, or the float file's logits are not PyTorch's.
    """
    model = preprocessed_model("model", model)
    _check_kinds(out, budget, calibration=calibration, evaluation=evaluation)
    require_onnx_packages("an export")
    if int8 and calibration is None:
        raise InputError("int8 needs images to calibrate with, of the training split; name them, or leave int8 out")
    calibration_images = check_count("calibration", calibration_images)
    check_range("max_drop", max_drop, 0, 100)
    folder = given_path("out", out)
    _check_output_folder(folder)
    for images in (calibration, evaluation):
        refuse_among_images(images, folder, "give another folder")
    if int8:
        check_calibration(calibration, evaluation)
    evaluation = _in_order_of(calibration, evaluation, model)
    names = _class_names(model, calibration, evaluation)
    with (
        eval_mode(model, device="cpu"),
        folder_written_apart(folder, RECORD, exported_before(folder)) as written,
    ):
        paths = {format: written / file for format, file in FILES.items() if int8 or format == "onnx"}
        described = write_onnx(model, paths["onnx"], names)
        quantisation = None
        if int8:
            files = paths["onnx"], paths["onnx-int8"]
            quantisation = quantise_best(model, *files, described, calibration, calibration_images)
        images = evaluation
        if evaluation is None and calibration is not None:
            images = Subset(calibration, _left_to_verify(calibration, calibration_images if int8 else 0))
        indices = None if images is None else _indices(model, calibration, images)
        verified = verify_files(
            model, paths, images, indices, max_drop, with_top1=evaluation is not None, progress=progress
        )
        record = ExportRecord(
            model=name or described.architecture,
            weights_sha256=weights_hash(model),
            opset=OPSET,
            metadata=described,
            verified_on=verified.images,
            pytorch_top1=verified.pytorch_top1,
            max_drop=max_drop,
            quantisation=quantisation,
            exports=verified.files,
            recommended=fastest(verified.files, budget),
            passed=all(file.passed is not False for file in verified.files),
            environment=onnx_environment(),
            budget=budget,
        )
        write_export_record(written, record)
    return record


def _check_kinds(out: Any, budget: Any, **datasets: Any) -> None:
    """Raise InputTypeError unless all but None are what they are called."""
    check_path("out", out)
    for name, images in datasets.items():
        if images is not None:
            check_images(name, images)
    if budget is not None:
        check_kind("budget", budget, Budget, "a Budget", "give Budget(max_latency_ms=…) or Budget(max_size_mb=…)")


def check_exportable(model: nn.Module, int8: bool = False) -> None:
    """Raise RunError where a model cannot be exported: asked before it is trained, whatever its weights.

    Args:
        model: in any mode, on any device.
        int8: also to int8, here with noise for images.
    """
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / FILES["onnx"]
        size = write_onnx(model, file).input_size
        if int8:
            check_quantisable(file, size)


def _check_output_folder(out: Path) -> None:
    """Raise InputError for a folder, there or not, whose files could not be written."""
    if not out.name or (out.exists() and not out.is_dir()):
        raise InputError(f"an export goes into a folder of its own, {str(out)!r} is none; give another")
    for file in (*FILES.values(), RECORD):
        output_file(out / file)


def _in_order_of(training: Any, other: Any, model: nn.Module) -> Any:
    """Return a data set whose labels number the classes as the training split's do; a model's own names say it too.

    Raises:
        InputError: a class that the training split lacks, or another number for one where labels cannot be counted
            anew.
    """
    names = None if training is None or other is None or output_names(model)[1] else class_names(training)
    if names is None or class_names(other) in (None, names):
        return other
    if isinstance(other, LabeledImages):
        return other.in_class_order(names)
    check_class_numbers(other, names, "of the calibration's images", "give both the same classes in one order")
    return other


def _class_names(model: nn.Module, *datasets: Any) -> tuple[str, ...] | None:
    """Return the names of the first dataset whose classes are the model's outputs in order; refuse other classes."""
    first = next((dataset for dataset in datasets if dataset is not None), None)
    found = [(class_names(one), _indices(model, first, one)) for one in datasets if one is not None]
    return next((names for names, indices in found if names is not None and indices is None), None)


def _indices(model: nn.Module, training: Any, images: Any) -> list[int] | None:
    """Return the model's output of each class; of numbered ones the training split says how many there are.

    A test split, or a part of it, may lack the last ones.
    """
    is_numbered = training is not None and class_names(training) is None and class_names(images) is None
    return indices_for(model, training if is_numbered else images)


def _left_to_verify(images: Any, calibrating: int) -> list[int]:
    """Return which images verify a file without a test split: others than it was made by, as far as there are more."""
    labels = known_labels(images)
    if not calibrating:
        return evenly_spread(len(images), MOST_VERIFIED, labels)
    _, compared, left = spread_indices(len(images), calibrating, labels)
    return left or compared


def check_calibration(images: Any, evaluation: Any) -> None:
    """Raise InputError where an int8 file would be calibrated on images that its accuracy is measured on.

    Of datasets that are not LabeledImages only the same object is known to be.
    """
    both = isinstance(images, LabeledImages) and isinstance(evaluation, LabeledImages)
    if evaluation is not None and (images is evaluation or (both and images.shares_images(evaluation))):
        raise InputError(
            "the images to calibrate with are those to measure accuracy on, which would be too good; name the training "
            "split to calibrate with"
        )
