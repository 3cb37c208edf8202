"""What push-student takes along: the run's exported files, and a result for a benchmark's page."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import yaml
from hub_parts import HUB_MARKS, make_run, plain_student
from huggingface_hub import ModelCard, parse_eval_result_entries
from tiny_parts import NUMBERS, ImageList, noise_image

from timm_igkd import evaluate, push_student
from timm_igkd.cli.main import main
from timm_igkd.errors import InputError, MissingFileError
from timm_igkd.evaluation.latency import Timing
from timm_igkd.evaluation.onnx_file import describe_model
from timm_igkd.export.record import FILES, ExportedFile, ExportRecord, Images, Quantisation, write_export_record
from timm_igkd.models.loading import weights_hash
from timm_igkd.report.companions import eval_result, exported_files
from timm_igkd.report.run_facts import RunFacts, read_run
from timm_igkd.report.run_files import parse_metrics, update_metrics

pytestmark = HUB_MARKS
REPO = "user/student"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESULT = ".eval_results/timm-igkd.yaml"
METRICS = parse_metrics(NUMBERS | {"top1": 81.256, "n": 500, "split": "test"}, "metrics.json")


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", plain_student())


def configure(run, **settings):
    config = yaml.safe_load((run / "config.yaml").read_text()) | settings
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def add_export(run, model="student", weights_sha256=None, images=None):
    """Write the files that `timm-igkd export` leaves, and one that is none of them."""
    folder, images = run / "export", images or Images(3)
    folder.mkdir()
    exports = []
    for format, name in FILES.items():
        (folder / name).write_bytes(name.encode())
        digest = hashlib.sha256(name.encode()).hexdigest()
        timing = Timing(1.0, 2.0, 9)
        exports.append(ExportedFile(format, name, digest, 0.1, None, None, 99.0, 1e-5, timing, "onnxruntime", True))
    (folder / "notes.txt").write_text("mine")
    student = plain_student()
    weights = weights_sha256 or weights_hash(student)
    quantisation = Quantisation(images, images, False, 0.1, 0.1)
    metadata = describe_model(student)
    record = ExportRecord(
        model, weights, 18, metadata, images, None, 0.5, quantisation, tuple(exports), "onnx", True, {"torch": "2.15"}
    )
    write_export_record(folder, record)
    update_metrics(run / "metrics.json", {"exports": record.metrics()})


# ---- exported files ----


def test_exported_files_go_along_in_the_same_commit(hub, run):
    add_export(run)
    push_student(run, REPO)
    files = hub.repo(REPO).files
    assert {name for name in files if "export" in name} == {
        "export/export.json",
        "export/model.onnx",
        "export/model_int8.onnx",
    }
    assert files["export/model_int8.onnx"] == b"model_int8.onnx"
    assert len(hub.repo(REPO).commits) == 2


def told_of(run, change):
    exports = json.loads((run / "metrics.json").read_text())["exports"]
    update_metrics(run / "metrics.json", {"exports": change(exports)})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda told: None, "the run tells of none"),
        (lambda told: told[:1], "the run tells of another"),
        (lambda told: [told[0], told[1] | {"top1": 10.0}], "the run tells of another"),
    ],
)
def test_exports_that_the_card_does_not_tell_of_stay_here_and_are_named(hub, run, change, why, capfd):
    add_export(run)
    told_of(run, change)
    push_student(run, REPO)
    assert [name for name in hub.repo(REPO).files if "export" in name] == []
    assert b"export/" not in hub.repo(REPO).files["README.md"]
    told = capfd.readouterr().err
    assert f"warning: the export in {str(run / 'export')!r} stays here: {why}" in told
    assert told.endswith("delete the folder and give the run's command --export onnx or onnx-int8\n")


@pytest.mark.parametrize("is_there", [True, False])
def test_card_promises_the_exported_files_that_are_pushed(hub, run, is_there, capfd):
    add_export(run)
    if not is_there:
        shutil.rmtree(run / "export")
    push_student(run, REPO)
    files = hub.repo(REPO).files
    assert ("Files in `export/`" in files["README.md"].decode()) == is_there == ("export/model.onnx" in files)
    warning = f"warning: the run's exported files are not pushed: there is no folder {str(run / 'export')!r}; to push "
    remedy = "them, give the run's command --export onnx or onnx-int8\n"
    assert (warning + remedy in capfd.readouterr().err) != is_there


def test_a_damaged_export_that_the_run_tells_nothing_of_is_no_matter(hub, run):
    add_export(run)
    told_of(run, lambda told: None)
    (run / "export" / "export.json").write_text("{")
    push_student(run, REPO)
    assert "config.json" in hub.repo(REPO).files


def test_exports_of_an_earlier_push_go_with_its_weights(hub, run, tmp_path):
    add_export(run)
    push_student(run, REPO)
    push_student(make_run(tmp_path / "other", plain_student(seed=5)), REPO)
    assert [name for name in hub.repo(REPO).files if "export" in name] == []


def test_record_of_an_export_names_no_folder_of_this_machine(run):
    add_export(run, model="local-dir:/home/me/student", images=Images(3, "/home/me/images", "train"))
    content = exported_files(run / "export", weights_hash(plain_student()), read_run(run))["export/export.json"]
    assert json.loads(content)["verified_on"] == {"dataset": "images", "n": 3, "split": "train"}
    assert b"/home" not in content


def test_export_of_another_student_is_refused(hub, run, capfd):
    add_export(run, weights_sha256="0" * 64)
    assert main(["push-student", str(run), "--repo-id", REPO]) == 2
    assert "export' is of other weights than the student; export it again" in capfd.readouterr().err
    assert hub.requests == []


def test_export_without_its_record_is_refused(run):
    add_export(run)
    (run / "export" / "export.json").unlink()
    with pytest.raises(MissingFileError, match=r"has no export\.json; export the student"):
        exported_files(run / "export", weights_hash(plain_student()), read_run(run))


def test_folder_called_export_that_holds_none_is_no_matter(run):
    (run / "export").mkdir()
    (run / "export" / "notes.txt").write_text("mine")
    assert exported_files(run / "export", "0" * 64, read_run(run)) == {}
    assert exported_files(run / "export", "0" * 64, RunFacts()) == {}


def test_exported_file_that_was_changed_is_refused(run):
    add_export(run)
    (run / "export" / "model_int8.onnx").write_bytes(b"changed")
    with pytest.raises(InputError, match=r"model_int8\.onnx' is not the file that export\.json names"):
        exported_files(run / "export", weights_hash(plain_student()), read_run(run))


# ---- a result for a benchmark ----


def test_result_is_what_the_hubs_client_reads(hub, run):
    configure(run, dataset="user/images", revision=COMMIT)
    assert main(["push-student", str(run), "--repo-id", REPO, "--eval-task", "images_top1"]) == 0
    (entry,) = parse_eval_result_entries(yaml.safe_load(hub.repo(REPO).files[RESULT]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("user/images", "images_top1", 80.0)
    assert entry.dataset_revision == COMMIT
    assert entry.notes == "top-1 accuracy in percent, split test, n = 50"
    assert len(hub.repo(REPO).commits) == 2


def test_card_keeps_its_model_index_beside_the_result(hub, run):
    configure(run, dataset="user/images", revision=COMMIT)
    push_student(run, REPO, eval_task="images_top1")
    first = ModelCard(hub.repo(REPO).files["README.md"].decode()).data.eval_results[0]
    assert (first.dataset_type, first.metric_value, first.dataset_revision) == ("user/images", 80.0, COMMIT)


def test_result_of_an_earlier_push_goes_with_its_weights(hub, run):
    configure(run, dataset="user/images", revision=COMMIT)
    push_student(run, REPO, eval_task="images_top1")
    push_student(run, REPO)
    assert RESULT not in hub.repo(REPO).files


def test_commit_that_the_evaluation_read_is_the_revision_of_the_result(run):
    metrics = replace(METRICS, dataset_revision=COMMIT)
    (entry,) = yaml.safe_load(eval_result(RunFacts({"dataset": "user/images"}, metrics), "top1"))
    assert entry == {
        "dataset": {"id": "user/images", "task_id": "top1", "revision": COMMIT},
        "value": 81.26,
        "notes": "top-1 accuracy in percent, split test, n = 500",
    }


def test_branch_is_no_revision_of_a_result():
    facts = RunFacts({"dataset": "user/images", "revision": "main"}, METRICS)
    (entry,) = yaml.safe_load(eval_result(facts, "top1"))
    assert entry["dataset"] == {"id": "user/images", "task_id": "top1"}


def test_evaluation_says_which_commit_of_a_dataset_it_read():
    images = ImageList([noise_image(0, 32, 32)] * 2, [0, 1])
    assert "dataset_revision" not in evaluate(plain_student(), images, measure_latency=False).metrics
    images.revision = COMMIT
    assert evaluate(plain_student(), images, measure_latency=False).metrics["dataset_revision"] == COMMIT


@pytest.mark.parametrize(
    ("config", "metrics", "said"),
    [
        ({"dataset": "/home/me/images"}, METRICS, "this run's is 'images'; leave it out"),
        ({"dataset": "digits"}, METRICS, "this run's is 'digits'; leave it out"),
        ({"dataset": "hfds/user/images"}, None, "there is no metrics.json"),
        ({"dataset": "hfds/user/images", "test_limit": 9}, METRICS, "needs the whole test split"),
    ],
)
def test_result_that_the_hub_could_not_show_rightly_is_refused(config, metrics, said):
    with pytest.raises(InputError, match=said):
        eval_result(RunFacts(config, metrics), "top1")


@pytest.mark.parametrize("task", ["", "two words", "a\nb"])
def test_task_is_one_word(task):
    with pytest.raises(InputError, match="id of a task, one word"):
        eval_result(RunFacts({"dataset": "hfds/user/images"}, METRICS), task)


def test_refused_result_is_one_line_before_the_hub_is_asked(hub, run, capfd):
    assert main(["push-student", str(run), "--repo-id", REPO, "--eval-task", "top1"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "--eval-task names a task of a data set on the Hub" in line
    assert hub.requests == []


def test_model_without_a_run_has_no_result(run):
    with pytest.raises(InputError, match=r"there is no metrics\.json"):
        push_student(run / "student", REPO, eval_task="top1")
    (run / "metrics.json").unlink()
    assert read_run(run).metrics is None
    with pytest.raises(InputError, match=r"there is no metrics\.json"):
        push_student(run, REPO, eval_task="top1")
