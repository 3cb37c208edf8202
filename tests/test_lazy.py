"""`import timm_igkd` is light, its names load when asked for, and timm knows its models whichever is imported first."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import subprocess_environment

import timm_igkd
from timm_igkd.lazy import after_import, lazy_names

HEAVY = ("torch", "torchvision", "timm", "datasets", "captum", "accelerate", "pyarrow", "huggingface_hub", "numpy")


ROOMS = [path.parent.name for path in Path(timm_igkd.__file__).parent.glob("*/__init__.py")]
ROOMS = sorted(room for room in ROOMS if hasattr(importlib.import_module(f"timm_igkd.{room}"), "__all__"))


def run_python(code: str, tmp_path, *options: str) -> str:
    """Run code in a process of its own and return what it prints; it must succeed without a word on stderr."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=subprocess_environment(tmp_path),
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.strip()


def test_the_package_imports_nothing_heavy(tmp_path):
    code = f"import sys, timm_igkd; print([name for name in {HEAVY} if name in sys.modules])"
    assert run_python(code, tmp_path) == "[]"


def test_every_public_name_loads_from_the_package_and_from_its_room():
    for name in timm_igkd.__all__:
        assert getattr(timm_igkd, name) is not None
    modules = [importlib.import_module(f"timm_igkd.{room}") for room in ROOMS]
    for module in modules:
        for name in module.__all__:
            assert getattr(module, name) is not None
    assert {name for module in modules for name in module.__all__} >= {*timm_igkd.__all__} - {"__version__"}


def test_no_public_name_is_a_modules_too():
    """A package's attribute of that name would be the one or the other, depending on what was imported before."""
    for room in ("", *ROOMS):
        folder = Path(timm_igkd.__file__).parent / room
        modules = {path.stem for path in folder.glob("*.py")} | {
            path.parent.name for path in folder.glob("*/__init__.py")
        }
        assert not modules & {*importlib.import_module(f"timm_igkd.{room}".rstrip(".")).__all__}


def test_public_names_are_listed_and_others_are_attribute_errors():
    assert {*timm_igkd.__all__, "errors", "maps"} <= {*dir(timm_igkd)}
    with pytest.raises(AttributeError, match="module 'timm_igkd' has no attribute 'MapStor'"):
        timm_igkd.MapStor  # noqa: B018
    with pytest.raises(ImportError, match="MapStor"):
        exec("from timm_igkd.maps import MapStor")


def test_rooms_and_errors_are_attributes_of_the_package(tmp_path):
    assert run_python("import timm_igkd; print(timm_igkd.errors.InputError.exit_code)", tmp_path) == "2"


REGISTERED = """
import timm
from timm.data import auto_augment
assert {"mobilenetv2_cifar", "igkd_truncated", "resnet20_cifar", "convnet_cifar"} <= {*timm.list_models()}
assert "IGOverlay" in auto_augment.NAME_TO_OP
assert not any(type(finder).__name__ == "_FirstImport" for finder in sys.meta_path)
print("registered")
"""
ORDERS = {  # each in a process of its own
    "timm first": "import sys, timm, timm_igkd",
    "timm last": "import sys, timm_igkd, timm",
    "timm.models last": "import sys, timm_igkd, timm.models",
    "timm.data last, by from": "import sys, timm_igkd\nfrom timm.data import create_transform",
    "a model's own module first": "import sys\nimport timm_igkd.models.cifar_network",
    "an architecture first": "import sys\nimport timm_igkd.models.resnet_cifar",
    "the op's module first": "import sys\nimport timm_igkd.overlay.timm_ops",
    "the loader first": "import sys\nfrom timm_igkd import load_model",
    "reloaded before timm": "import sys, importlib, timm_igkd\nimportlib.reload(timm_igkd)\nimport timm",
    "reloaded after timm": "import sys, importlib, timm_igkd, timm\nimportlib.reload(timm_igkd)",
    "timm reloaded": "import sys, importlib, timm_igkd, timm\nimportlib.reload(timm)",
    "timm in a thread": "import sys, threading, timm_igkd\n"
    "thread = threading.Thread(target=__import__, args=('timm',))\nthread.start()\nthread.join()",
}


@pytest.mark.parametrize(
    "order", [pytest.param(order, marks=[] if order == "timm last" else pytest.mark.slow) for order in ORDERS]
)
def test_timm_knows_the_models_whatever_is_imported_first(order, tmp_path):
    assert run_python(ORDERS[order] + REGISTERED, tmp_path, "-W", "ignore") == "registered"


@pytest.mark.slow
def test_registering_brings_nothing_but_models_and_the_op(tmp_path):
    code = (
        "import sys, timm; before = {*sys.modules}; import timm_igkd\n"
        "new = sorted({*sys.modules} - before)\n"
        "print(sorted({name.partition('.')[0] for name in new} - {*sys.stdlib_module_names}))\n"
        "print([name for name in new if name.startswith('timm_igkd.') and name.count('.') > 1])"
    )
    packages, modules = run_python(code, tmp_path, "-W", "ignore").splitlines()
    assert packages == "['timm_igkd']"
    architectures = (
        "arguments",
        "cifar_network",
        "convnet_cifar",
        "mobilenetv2_cifar",
        "resnet_cifar",
        "truncated_model",
    )
    assert modules == str([*(f"timm_igkd.models.{name}" for name in architectures), "timm_igkd.overlay.timm_ops"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_know_the_models_too(method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import timm_igkd\n"
        "import torch.utils.data\n"
        "class Models(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 2\n"
        "    def __getitem__(self, index):\n"
        "        import timm\n"
        "        return int(timm.is_model('mobilenetv2_cifar'))\n"
        "if __name__ == '__main__':\n"
        f"    loader = torch.utils.data.DataLoader(Models(), num_workers=1, multiprocessing_context={method!r})\n"
        "    print([int(found) for found in loader])\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=subprocess_environment(tmp_path)
    )
    assert done.stdout.strip() == "[1, 1]", done.stderr


# ---- the parts, on packages made for the test ----


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return `write(name, text)`, which makes an importable package; all trace of it is gone afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    names, finders = [], list(sys.meta_path)

    def write(name, text):
        names.append(name)
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "__init__.py").write_text(text)
        importlib.invalidate_caches()

    yield write
    sys.meta_path[:] = finders
    for name in names:
        sys.modules.pop(name, None)


def test_action_follows_the_first_import_and_the_hook_leaves(package):
    package("igkd_first", "done = []")
    finders = list(sys.meta_path)
    after_import("igkd_first", lambda: sys.modules["igkd_first"].done.append("action"))
    assert sys.meta_path != finders
    import igkd_first

    assert igkd_first.done == ["action"]
    assert sys.meta_path == finders
    assert type(igkd_first.__loader__).__name__ == "SourceFileLoader"
    importlib.reload(igkd_first)
    assert igkd_first.done == []
    after_import("igkd_first", lambda: igkd_first.done.append("at once"))
    assert igkd_first.done == ["at once"]


def test_hook_waits_through_a_failed_import_and_a_missing_package(package, tmp_path):
    done = []
    after_import("igkd_later", lambda: done.append("action"))
    with pytest.raises(ModuleNotFoundError, match="igkd_later"):
        importlib.import_module("igkd_later")
    package("igkd_later", "raise ImportError('half installed')")
    with pytest.raises(ImportError, match="half installed"):
        importlib.import_module("igkd_later")
    assert importlib.util.find_spec("igkd_later") is not None  # asking is not importing
    assert done == []
    package("igkd_later", "whole = True  # another length than before, so that no cached byte code is taken")
    importlib.import_module("igkd_later")
    assert done == ["action"]


def test_asking_twice_acts_once(package):
    package("igkd_twice", "")
    done = []
    after_import("igkd_twice", lambda: done.append("first"))
    after_import("igkd_twice", lambda: done.append("second"))
    importlib.import_module("igkd_twice")
    assert done == ["second"]


def test_lazy_names_import_on_first_use(package, tmp_path):
    package(
        "igkd_lazy", "from timm_igkd.lazy import lazy_names\n__getattr__, __dir__ = lazy_names(__name__, {'x': 'part'})"
    )
    (tmp_path / "igkd_lazy" / "part.py").write_text("x = 3")
    import igkd_lazy

    assert "igkd_lazy.part" not in sys.modules
    assert igkd_lazy.x == 3
    assert sys.modules.pop("igkd_lazy.part").x == 3
    with pytest.raises(AttributeError, match="'pkg' has no attribute 'y'"):
        lazy_names("pkg", {})[0]("y")


FRESH = """
import importlib, os, sys
import torch, torchvision, numpy, PIL.Image  # not timm: its import registers ours, in the middle of whoever imports it
for name in sys.argv[1:]:
    if (child := os.fork()) == 0:
        importlib.import_module("timm_igkd")
        importlib.import_module(name)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(name)
"""


@pytest.mark.slow
def test_every_module_that_timms_import_loads_can_be_the_first(tmp_path):
    code = "import timm_igkd, timm, sys; print(*sorted(n for n in sys.modules if n.startswith('timm_igkd.')))"
    names = run_python(code, tmp_path).split()
    assert {"timm_igkd.eval_mode", "timm_igkd.overlay.timm_ops", "timm_igkd.models.arguments"} <= {*names}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *names], capture_output=True, text=True, env=subprocess_environment(tmp_path)
    )
    assert (done.stdout, done.returncode) == ("", 0), done.stderr


def test_the_module_that_unwraps_models_can_be_the_first(tmp_path):
    assert run_python("from timm_igkd.eval_mode import bare_model; print(bare_model(3))", tmp_path) == "3"
