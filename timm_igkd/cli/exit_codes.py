"""How a command ends: one line on stderr for what the user can mend, and the exit code that goes with it."""

import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from timm_igkd.errors import InputError, RunError, UserError, message_of

# What a path can be that the user gave; every other error of the system is the machine's.
_PATH_ERRORS = {
    errno.ENOENT,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOTEMPTY,
    errno.EINVAL,
}
_SWALLOWING = {("popen_fork.py", "_launch"), ("weakref.py", "__call__")}  # and any __del__
_LATER_S = 0.1
_PROCESS = os.getpid()  # of the command; workers are forked from it
_INTERRUPTED = "interrupted; the same command again goes on from what is finished"
RUN_INTERRUPTED = "interrupted; the same command with --resume goes on from the last finished epoch"


def run_reporting_errors(function: Callable[[], object], prog: str, interrupted: str = _INTERRUPTED) -> int:
    """Run `function`; print what the user can mend as one line and return the exit code.

    Args:
        function: the work.
        prog: who speaks.
        interrupted: what Ctrl-C is answered with.
    """
    try:
        _quiet_libraries()
        function()
    except UserError as error:
        return _report(prog, message_of(error), error.exit_code)
    except KeyboardInterrupt:
        return _report(prog, interrupted, 130)
    except OSError as error:
        if error.errno is None:
            raise
        where = f" {error.filename!r}" if error.filename else ""
        if error.errno in _PATH_ERRORS:
            message = f"cannot use the path{where}: {error.strerror}; give another"
            return _report(prog, message, InputError.exit_code)
        message = f"cannot read or write{where}: {error.strerror}; free space, permit it or choose another folder"
        return _report(prog, message, RunError.exit_code)
    return 0


def exit_within_imports(number: int, frame: FrameType | None) -> None:
    """Handle SIGINT: end the process at once while a module is imported, else raise KeyboardInterrupt.

    An import has nothing to save, and many a library swallows or prints an exception that arrives in the middle of it.
    What Python runs while it forks a worker, or frees an object such as a loader with workers, swallows every
    exception: there it is raised a moment later.
    """
    outer = frame
    while outer is not None:
        if outer.f_code.co_filename.startswith("<frozen importlib."):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"timm-igkd: error: interrupted\n")
            os._exit(130)
        where = os.path.basename(outer.f_code.co_filename), outer.f_code.co_name
        if (where in _SWALLOWING or where[1] == "__del__") and os.getpid() == _PROCESS:
            # a signal, which ends a wait too: _thread.interrupt_main() is noticed after it
            later = threading.Timer(_LATER_S, signal.pthread_kill, (threading.main_thread().ident, number))
            later.daemon = True
            later.start()
            return
        outer = outer.f_back
    signal.default_int_handler(number, frame)


def _quiet_libraries() -> None:
    """Leave stderr to our one line: no log records of what is raised anyway, no bars where nobody watches."""
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        import huggingface_hub.utils  # here: Ctrl-C is a line from the start

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one warning per retry
        huggingface_hub.utils.disable_progress_bars()


def _report(prog: str, message: str, code: int) -> int:
    line = f"{prog}: error: {' '.join(message.split())}"
    print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)  # an argument need not be UTF-8
    return code
