"""The house: every import goes to a room on a lower floor, rooms and files stay small (docs/architecture.md)."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "timm_igkd"
# From the ground up; rooms of one floor do not know each other. "" are the modules beside the rooms.
FLOORS = (
    ("",),
    ("hub",),
    ("data", "models", "attribution", "distillation"),
    ("maps",),
    ("overlay",),
    ("evaluation",),
    ("training",),
    ("export",),
    ("report",),
    ("runs",),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FREE = {"__init__.py", "__main__.py", "with_plugin.py"}  # of the package itself: they may name any room
MODULES = sorted(PACKAGE.rglob("*.py"))
RECIPES = sorted((PACKAGE.parent / "recipes").rglob("*.py"))


def room_of(parts: tuple[str, ...]) -> str:
    return parts[0] if parts and parts[0] in FLOOR_OF else ""


def imported(path: Path, for_types: bool = True) -> list[tuple[str, ...]]:
    """Return what a file imports of this package, also inside a function, as the parts of the names; () is the package.

    Without `for_types` what it imports under TYPE_CHECKING is left out.
    """
    found, tree = [], ast.parse(path.read_text(encoding="utf-8"))
    aside = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    left_out = set() if for_types else {inner for node in aside for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [tuple(name.split(".")[1:]) for name in found if name.partition(".")[0] == "timm_igkd"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    relative = path.relative_to(PACKAGE)
    if len(relative.parts) == 1 and relative.name in FREE:
        return
    room = room_of(relative.parts[:-1])
    for parts in imported(path):
        assert parts, f"{relative} imports timm_igkd, whose names are of any room"
        target = room_of(parts)
        if target != room:
            assert FLOOR_OF[target] < FLOOR_OF[room], f"{relative} imports timm_igkd.{'.'.join(parts)}"


def test_no_module_needs_itself():
    """Circles between rooms are no way down; these are within one."""
    names = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in MODULES if path.name != "__init__.py"}
    needs = {name: {*imported(path, for_types=False)} & {*names} for name, path in names.items()}
    assert list(TopologicalSorter(needs).static_order())


def test_every_folder_is_a_room():
    folders = {path.parent.relative_to(PACKAGE).as_posix() for path in MODULES} - {"."}
    assert folders <= set(FLOOR_OF)


def test_rooms_and_files_are_small():
    for room in {path.parent for path in MODULES}:
        free = FREE if room == PACKAGE else set()
        assert len({path.name for path in room.glob("*.py")} - free) <= 12, f"{room.name}: more than 12 files"
    files = [*MODULES, *RECIPES]
    too_long = {path.name: lines for path in files if (lines := len(path.read_text().splitlines())) > 300}
    assert not too_long


def lines_of(function: ast.FunctionDef) -> int:
    """Return how many lines a function has below its signature and docstring."""
    before = function.body[0].lineno - 1 if ast.get_docstring(function) is None else function.body[0].end_lineno
    return function.end_lineno - before


def test_functions_are_short():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (*MODULES, *RECIPES)]
    functions = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    too_long = {function.name: lines for function in functions if (lines := lines_of(function)) > 50}
    assert too_long == {}


def test_the_package_imports_nothing_of_recipes_hub_or_benchmarks():
    outside = {"studies", "recipes", "benchmarks", "study", "train_igkd"}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & outside, path
