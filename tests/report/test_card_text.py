"""Templates and their mark, names as cards show them, and text of others that stays text."""

import dataclasses
import re
from dataclasses import replace

import pytest
from card_parts import HOSTILE
from hub_parts import code_blocks, plain_student, plugin_student
from huggingface_hub import ModelCard

from timm_igkd.errors import InputError, MissingFileError
from timm_igkd.hub import cards
from timm_igkd.hub.cards import (
    cell,
    code,
    hub_dataset_id,
    is_untouched,
    public_dataset,
    public_name,
    read_template,
    sign,
)
from timm_igkd.report.card import model_card
from timm_igkd.report.licenses import check_license
from timm_igkd.report.run_facts import read_run

pytestmark = pytest.mark.hub


def test_template_beside_the_package_comes_first(tmp_path, monkeypatch):
    folders = [tmp_path / "wheel", tmp_path / "checkout"]
    for folder in folders:
        folder.mkdir()
        (folder / "x.md").write_text(folder.name)
    monkeypatch.setattr(cards, "_FOLDERS", tuple(folders))
    assert read_template("x.md") == "wheel"
    (folders[0] / "x.md").unlink()
    assert read_template("x.md") == "checkout"
    with pytest.raises(MissingFileError, match="reinstall timm-igkd"):
        read_template("y.md")


def test_signed_card_is_known_until_it_is_edited():
    card = sign("---\nlicense: mit\n---\n# Card\n")
    assert is_untouched(card)
    assert is_untouched(card.replace("\n", "\r\n"))
    assert is_untouched(card + "\n\n")
    assert not is_untouched(card.replace("mit", "gpl"))
    assert not is_untouched(card + "An addition.\n")
    assert not is_untouched("# Card\n")


def test_values_stay_in_their_place():
    assert code(HOSTILE) == "`a\\|b'c --- <script>alert(1)</script> [x](y)`"
    assert cell("a|b\nc <i>") == "a\\|b c \\<i\\>"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("local-dir:/home/me/runs/demo/teacher", "teacher"),
        ("/home/me/images", "images"),
        ("../images", "images"),
        ("hf-hub:user/name", "hf-hub:user/name"),
        ("data/client-x/images", "images"),
        ("weights/client-x.pth", "client-x.pth"),
        ("digits", "digits"),
    ],
)
def test_local_folders_are_shown_by_their_last_part(name, shown):
    assert public_name(name) == shown


def test_a_folder_named_by_dots_is_shown_by_its_own_name(tmp_path, monkeypatch):
    here = tmp_path / "images" / "train"
    here.mkdir(parents=True)
    (tmp_path / "link").symlink_to(here)
    monkeypatch.chdir(here)
    for name, shown in ((".", "train"), ("./", "train"), ("..", "images"), ("../.", "images"), ("x/..", "train")):
        assert public_name(name) == public_name(f"local-dir:{name}") == public_dataset(name, None) == shown
    assert public_name("../../link") == "link"
    assert public_name("") == public_dataset("", None) == ""
    assert public_name("/") == "/"


def test_card_of_a_run_on_the_working_folder_names_it(plugin_run, tmp_path, monkeypatch):
    (tmp_path / "flowers").mkdir()
    monkeypatch.chdir(tmp_path / "flowers")
    run = read_run(plugin_run)
    facts = replace(run, config={**run.config, "dataset": ".", "teacher": "local-dir:.."}, provenance=None)
    card = model_card(plain_student(), "user/x", facts)
    assert "``" not in card.replace("```", "")
    assert " on `flowers`" in card
    assert f"of `{tmp_path.name}`" in card or f"from `{tmp_path.name}`" in card
    result = ModelCard(card).data.eval_results[0]
    assert (result.dataset_name, result.dataset_type) == ("flowers", "flowers")


def test_only_a_dataset_of_the_hub_is_linked():
    assert hub_dataset_id("user/images", "abc") == "user/images"
    assert hub_dataset_id("hfds/user/images", None) == "user/images"
    assert hub_dataset_id("user/images", None) is None
    assert hub_dataset_id("/user/images", "abc") is None


def test_only_a_dataset_of_the_hub_is_shown_by_its_id(tmp_path, monkeypatch):
    assert public_dataset("user/images", "abc") == public_dataset("hfds/user/images", None) == "user/images"
    assert public_dataset("user/images", None) == "images"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hfds/user/images").mkdir(parents=True)
    assert public_dataset("hfds/user/images", None) == "images"


def result_dataset(plugin_run, store=None, **config):
    facts = read_run(plugin_run)
    card = model_card(plain_student(), "user/x", replace(facts, config={**facts.config, **config}, provenance=store))
    first = ModelCard(card).data.eval_results[0]
    assert ModelCard(card).data.datasets is None
    return first.dataset_type, first.dataset_name, card


def test_results_on_a_relative_folder_are_filed_on_no_dataset_of_the_hub(plugin_run):
    kind, name, card = result_dataset(plugin_run, dataset="data/my images", unlabeled="data/client-x/more")
    assert (kind, name) == ("my-images", "my images")
    assert "data/" not in card


def test_maps_of_a_hub_dataset_do_not_make_the_runs_folder_one(plugin_run, store):
    maps = replace(store.provenance, dataset=replace(store.provenance.dataset, name="user/images", revision="abc"))
    assert result_dataset(plugin_run, maps, dataset="data/images")[:2] == ("images", "images")


LIVE = re.compile(r"(?<!\\)<\s*/?\s*\w|(?<!\\)\]\(|(?<!\\)!\[")


def outside_of_code(card):
    """Return a card without its code blocks and its inline code, which show text as it is."""
    text = re.sub(r"```.*?```", "", card, flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def live_parts(card):
    return LIVE.findall(outside_of_code(ModelCard(card).text))


@pytest.mark.parametrize(
    "hostile", [HOSTILE, "x` <script>alert(1)</script> `y", "<img src=x onerror=alert(1)>", "![a](http://b)"]
)
@pytest.mark.parametrize("field", ["teacher", "dataset", "overlay_source", "loss_type", "student"])
def test_settings_of_a_run_open_nothing_on_its_card(plugin_run, field, hostile):
    facts = read_run(plugin_run)
    harmless = {**facts.config, "overlay_prob": 0.1}
    plain = model_card(plugin_student(), "user/student", dataclasses.replace(facts, config=harmless))
    changed = dataclasses.replace(facts, config=harmless | {field: hostile})
    found = model_card(plugin_student(), "user/student", changed)
    assert live_parts(found) == live_parts(plain)
    assert ModelCard(found).data.library_name == "timm"


def test_versions_open_nothing_on_a_card(plugin_run):
    facts = read_run(plugin_run)
    changed = dataclasses.replace(facts, environment={"timm": "<script>alert(1)</script>", "torch": "[x](y)"})
    assert "<script>" not in model_card(plugin_student(), "user/student", changed)


def test_code_blocks_of_a_card_stay_whole(card):
    assert code_blocks(card)
    assert "\\" not in "".join(code_blocks(card))


def test_text_that_is_no_markdown_is_escaped_wherever_a_template_puts_it(tmp_path, monkeypatch):
    (tmp_path / "t.md").write_text("{{ a }} {{ a | code }} {{ a | verbatim }} {{ a | markdown }} {{ n }}")
    monkeypatch.setattr(cards, "_FOLDERS", (tmp_path,))
    text = cards.render_card("t.md", a="<b>*x*`", n=3)
    assert text.startswith("\\<b\\>\\*x\\*\\` `<b>*x*'` <b>*x*' <b>*x*` 3")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("https://user:secret@host/data", "https://host/data"),
        ("s3://key:pass@bucket/x", "s3://bucket/x"),
        ("a@b", "a@b"),
    ],
)
def test_credentials_in_a_name_are_not_shown(name, shown):
    assert public_name(name) == shown


@pytest.mark.parametrize("name", ["apache", "Apache-2.0", "", "mit\nother: x", "none"])
def test_license_is_one_of_the_hubs_list(name):
    with pytest.raises(InputError, match="must be an identifier of the Hub's list"):
        check_license(name)
    assert check_license("mit") == "mit"
