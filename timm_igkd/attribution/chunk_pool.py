"""Chunks computed side by side on a CPU, one thread each.

How a library divides one convolution among threads can change its last bits, and with them the bytes of a store.
Dividing whole chunks cannot: the results are the same for any number of workers, and they are handed out in order.
Threads inside a layer also wait for each other at the end of each; chunks wait for nothing.
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
    # torch's number of threads belongs to the thread that set it: the caller's one_thread() need not have reached this.
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
        # Two per worker: one that it computes and one that it finds ready when done. More would only hold memory where
        # whoever takes the results is slower than the workers.
        waiting: deque[tuple[slice, Future[Tensor]]] = deque()
        for part in itertools.islice(parts, 2 * self.workers):
            waiting.append((part, executor.submit(_compute, function, part)))
        while waiting:
            part, future = waiting.popleft()  # the oldest, done or not: float sums depend on their order
            result = future.result()
            for following in itertools.islice(parts, 1):
                waiting.append((following, executor.submit(_compute, function, following)))
            yield part, result
