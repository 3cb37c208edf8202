import json

import torch

from timm_igkd import environment as module
from timm_igkd.environment import PACKAGES, environment
from timm_igkd.version import __version__


def test_environment_names_versions_and_hardware():
    found = environment()
    assert found["timm_igkd"] == __version__
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert all(found[name] for name in (*PACKAGES, "python", "platform", "cpu"))
    assert found["logical_cores"] >= 1
    assert found["torch_threads"] == torch.get_num_threads()
    assert len(found["gpus"]) == torch.cuda.device_count()


def test_environment_survives_json():
    assert json.loads(json.dumps(environment())) == environment()


def test_a_package_that_is_not_installed_is_none(monkeypatch):
    monkeypatch.setattr(module, "PACKAGES", ("numpy", "no-such-package-here"))
    assert environment()["no-such-package-here"] is None
    assert environment()["numpy"]


def test_cpu_falls_back_where_proc_is_missing(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(module.Path, "read_text", missing)
    assert environment()["cpu"]
