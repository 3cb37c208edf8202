"""`python -m timm_igkd`, and `torchrun -m timm_igkd` or `accelerate launch -m timm_igkd` for several processes.

Where the command begins: from here on Ctrl-C is one line, so nothing that takes time is imported before.
"""

import signal
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from timm_igkd.cli.exit_codes import exit_within_imports


def entry(command: Callable[[], int] | None = None) -> NoReturn:
    """Console script: quiet libraries, then the command.

    Args:
        command: of a script that is a door of its own, with what it imports inside; returns its exit code.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a parent has it ignored
        signal.signal(signal.SIGINT, exit_within_imports)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a program put in their place may have none
            stream.reconfigure(errors="backslashreplace")  # of a terminal or file that cannot hold every sign
    from timm_igkd.cli.main import main

    warnings.filterwarnings("ignore", module=r"(torch|timm|datasets|accelerate|PIL)\b")
    raise SystemExit((command or main)())


if __name__ == "__main__":
    entry()
