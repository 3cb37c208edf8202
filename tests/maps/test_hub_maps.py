import io
import json
import shutil

import numpy as np
import pytest
from fixture_parts import HUB_TOKEN
from hub_parts import HUB_MARKS, IMAGES, build_maps, code_blocks, one_error_line, run_python
from huggingface_hub import constants
from PIL import Image
from tiny_parts import ImageList, noise_image, tiny_score

from timm_igkd import IGOverlay, IGOverlayDataset, MapStore, push_maps
from timm_igkd.cli.main import main
from timm_igkd.errors import InputError, MissingFileError, RunError
from timm_igkd.hub.errors import redact
from timm_igkd.maps import push as hub_maps
from timm_igkd.maps.scores import read_score
from timm_igkd.records import write_record

pytestmark = HUB_MARKS
REPO = "user/maps"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_maps(tmp_path_factory.mktemp("stores") / "maps")


@pytest.fixture(scope="module")
def other_store(tmp_path_factory):
    return build_maps(tmp_path_factory.mktemp("stores") / "other", seed=4)


def published(hub):
    return hub.repo(REPO, "datasets").files


def push(store, *options, repo=REPO):
    return main(["push-maps", str(store.path), "--repo-id", repo, *options])


def test_pushed_dataset_holds_shards_provenance_card_and_picture(hub, store):
    pushed = store.push_to_hub(REPO)
    shards = {f"data/train-0000{i}-of-00003.parquet" for i in range(3)}
    others = {".gitattributes", "README.md", "manifest.json", "provenance.json", "maps.png"}
    assert set(published(hub)) == others | shards
    assert len(hub.repo(REPO, "datasets").commits) == 2
    assert pushed == f"{hub.endpoint}/datasets/{REPO}/commit/{hub.repo(REPO, 'datasets').head}"
    picture = Image.open(io.BytesIO(published(hub)["maps.png"]))
    assert picture.format == "PNG"
    assert min(picture.size) > 100


def test_maps_come_back_equal_by_name(hub, store):
    push_maps(store.path, REPO)
    back = MapStore(REPO)
    assert back.path != store.path
    assert back.provenance == store.provenance
    assert back.rows[:] == store.rows[:]
    assert np.array_equal(back.float_map(3), store.float_map(3))


def test_score_beside_the_manifest_is_pushed_shown_and_fetched(hub, tmp_path):
    store = build_maps(tmp_path / "maps")
    write_record(store.path / "score.json", tiny_score(store.provenance))
    push_maps(store.path, REPO)
    assert b"mean and 95 % interval over 7 images" in published(hub)["README.md"]
    back = MapStore(REPO)
    assert read_score(back.path, back.provenance) == tiny_score(store.provenance)


def test_revision_names_an_earlier_push(hub, store, other_store):
    first = push_maps(store.path, REPO)
    push_maps(other_store.path, REPO)
    assert MapStore(REPO).rows["row_hash"] == other_store.rows["row_hash"]
    assert MapStore(REPO, revision=first.commit).rows["row_hash"] == store.rows["row_hash"]
    assert MapStore(f"hf-hub:{REPO}@{first.commit}").rows["row_hash"] == store.rows["row_hash"]
    with pytest.raises(RunError, match="no such revision"):
        MapStore(REPO, revision="v7")


def test_shards_of_an_earlier_push_are_removed(hub, store, tmp_path):
    push_maps(store.path, REPO)
    smaller = build_maps(tmp_path / "smaller", reduction="sum")
    (smaller.path / "data").joinpath("x").write_text("not a shard")
    hub.repo(REPO, "datasets").commit({**published(hub), "data/train-00000-of-00009.parquet": b"old"})
    push_maps(smaller.path, REPO)
    assert [name for name in published(hub) if "of-00009" in name or name == "data/x"] == []
    assert MapStore(REPO).signed


def test_cached_maps_open_offline(hub, store, monkeypatch):
    push_maps(store.path, REPO)
    MapStore(REPO)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert MapStore(REPO).rows["key"] == store.rows["key"]
    assert len(hub.requests) == asked


def test_maps_not_in_the_cache_are_one_line_offline(hub, monkeypatch, capfd, tiny_images):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    arguments = ["--dataset", str(tiny_images(n=2)), "--split", "train"]
    assert main(["verify", "--maps", REPO, *arguments]) == 1
    line = one_error_line(capfd)
    assert "offline mode" in line
    assert "there is no folder 'user/maps' either" in line


def test_second_opening_downloads_nothing(hub, store):
    push_maps(store.path, REPO)
    MapStore(REPO)
    before = hub.count("GET", "/storage/")
    MapStore(REPO)
    assert hub.count("GET", "/storage/") == before


def test_maps_from_the_hub_are_checked_against_the_images(hub, store):
    push_maps(store.path, REPO)
    maps = MapStore(REPO)
    maps.verify(IMAGES)
    overlaid = IGOverlayDataset(IMAGES, maps, IGOverlay(1.0), seed=0)
    assert overlaid[0][0].size == (24, 24)
    strangers = ImageList([noise_image(99, 24, 24)] * 10, IMAGES.labels, "strangers")
    with pytest.raises(InputError, match="has no map: its pixels are in none of the 10 rows"):
        IGOverlayDataset(strangers, maps, IGOverlay(1.0), seed=0)[0]
    with pytest.raises(InputError, match="row 0 does not belong"):
        maps.verify(strangers)


def test_folder_wins_over_a_name_on_the_hub(hub, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build_maps(tmp_path / "user" / "maps")
    assert MapStore("user/maps").path.resolve() == tmp_path / "user" / "maps"
    assert hub.requests == []
    with pytest.raises(InputError, match="is a folder; leave it out"):
        MapStore("user/maps", revision="main")


@pytest.mark.parametrize("path", ["/no/such", "./no", "no", "a/b/c", "../x"])
def test_what_cannot_be_a_name_is_a_missing_folder(hub, path):
    with pytest.raises(MissingFileError, match="does not exist"):
        MapStore(path)
    assert hub.requests == []


@pytest.mark.slow
def test_fresh_process_loads_and_streams_as_the_card_says(hub, store, tmp_path):
    push_maps(store.path, REPO, private=True)
    use, stream = code_blocks(published(hub)["README.md"].decode())
    check = """
import json
keys = [row["key"] for row in rows]
print(json.dumps([maps.rows["row_hash"][:], maps.rows["key"][:], keys]))
"""
    out = run_python(use + stream + check, hub.environment(tmp_path / "home", HUB_TOKEN), tmp_path)
    hashes, keys, streamed = json.loads(out.splitlines()[-1])
    assert hashes == store.rows["row_hash"][:]
    assert keys == streamed == store.rows["key"][:]
    assert HUB_TOKEN not in out


def test_private_maps_need_the_token(hub, store, monkeypatch):
    push_maps(store.path, REPO, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RunError, match="does not exist, or is private and this login may not see it"):
        MapStore(REPO)


def test_gated_maps_are_one_line(hub, store, monkeypatch):
    push_maps(store.path, REPO)
    hub.repo(REPO, "datasets").gated = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RunError, match="is gated"):
        MapStore(REPO)


def test_missing_dataset_is_one_line(hub):
    with pytest.raises(RunError, match=r"the Hub's dataset 'user/maps' does not exist.*no folder 'user/maps' either"):
        MapStore(REPO)


def test_wrong_token_is_one_line(hub, store, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 7)
    assert push(store) == 1
    assert "refused the token" in one_error_line(capfd)
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    push_maps(store.path, REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 7)
    with pytest.raises(RunError, match="refused the token"):
        MapStore(REPO)


def test_dataset_of_something_else_is_not_overwritten(hub, store, capfd):
    hub.add(REPO, "datasets").commit({"data/train-00000-of-00001.parquet": b"images", "README.md": b"# Images"})
    assert push(store) == 1
    assert "holds something else already" in one_error_line(capfd)
    assert published(hub) == {"data/train-00000-of-00001.parquet": b"images", "README.md": b"# Images"}


@pytest.mark.parametrize(
    ("file", "cause"),
    [
        ("data/train-00000-of-00001.parquet", r"\(manifest.json is missing\)"),
        ("manifest.json", "is of format '3', expected 2"),
    ],
)
def test_dataset_of_something_else_is_no_store_and_says_why(file, cause, hub):
    hub.add(REPO, "datasets").commit({file: b'{"format": 3}'})
    with pytest.raises(InputError, match=f"is no complete map store .*{cause}"):
        MapStore(REPO)


def test_model_of_the_same_name_does_not_clash(hub, store):
    hub.add(REPO).commit({"config.json": b"{}"})
    push_maps(store.path, REPO)
    assert len(MapStore(REPO)) == 10


def test_local_paths_of_teacher_and_data_are_not_published(hub, store, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(store.path, folder)
    for name in ("manifest.json", "provenance.json"):
        content = json.loads((folder / name).read_text())
        content["dataset"]["name"], content["teacher"]["name"] = "/home/me/images", "local-dir:/home/me/runs/teacher"
        (folder / name).write_text(json.dumps(content))
    push_maps(folder, REPO)
    assert not any(b"/home/me" in content for content in published(hub).values())
    assert MapStore(REPO).provenance.dataset.name == "images"


def test_unfinished_store_is_not_pushed(hub, tmp_path, capfd):
    store = build_maps(tmp_path / "maps")
    (store.path / "data" / "train-00001-of-00003.parquet").unlink()
    assert push(store) == 2
    assert "is not complete (2 of 3 shards)" in one_error_line(capfd)
    assert hub.requests == []


def test_corrupt_shard_is_not_pushed(hub, tmp_path, capfd):
    store = build_maps(tmp_path / "maps")
    shard = store.path / "data" / "train-00001-of-00003.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 255
    shard.write_bytes(content)
    assert push(store) == 2
    assert "corrupt" in one_error_line(capfd)
    assert hub.requests == []


def test_card_edited_by_hand_is_kept_unless_told_otherwise(hub, store, other_store, capfd):
    push_maps(store.path, REPO)
    edited = published(hub)["README.md"] + b"\nMind the second row.\n"
    hub.repo(REPO, "datasets").commit({**published(hub), "README.md": edited})
    assert push(other_store) == 0
    assert "edited by hand" in capfd.readouterr().err
    assert published(hub)["README.md"] == edited
    assert push(other_store, "--overwrite-card") == 0
    assert b"Mind the second row" not in published(hub)["README.md"]


@pytest.mark.parametrize(
    ("kind", "method", "path", "times"),
    [
        ("503", "POST", "/api/repos/create", 2),
        ("503", "POST", "/preupload/main", 2),
        ("503", "POST", "/objects/batch", 2),
        ("503", "PUT", "/storage/", 2),
        ("503", "POST", "/commit/main", 2),
        ("cut", "PUT", "/storage/", 2),
        ("lost", "POST", "/api/repos/create", 1),
        ("lost", "PUT", "/storage/", 1),
        ("lost", "POST", "/commit/main", 1),
        ("stall", "PUT", "/storage/", 1),
        ("stall", "POST", "/commit/main", 1),
    ],
)
def test_fault_ends_in_one_commit(hub, store, monkeypatch, kind, method, path, times):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    fault = hub.fault(kind, method, path, times)
    push_maps(store.path, REPO, timeout_s=0.5 if kind == "stall" else 60)
    assert fault.times == 0
    assert len(hub.repo(REPO, "datasets").commits) == 2
    assert len(MapStore(REPO)) == 10


def test_upload_that_is_always_cut_leaves_the_last_push_as_it_is(hub, store, other_store, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    push_maps(store.path, REPO)
    before = hub.repo(REPO, "datasets").head
    hub.fault("cut", "PUT", "/storage/", times=10_000)
    assert push(other_store) == 1
    assert "the connection to the Hub broke" in one_error_line(capfd)
    assert hub.repo(REPO, "datasets").head == before
    assert MapStore(REPO).rows["row_hash"] == store.rows["row_hash"]


def test_server_that_always_stalls_is_one_line(hub, store, capfd):
    hub.fault("stall", "POST", "/commit/main", times=1000, seconds=20)
    assert push(store, "--timeout", "0.3") == 1
    assert "gave no answer" in one_error_line(capfd)
    assert set(published(hub)) == {".gitattributes"}


def test_download_that_stalls_is_made_again_after_the_time_out(hub, store):
    push_maps(store.path, REPO)
    fault = hub.fault("stall", "GET", "/api/datasets/user/maps", seconds=20)
    assert hub_maps.fetch_maps(REPO, timeout_s=0.5).is_dir()
    assert fault.times == 0


@pytest.mark.parametrize(("kind", "path"), [("503", "/api/datasets/user/maps"), ("cut", "/storage"), ("503", "/tree/")])
def test_download_that_fails_twice_succeeds(hub, store, monkeypatch, kind, path):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    push_maps(store.path, REPO)
    fault = hub.fault(kind, "GET", path, times=2)
    assert MapStore(REPO).rows["row_hash"] == store.rows["row_hash"]
    assert fault.times == 0


def test_server_that_always_fails_is_one_line_when_loading(hub, store):
    push_maps(store.path, REPO)
    hub.fault("503", "GET", "/api/datasets", times=1000)
    with pytest.raises(RunError, match="in trouble"):
        MapStore(REPO)


def test_tokens_are_cut_out_of_messages(hub):
    assert redact(f"Bearer {HUB_TOKEN} and hf_abcdefghijkl") == "Bearer *** and hf_***"


def test_name_is_told_from_a_path():
    assert hub_maps.repository_of("user/name", None) == ("user/name", None)
    assert hub_maps.repository_of("user/name@v1", None) == ("user/name", "v1")
    assert hub_maps.repository_of("hf-hub:user/name", "v2") == ("user/name", "v2")
    with pytest.raises(InputError, match="give one of them"):
        hub_maps.repository_of("user/name@v1", "v2")
