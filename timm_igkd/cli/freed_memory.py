"""Keep freed memory in the process, so that every chunk does not fault its pages in again.

It changes the allocator of the whole process, so only a process of our own may call it: a command or a recipe, never
the engine, which others use in theirs.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_kept = False


def keep_freed_memory() -> None:
    """Tell glibc not to return large freed blocks to the system, once per process; elsewhere nothing happens.

    Tensors of a few MB are otherwise mapped and unmapped for each layer of each chunk: on two CPU cores that cost up
    to half of the engine's throughput (CHANGELOG). The process keeps at most what one chunk needed.
    """
    global _kept
    if _kept or not sys.platform.startswith("linux"):
        return
    _kept = True
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)  # the heaps of other threads would be given back, whatever the thresholds say
        for parameter, value in ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 1 << 26)):
            mallopt(parameter, value)
