"""Chunks computed side by side on a CPU, one thread each.

How a library divides one convolution among threads can change its last bits. Dividing whole chunks cannot: the results
are the same for any number of workers, and they are handed out in order.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread in this thread, as the pool's workers do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compute(function: Callable[[slice], Tensor], part: slice) -> Tensor:
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    return function(part)


class ChunkPool:
    """A pool of worker threads that each compute with one thread.

    Args:
        workers: how many; 1 computes in the calling thread.
    """

    def __init__(self, workers: int):
        self.workers = max(1, workers)
        self._executor = ThreadPoolExecutor(self.workers, thread_name_prefix="chunk") if self.workers > 1 else None

    def map(self, function: Callable[[slice], Tensor], parts: Iterable[slice]) -> Iterator[tuple[slice, Tensor]]:
        """Yield (part, function(part)) in the order of `parts`; at most two results per worker are held."""
        with one_thread():  # the caller too, while it takes the results: idle threads of its own would spin
            if self._executor is None:
                yield from ((part, function(part)) for part in parts)
            else:
                yield from self._side_by_side(self._executor, function, iter(parts))

    def _side_by_side(
        self, executor: ThreadPoolExecutor, function: Callable[[slice], Tensor], parts: Iterator[slice]
    ) -> Iterator[tuple[slice, Tensor]]:
        waiting: deque[tuple[slice, Future[Tensor]]] = deque()
        for part in itertools.islice(parts, 2 * self.workers):
            waiting.append((part, executor.submit(_compute, function, part)))
        while waiting:
            part, future = waiting.popleft()
            result = future.result()
            for following in itertools.islice(parts, 1):
                waiting.append((following, executor.submit(_compute, function, following)))
            yield part, result
