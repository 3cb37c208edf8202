"""Finished runs of tiny students, their maps and the card of one of them: no test alters these."""

import pytest
from hub_parts import build_maps, make_run, plain_student, plugin_student

from timm_igkd.report.card import model_card
from timm_igkd.report.run_facts import read_run


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_maps(tmp_path_factory.mktemp("stores") / "maps")


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "plain", plain_student())


@pytest.fixture(scope="module")
def plugin_run(tmp_path_factory, store):
    return make_run(tmp_path_factory.mktemp("runs") / "plugin", plugin_student(), store.path)


@pytest.fixture(scope="module")
def card(plugin_run):
    return model_card(plugin_student(), "user/student", read_run(plugin_run), maps_repo="user/maps")


@pytest.fixture
def another(plain_run, tmp_path):
    """A run whose student has other weights."""
    return make_run(tmp_path / "another", plain_student(seed=9))
