"""Integration steps placed and stopped by the error of the map.

On ReLU nets the gradient along the path is close to a step function, so where it jumps matters more than how smooth
the rule is: rules of high order promise much for smooth functions alone. The path is cut into intervals with the
gradient known at both ends (trapezoid rule). An interval's error is about its width times the jump of the contribution
`(x - baseline) * gradient` across it; the intervals with the largest error are halved. Halving keeps every node: each
gradient that was paid for stays in the sum, whereas a Gauss rule of more steps has other nodes.

The same numbers, summed over the intervals, predict the correlation of the map with its limit. Let the limit be the map
plus an error that is orthogonal to it, as errors of jumps at random places nearly are. With S the map's sum of squares
around its mean and E the error's, their correlation is sqrt(S / (S + E)). The image stops when that reaches the
tolerance. It is a promise about the map's pattern, not about its sum: the completeness delta is measured separately.
"""

import numpy as np
import torch
from torch import Tensor

from timm_igkd.attribution.options import IGOptions, Reduction, reduce_channels

FIRST_INTERVALS = 8
# The mean square error of an interval in units of (width * jump)^2. A single jump anywhere in it gives 1/12 (the
# trapezoid puts it in the middle, its place is uniform); nearby jumps add up. 1/5 was the least at which 95 % of the
# maps kept their promise on the two teachers of the benchmark.
ERROR_SHARE = 1 / 5


def squared_jump(low: Tensor, high: Tensor, reduction: Reduction) -> Tensor:
    """Return the squared jump from contributions `low` to `high`, [P, 3, H, W] each: [P]."""
    jump = high - low
    # The error that counts is the map's. A signed map adds the channels, where their errors may cancel; "abs_sum" adds
    # absolute values, where they do not.
    if reduction != "abs_sum":
        jump = jump.sum(1)
    return jump.square().flatten(1).sum(1)


class AdaptivePaths:
    """The paths of B images, refined together: one answer of the device per round, whatever B is.

    Args:
        difference: [B, 3, H, W], x - baseline.
        options: tolerance, max_steps and the reduction of the map whose error counts.
        start: [B, 3, H, W], the gradients at the baselines where they are known already, or None.

    Attributes:
        attribution: [B, 3, H, W], the trapezoid sum over the nodes so far.
        n_steps: [B] gradients spent; one known at the start is not counted.
        converged: [B] whether the predicted correlation has reached the tolerance.
    """

    def __init__(self, difference: Tensor, options: IGOptions, start: Tensor | None = None):
        self.options, self.difference = options, difference
        batch, capacity = len(difference), options.max_steps + 1
        self.attribution = torch.zeros_like(difference, memory_format=torch.contiguous_format)
        self.n_steps = np.zeros(batch, dtype=np.int64)
        self.converged = np.zeros(batch, dtype=bool)
        # Contributions of all nodes, in the order they came; a node's number is its row. Values stay on the device, the
        # few numbers per interval are numpy's: choosing intervals is many small steps, each a launch on a GPU.
        self._pool = difference.new_empty((0 if start is None else batch, *difference.shape[1:]))
        self._count = len(self._pool)
        if start is not None:
            self._pool.copy_(difference * start)
        # Intervals [B, capacity]: ends, numbers of the nodes there, error; unused ones have the error -1.
        self._ends = np.zeros((2, batch, capacity))
        self._nodes = np.zeros((2, batch, capacity), dtype=np.int64)
        self._errors = np.full((batch, capacity), -1.0)
        self._found: list[Tensor] = []  # squared jumps of the halves of each split, [2, P] per chunk
        self._images, self._columns = self._grid(first_node=0 if start is None else 1)
        self._is_grid = True
        self._reserve()

    def _grid(self, first_node: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (image, node) numbers of the equal intervals every path begins with."""
        self._first = min(FIRST_INTERVALS, max(1, self.options.max_steps - 1))
        nodes = np.arange(first_node, self._first + 1)
        batch = len(self.difference)
        return np.repeat(np.arange(batch), len(nodes)), np.tile(nodes, batch)

    def wanted(self) -> tuple[np.ndarray, np.ndarray]:
        """Return images [P] int64 and positions [P] in [0, 1] whose gradients are to be added now.

        They are empty when every image has stopped.
        """
        if self._is_grid:
            return self._images, self._columns / self._first
        low, high = self._ends[:, self._images, self._columns]
        return self._images, (low + high) / 2

    def add(self, part: slice, gradients: Tensor) -> None:
        """Take the gradients [part, 3, H, W] of a part of what is wanted; the parts come in order."""
        images = self._image_index[part]
        contributions = self._pool[self._count : self._count + len(images)]
        torch.mul(self.difference[images], gradients, out=contributions)
        self._count += len(images)
        if not self._is_grid:
            low, high = (self._pool[side[part]] for side in self._sides)
            reduction = self.options.reduction
            jumps = squared_jump(low, contributions, reduction), squared_jump(contributions, high, reduction)
            self._found.append(torch.stack(jumps))
            # A node m between a and b turns w (a + b) / 2 into w (a + 2m + b) / 4. The sum is updated by the
            # difference, w (2m - a - b) / 4, so that a round costs only its own nodes.
            self.attribution.index_add_(0, images, (2 * contributions - low - high) * self._quarters[part])

    def _reserve(self) -> None:
        """Make room for what is wanted and send its numbers to the device at once: a copy per chunk would wait."""
        self._first_new, needed = self._count, self._count + len(self._images)
        if needed > len(self._pool):
            grown = self._pool.new_empty((max(needed, self._count * 3 // 2), *self._pool.shape[1:]))
            grown[: self._count] = self._pool[: self._count]
            self._pool = grown
        device = self.difference.device
        self._image_index = torch.from_numpy(self._images).to(device)
        if not self._is_grid:
            low, high = self._ends[:, self._images, self._columns]
            self._sides = torch.from_numpy(self._nodes[:, self._images, self._columns]).to(device)
            self._quarters = torch.from_numpy((high - low) / 4).to(self.difference).view(-1, 1, 1, 1)

    def refine(self) -> None:
        """Measure what was added and choose the intervals to halve next."""
        np.add.at(self.n_steps, self._images, 1)
        if self._is_grid:
            self._measure_grid()
        else:
            self._halve(torch.cat(self._found, dim=1))
        self._found, self._is_grid = [], False
        self._choose()

    def _measure_grid(self) -> None:
        first, width, batch = self._first, 1 / self._first, len(self.difference)
        known = self._count - len(self._images)  # nodes given at the start, one per image
        grid = self._first_new + np.arange(len(self._images)).reshape(batch, -1)
        if known:
            grid = np.concatenate([np.arange(batch)[:, None], grid], axis=1)
        places = torch.from_numpy(grid).to(self.difference.device)
        jumps, before = [], None
        for number in range(first + 1):  # all images at once
            node = self._pool[places[:, number]]
            self.attribution.add_(node, alpha=width / 2 if number in (0, first) else width)
            if before is not None:
                jumps.append(squared_jump(before, node, self.options.reduction))
            before = node
        self._errors[:, :first] = width**2 * torch.stack(jumps, dim=1).double().cpu().numpy()
        self._nodes[:, :, :first] = np.stack([grid[:, :-1], grid[:, 1:]])
        self._ends[:, :, :first] = np.stack([np.arange(first), np.arange(1, first + 1)])[:, None] * width

    def _halve(self, jumps: Tensor) -> None:
        """Put the two halves of every split in place of the interval; `jumps` are theirs, [2, P] squared."""
        images, columns = self._images, self._columns
        (low, high), (_, last) = self._ends[:, images, columns], self._nodes[:, images, columns]
        rank = np.arange(len(images)) - np.searchsorted(images, images)  # among the splits of the same image
        middle, used = (low + high) / 2, (self._errors >= 0).sum(1)
        node = self._first_new + np.arange(len(images))
        new = used[images] + rank
        self._ends[0, images, new], self._ends[1, images, new] = middle, high
        self._nodes[0, images, new], self._nodes[1, images, new] = node, last
        self._ends[1, images, columns], self._nodes[1, images, columns] = middle, node
        errors = jumps.double().cpu().numpy() * ((high - low) / 2) ** 2
        self._errors[images, columns], self._errors[images, new] = errors

    def _choose(self) -> None:
        """Stop the images that are done; of each of the others, choose the intervals of largest error."""
        self.converged = self.estimated_correlation() >= self.options.tolerance
        used = (self._errors >= 0).sum(1)
        # A quarter of the intervals per round: more would spend gradients on errors not measured yet, fewer would ask
        # the device more often, with less in each chunk.
        budget = np.minimum(np.minimum(np.maximum(2, used // 4), used), self.options.max_steps - self.n_steps)
        budget[self.converged] = 0
        order = np.argsort(-self._errors, axis=1, kind="stable")  # equal errors in the same order on every machine
        self._images, ranks = np.nonzero(np.arange(order.shape[1]) < budget[:, None])
        self._columns = order[self._images, ranks]
        self._reserve()

    def estimated_correlation(self) -> np.ndarray:
        """Return the predicted correlation of each map with its limit, [B] in [0, 1]; 1 for a map without error."""
        error = ERROR_SHARE * self._errors.clip(min=0).sum(1)
        maps = reduce_channels(self.attribution, self.options.reduction).flatten(1)
        signal = (maps - maps.mean(1, keepdim=True)).square().sum(1).double().cpu().numpy()
        with np.errstate(invalid="ignore"):
            return np.where(error == 0, 1.0, np.sqrt(signal / (signal + error)))
