"""How a command ends: one line on stderr for what the user can mend, and the exit code that goes with it."""

import errno
import logging
import sys
from collections.abc import Callable

import huggingface_hub.utils

from timm_igkd.errors import RunError, UserError, message_of

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR}


def run_reporting_errors(function: Callable[[], None], prog: str) -> int:
    """Run `function`; print what the user can mend as one line and return the exit code."""
    _quiet_libraries()
    try:
        function()
    except UserError as error:
        return _report(prog, message_of(error), error.exit_code)
    except KeyboardInterrupt:
        return _report(prog, "interrupted; the same command again goes on from what is finished", 130)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f" {error.filename!r}" if error.filename else ""
        return _report(
            prog, f"cannot write{where}: {error.strerror}; free space or choose another folder", RunError.exit_code
        )
    return 0


def _quiet_libraries() -> None:
    """Leave stderr to our one line: no log records of what is raised anyway, no bars where nobody watches."""
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one warning per retry
        huggingface_hub.utils.disable_progress_bars()


def _report(prog: str, message: str, code: int) -> int:
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    return code
