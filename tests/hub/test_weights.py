"""Files of models on the Hub: from the cache, or after a question that is answered in seconds."""

import dataclasses
import http.server
import threading
import time
from functools import partial

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from tiny_parts import tiny_teacher

from timm_igkd import load_model, save_model
from timm_igkd.errors import RunError
from timm_igkd.hub import weights
from timm_igkd.hub.cache_notice import cached_revision_is_kept
from timm_igkd.hub.weights import fetch_file
from timm_igkd.models.checkpoint import start_files

LONGEST_S = 5  # that an answer without a network may take; the wait itself is ANSWER_S
CLOSED = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
NAME, REPO = "test_resnet.r160_in1k", "timm/test_resnet.r160_in1k"


@pytest.fixture
def published(hub):
    """Publish test_resnet of other weights under timm's name; return them."""
    torch.manual_seed(7)
    tensors = timm.create_model("test_resnet").state_dict()
    hub.add(REPO).commit({"model.safetensors": safetensors.torch.save(tensors)})
    return tensors


def test_a_timm_name_gets_its_weights_from_the_hub_and_then_from_the_cache(hub, published):
    model = load_model(NAME)
    assert torch.equal(model.state_dict()["fc.weight"], published["fc.weight"])
    asked = len(hub.requests)
    again = load_model("test_resnet")  # without the tag: timm's default
    assert torch.equal(again.state_dict()["fc.weight"], published["fc.weight"])
    assert len(hub.requests) == asked


def test_another_number_of_classes_gives_a_new_head_on_the_weights_of_the_hub(published):
    model = load_model(NAME, num_classes=3)
    assert model.num_classes == 3
    assert torch.equal(model.state_dict()["conv1.0.weight"], published["conv1.0.weight"])


def model_files(folder, seed=0):
    save_model(tiny_teacher(seed=seed), folder / f"model{seed}", label_names=["cat", "dog"])
    return {path.name: path.read_bytes() for path in (folder / f"model{seed}").iterdir()}


def test_a_model_of_a_commit_comes_from_the_cache_without_a_question(hub, tmp_path):
    files = model_files(tmp_path)
    name = f"hf-hub:user/model@{hub.add('user/model').commit(files)}"
    model = load_model(name)
    asked = len(hub.requests)
    again = load_model(name)
    assert len(hub.requests) == asked
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(model(image), again(image))
    assert [path.read_bytes() for path in start_files(name)] == [files["model.safetensors"]]


@pytest.mark.parametrize("name", ["hf-hub:user/model", "hf-hub:user/model@main"])
def test_a_model_of_a_branch_is_the_one_that_was_pushed_last(hub, tmp_path, name):
    repo = hub.add("user/model")
    for seed in (0, 1):
        repo.commit(model_files(tmp_path, seed))
        expected = tiny_teacher(seed=seed).state_dict()["conv1.0.weight"]
        assert torch.equal(load_model(name).state_dict()["conv1.0.weight"], expected)
    assert [path.read_bytes() for path in start_files(name)] == [model_files(tmp_path, 1)["model.safetensors"]]


def test_a_model_of_a_branch_comes_from_the_cache_with_a_word_where_the_hub_is_not_reached(
    hub, tmp_path, monkeypatch, capfd
):
    hub.add("user/model").commit(model_files(tmp_path))
    load_model("hf-hub:user/model")
    with monkeypatch.context() as closed:
        closed.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        closed.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", CLOSED)
        capfd.readouterr()
        assert load_model("hf-hub:user/model").num_classes == 2
        told = capfd.readouterr().err
    assert "model 'hf-hub:user/model' was asked for at the Hub, no answer; the copy in the cache is used" in told
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_model("hf-hub:user/model").num_classes == 2


def test_a_newer_commit_that_breaks_off_leaves_the_cached_one_in_use(hub, tmp_path, monkeypatch):
    repo = hub.add("user/model")
    repo.commit(model_files(tmp_path))
    load_model("hf-hub:user/model")
    repo.commit(model_files(tmp_path, 1))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    fault = hub.fault("503", "GET", "/storage/", times=1000)
    with pytest.raises(RunError):
        load_model("hf-hub:user/model")
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        model = load_model("hf-hub:user/model")
        assert torch.equal(model.state_dict()["fc.weight"], tiny_teacher(seed=0).state_dict()["fc.weight"])
    fault.times = 0
    model = load_model("hf-hub:user/model")
    assert torch.equal(model.state_dict()["fc.weight"], tiny_teacher(seed=1).state_dict()["fc.weight"])


def test_the_architecture_alone_of_a_newer_commit_leaves_the_cached_one_in_use(hub, tmp_path, monkeypatch):
    repo = hub.add("user/model")
    repo.commit(model_files(tmp_path))
    load_model("hf-hub:user/model")
    repo.commit(model_files(tmp_path, 1))
    load_model("hf-hub:user/model", pretrained=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = load_model("hf-hub:user/model")
    assert torch.equal(model.state_dict()["fc.weight"], tiny_teacher(seed=0).state_dict()["fc.weight"])


def test_a_cache_that_may_not_be_written_hides_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    ref = tmp_path / "models--user--model" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("a" * 40)

    def refuse(*arguments):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("timm_igkd.hub.cache_notice.write_atomic", refuse)

    def download():
        with cached_revision_is_kept("user/model", "model", None):
            ref.write_text("b" * 40)
            raise RunError("of its own")

    with pytest.raises(RunError, match="of its own"):
        download()


def test_a_repository_that_is_gone_is_not_served_from_the_cache(hub, tmp_path):
    hub.add("user/model").commit(model_files(tmp_path))
    load_model("hf-hub:user/model")
    hub.repos.clear()
    with pytest.raises(RunError, match="does not exist"):
        load_model("hf-hub:user/model")


def test_weights_that_are_only_a_pickle_are_found_and_read_without_its_code(hub, tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "run"), "w"))

    torch.save({"weights": Code()}, tmp_path / "pickle.bin")
    hub.add(REPO).commit({"pytorch_model.bin": (tmp_path / "pickle.bin").read_bytes()})
    with pytest.raises(Exception, match="never run"):
        load_model(NAME)
    assert not (tmp_path / "run").exists()


def test_a_repository_without_weights_is_one_line(hub):
    hub.add(REPO)
    with pytest.raises(RunError, match=r"has no timm config\.json and weights"):
        load_model(NAME)


@pytest.fixture
def at_an_address(monkeypatch, tmp_path):
    """Let timm's test_resnet have its weights at an address, as timm's gcvit have; return what was asked there."""
    torch.manual_seed(7)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.pth")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.command)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    known = dataclasses.replace(
        timm.get_pretrained_cfg(NAME), hf_hub_id=None, url=f"http://127.0.0.1:{server.server_port}/resnet.pth"
    )
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: known)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    yield asked
    server.shutdown()
    server.server_close()


def test_weights_at_an_address_are_fetched_quietly_once_and_known_as_the_start(at_an_address, tmp_path, capfd):
    assert start_files(NAME) == []
    model, expected = load_model(NAME), torch.load(tmp_path / "resnet.pth")
    assert torch.equal(model.state_dict()["fc.weight"], expected["fc.weight"])
    load_model(NAME, num_classes=3)
    assert at_an_address == ["HEAD", "GET"]
    assert [file.read_bytes() for file in start_files(NAME)] == [(tmp_path / "resnet.pth").read_bytes()]
    assert capfd.readouterr() == ("", "")


def test_an_address_that_does_not_answer_is_one_line_within_seconds(at_an_address, monkeypatch, capfd):
    known = dataclasses.replace(timm.get_pretrained_cfg(NAME), url="http://127.0.0.1:9/resnet.pth")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: known)
    begun = time.monotonic()
    with pytest.raises(RunError, match="check the network"):
        load_model(NAME)
    assert time.monotonic() - begun < LONGEST_S
    assert capfd.readouterr() == ("", "")


def test_a_closed_port_is_answered_within_seconds_and_quietly(hub, monkeypatch, capfd):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", CLOSED)
    begun = time.monotonic()
    with pytest.raises(RunError, match="check the network"):
        load_model(NAME)
    assert time.monotonic() - begun < LONGEST_S  # timm's own attempt: 46 s
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(weights, "ANSWER_S", 0.05)
    monkeypatch.setattr(weights, "get_hf_file_metadata", lambda *args, **kwargs: time.sleep(5))
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        fetch_file(REPO, ["model.safetensors"])
    assert time.monotonic() - begun < 4


def slow_hub(seconds, asked):
    def answer(url, timeout):
        asked.append(timeout)
        time.sleep(seconds)
        if "model.safetensors" in url:
            raise EntryNotFoundError("not there")

    return answer


@pytest.mark.parametrize(("theirs", "waited"), [(10, None), (0.01, None), (60, 60)])
def test_the_clients_own_time_out_is_kept_where_the_user_set_a_longer_one(theirs, waited, monkeypatch):
    asked = []
    monkeypatch.setattr(weights, "ANSWER_S", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", theirs)
    monkeypatch.setattr(weights, "get_hf_file_metadata", slow_hub(0.5, asked))
    monkeypatch.setattr(weights, "hf_hub_download", lambda repo, name, revision: name)
    if waited:
        assert str(fetch_file(REPO, weights.WEIGHT_FILES)) == "pytorch_model.bin"
    else:
        message = r"gave no answer about .*; run .* again later, or with a higher HF_HUB_ETAG_TIMEOUT, the seconds"
        with pytest.raises(RunError, match=message):
            load_model(NAME)
    assert set(asked) == {waited or 0.2}


def test_each_question_has_the_whole_time(monkeypatch):
    monkeypatch.setattr(weights, "ANSWER_S", 0.8)
    monkeypatch.setattr(weights, "get_hf_file_metadata", slow_hub(0.5, []))
    monkeypatch.setattr(weights, "hf_hub_download", lambda repo, name, revision: name)
    assert str(fetch_file(REPO, weights.WEIGHT_FILES)) == "pytorch_model.bin"


def test_an_address_is_asked_as_long_as_the_hub(at_an_address, monkeypatch):
    ask = weights.urlopen
    monkeypatch.setattr(weights, "ANSWER_S", 0.1)
    monkeypatch.setattr(weights, "urlopen", lambda question, timeout: time.sleep(0.5) or ask(question, timeout=timeout))
    with pytest.raises(RunError, match="HF_HUB_ETAG_TIMEOUT"):
        load_model(NAME)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 60)
    assert load_model(NAME).num_classes == 1000


def test_offline_mode_is_one_line_and_the_cache_still_serves(hub, published, monkeypatch):
    load_model(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_model(NAME).num_classes == 1000
    with pytest.raises(RunError, match="offline mode"):
        load_model("test_vit.r160_in1k")
