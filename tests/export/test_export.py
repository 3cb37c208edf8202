"""A student exported: files that are held against PyTorch, timed in turn and told of in one record."""

import hashlib
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import timm
import torch
from export_parts import SIZE, digits_student, smallest
from tiny_parts import NUMBERS, tiny_teacher

from timm_igkd import export_student, load_labeled_images
from timm_igkd.errors import InputError, InputTypeError, MissingFileError
from timm_igkd.evaluation.comparison import largest_share
from timm_igkd.evaluation.latency import Timing
from timm_igkd.evaluation.metrics import evaluate
from timm_igkd.evaluation.onnx_model import load_onnx_model
from timm_igkd.export import int8 as int8_module
from timm_igkd.export import verification
from timm_igkd.export.budget import Budget
from timm_igkd.export.int8 import weighted_layers
from timm_igkd.export.record import Images, read_export_record
from timm_igkd.models.loading import weights_hash
from timm_igkd.report.run_files import parse_metrics
from timm_igkd.report.tables import export_rows

pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.usefixtures("quick_timing"), pytest.mark.filterwarnings("ignore")]  # of torch's exporter


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return the record and the folder of a digits student in float and int8."""
    folder = tmp_path_factory.mktemp("digits") / "export"
    train, test = (load_labeled_images("digits", split) for split in ("train", "test"))
    options = {"calibration": train, "calibration_images": 64, "evaluation": test, "name": "reader"}
    return export_student(digits_student(), folder, int8=True, progress=False, **options), folder


@pytest.mark.slow
def test_digits_student_loses_nothing_in_float_and_little_in_int8(exported):
    record, _ = exported
    floats, int8 = record.exports
    assert record.pytorch_top1 > 85
    assert (floats.agreement, floats.drop) == (100, 0)
    assert floats.max_difference < 1e-4 < int8.max_difference
    assert (int8.passed, int8.agreement > 97) == (True, True)
    assert int8.size_mb < 0.6 * floats.size_mb
    assert record.passed


def test_exported_files_name_no_folder_of_this_machine(exported):
    record, folder = exported
    for file in record.exports:
        assert b".py" not in (folder / file.file).read_bytes()


def test_record_says_what_the_files_score(exported):
    record, folder = exported
    test = load_labeled_images("digits", "test")
    expected = evaluate(digits_student(), test, measure_latency=False, progress=False).metrics
    assert record.pytorch_top1 == expected["top1"]
    for file in record.exports:
        found = evaluate(load_onnx_model(folder / file.file), test, measure_latency=False, progress=False).metrics
        assert (file.top1, file.size_mb) == (found["top1"], found["size_mb"])
        assert file.drop == expected["top1"] - found["top1"]
        assert file.sha256 == hashlib.sha256((folder / file.file).read_bytes()).hexdigest()
    assert (record.model, record.weights_sha256) == ("reader", weights_hash(digits_student()))
    assert asdict(record.verified_on) == {"n": 360, "dataset": "digits", "split": "test"}
    assert record.metadata.class_names == tuple("0123456789")


def test_record_comes_back_equal_and_stands_beside_the_files_alone(exported):
    record, folder = exported
    assert read_export_record(folder) == record
    assert sorted(path.name for path in folder.iterdir()) == ["export.json", "model.onnx", "model_int8.onnx"]
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_metrics_of_a_run_get_one_entry_per_file(exported):
    record, _ = exported
    names = {"format", "file", "size_mb", "top1", "agreement", "latency_ms", "runtime", "passed", "recommended"}
    assert [entry["recommended"] for entry in record.metrics()].count(True) == 1
    assert [set(entry) for entry in record.metrics()] == [names, names]
    assert record.metrics()[1]["latency_ms"] == record.exports[1].latency_ms.median


def test_weights_are_int8_with_a_scale_per_channel(exported):
    import onnx

    record, folder = exported
    proto = onnx.load(folder / "model_int8.onnx")
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    made = {node.output[0]: node for node in proto.graph.node}
    layers = [node for node in proto.graph.node if node.op_type in ("Conv", "Gemm")]
    inner = layers[1:-1] if record.quantisation.float_edges else layers
    scales = [weights[made[node.input[1]].input[1]] for node in inner]
    assert all(weights[made[node.input[1]].input[0]].data_type == onnx.TensorProto.INT8 for node in inner)
    assert max(int(np.prod(scale.dims)) for scale in scales) > 1
    assert {tuple(scale.dims) for scale in scales} >= {(16,)}


@pytest.mark.parametrize("edges_are_better", [False, True])
def test_edges_stay_in_float_where_that_answers_more_like_pytorch(edges_are_better, exported, tmp_path, monkeypatch):
    def quantise(source, target, batches, *, float_edges):
        shutil.copy(source, target)
        if float_edges is not edges_are_better:
            negate_last_layer(target)

    monkeypatch.setattr(int8_module, "quantise", quantise)
    record, folder = exported
    source, target = folder / "model.onnx", tmp_path / "int8.onnx"
    digits = load_labeled_images("digits", "train")
    found = int8_module.quantise_best(digits_student(), source, target, record.metadata, digits, 8)
    assert found.float_edges is edges_are_better
    assert (found.divergence_float_edges < found.divergence) is edges_are_better
    assert [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]
    assert target.read_bytes() == source.read_bytes()


def negate_last_layer(path):
    import onnx

    proto = onnx.load(path)
    name = next(node.input[1] for node in reversed(proto.graph.node) if node.op_type == "Gemm")
    (weight,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
    weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), name))
    onnx.save(proto, path)


def test_float_edges_are_the_first_and_the_last_layer_with_weights(exported, tmp_path):
    import onnx

    source, target = exported[1] / "model.onnx", tmp_path / "edges.onnx"
    names = weighted_layers(onnx.load(source))
    int8_module.quantise(source, target, [torch.rand(4, 3, SIZE, SIZE)], float_edges=True)
    proto = onnx.load(target)
    weights = {tensor.name for tensor in proto.graph.initializer}
    floats = [node.name for node in proto.graph.node if node.name in names and node.input[1] in weights]
    assert floats == [names[0], names[-1]]


def test_int8_is_not_recommended_by_a_few_images_that_agree(exported, monkeypatch):
    _, folder = exported
    paths = {"onnx": folder / "model.onnx", "onnx-int8": folder / "model_int8.onnx"}
    monkeypatch.setattr(verification, "teacher_agreement", lambda *logits: {"agreement": 100.0})
    assert largest_share(0, 600) == pytest.approx(0.449, abs=1e-3)
    assert largest_share(0, 539) < 0.5 < largest_share(0, 538)  # docs/edge.md
    for most, passed in ((4.0, None), (4.1, True)):  # 0 of 64: 4.06 %
        files = verification.verify_files(
            digits_student(), paths, None, None, most, with_top1=False, progress=False
        ).files
        assert [file.passed for file in files] == [True, passed]


def test_a_model_without_logits_is_refused_for_what_it_is(tmp_path):
    with pytest.raises(InputError, match="the model has no classifier, its outputs are features"):
        export_student(timm.create_model("test_resnet", num_classes=0), tmp_path / "out", progress=False)

    class Pair(type(smallest())):
        def forward(self, images):
            return super().forward(images), images

    model = smallest()
    model.__class__ = Pair
    with pytest.raises(InputTypeError, match="the model must return one tensor of logits, got tuple"):
        export_student(model, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_file_that_answers_otherwise_is_not_recommended_where_accuracy_is_unknown(exported, monkeypatch):
    """However fast it is: its answers may all be wrong. As many answers as it may lose are no matter."""
    record, folder = exported
    paths = {"onnx": folder / "model.onnx", "onnx-int8": folder / "model_int8.onnx"}
    timed = [Timing(t, t, 5) for t in (2.0, 1.0)]
    monkeypatch.setattr(verification, "time_files", lambda paths, **options: timed[: len(paths)])
    (floats, int8) = verification.verify_files(
        digits_student(), paths, None, None, 0.5, with_top1=False, progress=False
    ).files
    assert int8.agreement < 99.5
    assert (floats.passed, int8.passed, int8.drop_low) == (True, None, None)
    assert verification.fastest([floats, int8]) == "onnx"
    differing = round(64 * (1 - int8.agreement / 100))
    record = replace(record, verified_on=Images(64))
    told = replace(record, exports=(floats, int8), recommended="onnx", pytorch_top1=None).sentences(folder)[-1]
    why = f"model_int8.onnx answers otherwise on {differing} of 64 images of noise"
    assert f"{why} and its accuracy was not measured: name a split (--evaluate-split)" in told
    lost = largest_share(differing, 64)
    assert lost > 100 - int8.agreement
    files = verification.verify_files(digits_student(), paths, None, None, lost, with_top1=False, progress=False).files
    assert [file.passed for file in files] == [True, True]


def test_a_drop_comes_with_its_interval_over_the_images(exported):
    record, folder = exported
    int8 = record.exports[1]
    assert int8.drop_low is not None
    assert int8.drop_low < int8.drop < int8.drop_high
    assert f"{int8.drop:.2f} points lost, 95 % interval" in record.sentences(folder)[1]


def test_a_file_over_the_budget_is_not_recommended(exported):
    record, folder = exported
    size = min(file.size_mb for file in record.exports)
    passed = [replace(file, passed=True) for file in record.exports]
    of_int8 = Budget(max_size_mb=size * 1.01)
    assert verification.fastest(passed, of_int8) == "onnx-int8"
    lost = [replace(passed[0]), replace(passed[1], passed=False)]
    assert verification.fastest(lost, of_int8) is None
    told = replace(record, exports=tuple(lost), recommended=None, budget=of_int8)
    assert [file["is_within_budget"] for file in told.metrics()] == [False, True]
    float_line, int8_line, last = told.sentences(folder)
    assert float_line.endswith(f"over the budget of {of_int8}")
    assert "budget" not in int8_line
    assert last.startswith("recommended: none;")
    rows = export_rows(parse_metrics(NUMBERS | {"exports": told.metrics()}, "m"))
    assert [row[-1] for row in rows] == ["over the budget", "lost too much"]


@pytest.mark.parametrize(("times", "best"), [((2.0, 1.0), "onnx-int8"), ((1.0, 2.0), "onnx")])
def test_the_faster_file_is_recommended(times, best, exported, tmp_path, monkeypatch):
    _, folder = exported
    paths = {"onnx": folder / "model.onnx", "onnx-int8": folder / "model_int8.onnx"}
    timed = [Timing(t, t, 5) for t in times]
    monkeypatch.setattr(verification, "time_files", lambda paths, **options: timed[: len(paths)])
    verified = verification.verify_files(digits_student(), paths, None, None, 100.0, with_top1=False, progress=False)
    assert verification.fastest(verified.files) == best
    assert verification.fastest([replace(file, passed=False) for file in verified.files]) is None


def test_an_earlier_export_is_replaced_whole(exported, tmp_path):
    out = shutil.copytree(exported[1], tmp_path / "out")
    (out / "notes.txt").write_text("of before")
    record = export_student(smallest(), out, progress=False)
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "model.onnx", "notes.txt"]
    assert read_export_record(out) == record


@pytest.mark.parametrize("record", ["none", "of other files", "damaged"])
def test_a_file_that_no_export_wrote_stays(record, exported, tmp_path):
    out = shutil.copytree(exported[1], tmp_path / "out")
    (out / "model_int8.onnx").write_text("mine")
    if record == "none":
        (out / "export.json").unlink()
    elif record == "damaged":
        (out / "export.json").write_text("{")
    export_student(smallest(), out, progress=False)
    assert (out / "model_int8.onnx").read_text() == "mine"


def test_other_classes_are_refused_before_any_work(tmp_path, tiny_images):
    images = load_labeled_images(str(tiny_images(classes=3, n=6)), "train")
    with pytest.raises(InputError, match="the model has 10 classes, the dataset has 3"):
        export_student(smallest(), tmp_path / "out", evaluation=images, progress=False)
    assert not (tmp_path / "out").exists()


def test_int8_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="int8 needs images to calibrate with"):
        export_student(smallest(), tmp_path / "out", int8=True)


def test_missing_and_damaged_records_are_one_line(tmp_path, exported):
    with pytest.raises(MissingFileError, match=r"has no export\.json"):
        read_export_record(tmp_path)
    content = json.loads((exported[1] / "export.json").read_text())
    content["exports"][0]["top1"] = "all"
    (tmp_path / "export.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"exports\[0\]: top1 must be a finite number, found 'all'"):
        read_export_record(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050", "test_convnext", "test_vit"])
def test_every_family_exports_and_is_verified(name, tmp_path):
    model = tiny_teacher(name, classes=10)
    digits = load_labeled_images("digits", "train").subset(range(64))
    record = export_student(model, tmp_path / "out", int8=True, calibration=digits, progress=False)
    floats, int8 = record.exports
    assert floats.agreement == 100
    assert floats.max_difference < 1e-5
    assert int8.size_mb < floats.size_mb
    assert record.metadata.architecture == name


@pytest.mark.parametrize(
    ("images", "agreement", "drop", "latency", "told"),
    [
        (Images(1, "folder"), 100.0, None, 1.001, "_int8.onnx answers the same on 1 image of folder, too few"),
        (Images(200, "folder", "train"), 99.5, None, 0.5, "answers otherwise on 1 of 200 images of train and"),
        (Images(64), 100.0, None, 1.0, "answers the same on 64 images of noise, too few to tell"),
        (Images(50000, "folder", "test"), 99.0, 0.002, 1.0, "onnx-int8 lost 0.002 points of top1"),
        (Images(50000, "folder", "test"), 99.0, 1.5, 1.2, "onnx-int8 lost 1.50 points of top1"),
    ],
)
def test_what_is_not_known_is_told_as_such(images, agreement, drop, latency, told, exported):
    record, folder = exported
    known = {"top1": None, "drop": None, "passed": True, "latency_ms": Timing(1, 1, 5)}
    floats, int8 = (replace(file, **known) for file in record.exports)
    timing = Timing(latency, latency, 5)
    int8 = replace(int8, drop=drop, passed=None if drop is None else False, agreement=agreement, latency_ms=timing)
    lines = replace(record, verified_on=images, exports=(floats, int8), pytorch_top1=None).sentences(folder)
    assert told in lines[-1]
    assert f"of {images.told()}, largest" in lines[1]
    speed = {1.001: "as fast as", 1.0: "as fast as", 0.5: "faster than", 1.2: "slower than"}[latency]
    assert f"int8 is {speed} float on this machine, {latency:.2f} of its time" in lines[-1]
