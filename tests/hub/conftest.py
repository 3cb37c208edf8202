"""A finished run and a store of maps, as the tests of the Hub push them."""

import pytest
from hub_parts import build_maps, make_run, plain_student


@pytest.fixture(scope="module")
def student_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", plain_student())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_maps(tmp_path_factory.mktemp("stores") / "maps")
