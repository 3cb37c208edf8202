"""Run a script that knows nothing of timm_igkd with its models and augmentations registered.

python -m timm_igkd.with_plugin validate.py --model local-dir:student --pretrained …
"""

import importlib.util
import os
import runpy
import sys
import traceback
from collections.abc import Sequence

from timm_igkd.cli.exit_codes import run_reporting_errors
from timm_igkd.errors import InputError, MissingFileError, UserError


def run_script(arguments: Sequence[str]) -> None:
    """Run a Python script as `python script.py …` would, in this process.

    Args:
        arguments: the script and its arguments, or "-m", a module and its arguments.

    Raises:
        InputError: nothing to run. MissingFileError: no such script. Whatever the script raises, SystemExit included.
    """
    check_script(arguments)
    module = arguments[0] == "-m"
    target = arguments[module]
    argv, path = sys.argv, sys.path.copy()
    sys.argv = list(arguments[module:])
    sys.path.insert(0, os.getcwd() if module else os.path.dirname(os.path.abspath(target)))
    try:
        if module:
            _check_module(target)
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path


def run_foreign_script(arguments: Sequence[str]) -> None:
    """Run a script as `run_script` does; its own errors keep their traceback, a successful SystemExit ends here."""
    try:
        run_script(arguments)
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    except UserError:
        raise
    except OSError as error:  # the command would take it for a full disk of its own
        traceback.print_exc()
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def check_script(arguments: Sequence[str]) -> None:
    """Raise as `run_script` does where there is no script to run; nothing is imported for it."""
    module = arguments[0] == "-m" if arguments else False
    if len(arguments) < 1 + module:
        raise InputError("expected a script to run and its arguments, got none; end the command with: -- train.py …")
    if not module and not os.path.isfile(arguments[0]):
        raise MissingFileError(f"script {arguments[0]!r} does not exist; give the path of a Python script after --")


def _check_module(name: str) -> None:
    """Raise MissingFileError unless a module is there and can be run; its packages are imported for it, as runpy does.

    What its packages raise themselves is theirs.
    """
    remedy = "give the name of one, or the path of a script in place of -m"
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        part = ".".join(parts[:depth])
        try:
            found = importlib.util.find_spec(part)
        except ValueError:  # __main__ and other names that are no module's
            found = None
        if found is None:
            raise MissingFileError(f"module {name!r} does not exist, there is no {part!r}; {remedy}")
        is_package = found.submodule_search_locations is not None
        if depth < len(parts) and not is_package:
            raise MissingFileError(f"module {name!r} does not exist, {part!r} is no package; {remedy}")
    if is_package and importlib.util.find_spec(f"{name}.__main__") is None:
        raise MissingFileError(f"package {name!r} cannot be run, it has no module __main__; {remedy}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script that the arguments name; 2 where there is none."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return run_reporting_errors(lambda: run_foreign_script(arguments), "python -m timm_igkd.with_plugin")


if __name__ == "__main__":
    raise SystemExit(main())
