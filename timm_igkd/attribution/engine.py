"""The fast engine: integrated gradients, the same sums as captum's with less work; and methods of a single gradient.

What is saved, and why it changes nothing but rounding:

- Weights are frozen: only the input's gradient is wanted, and autograd would otherwise keep every layer's input for the
  weights' gradients and compute those too.
- Batch norm is folded into the convolution before it (lighter_model.py): in eval mode it is a fixed scale and shift,
  but costs a pass over the activations forward and another backward.
- One backward pass per chunk, from the sum of its target outputs. In eval mode no image's output depends on another
  image, so the gradient of the sum at one input is that of its own output; captum builds one autograd output per image
  and step.
- The unit of work is a pair (image, step), not an image. Pairs of all images are packed one after the other, so that
  every chunk but the last is full however many steps each image wants.
- On a CPU several chunks are computed side by side, each by one thread (chunk_pool.py).
"""

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_igkd.attribution.adaptive_path import AdaptivePaths
from timm_igkd.attribution.chunk_gradient import Arithmetic, ChunkGradient
from timm_igkd.attribution.chunk_pool import ChunkPool
from timm_igkd.attribution.grad_cam import GradCAM
from timm_igkd.attribution.ig_options import default_steps
from timm_igkd.attribution.lighter_model import lighter_model
from timm_igkd.attribution.options import Attribution, IGOptions, selected_output
from timm_igkd.eval_mode import exact_arithmetic
from timm_igkd.random_streams import fixed_noise


def gauss_legendre(n_steps: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of the rule on [0, 1], [n_steps] float64 each; captum's default method."""
    nodes, weights = np.polynomial.legendre.leggauss(n_steps)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


class FastEngine:
    """Attributions by packed chunks of (image, step) pairs.

    Args:
        model: the teacher, as `teacher_copy` gives it; a lighter, frozen copy is made.
        options: which gradients.
        chunk_size: (image, step) pairs per forward and backward pass.
        input_shape: (C, H, W).
        device: where to compute.
        workers: chunks computed at the same time on a CPU, each by one thread, so that the results do not depend on
            their number; default: torch's number of threads.
        arithmetic: how gradients are computed; default: eager float32. Outputs are float32 with any.
    """

    def __init__(
        self,
        model: nn.Module,
        options: IGOptions,
        chunk_size: int,
        input_shape: tuple[int, ...],
        device: torch.device | str = "cpu",
        workers: int | None = None,
        arithmetic: Arithmetic | None = None,
    ):
        self.options, self.chunk_size, self.device = options, chunk_size, torch.device(device)
        self._pool: ChunkPool | None = None
        if self.device.type == "cpu":
            self._pool = ChunkPool(workers or torch.get_num_threads())
        # What can be left out is found and checked with one input: noise, from a generator of its own, so that the
        # process's random numbers stay as they were.
        example = fixed_noise(1, *input_shape)
        self.model = lighter_model(model.to("cpu"), example)
        # oneDNN's and cuDNN's fast convolutions take channels last; another order would be copied at each layer. Only
        # theirs: `to` would ask it of every weight, and a lambda layer's has five dimensions.
        self.model = nn.utils.convert_conv2d_weight_memory_format(self.model.to(self.device), torch.channels_last)
        self.arithmetic = arithmetic or Arithmetic()
        # Only gradients are taken in another dtype: outputs, and with them the delta that judges a map, are float32.
        different = self.arithmetic.dtype != "float32"
        model = copy.deepcopy(self.model).to(torch.bfloat16) if different else self.model
        self._chunk_gradient = ChunkGradient(model, options.output, self.arithmetic)
        self._start_gradients: dict[int, Tensor] = {}
        self._grad_cam: GradCAM | None = None
        if options.method == "grad_cam":
            self._grad_cam = GradCAM(self.model, options.output, example.to(self.device))

    def _compute_in_chunks(self, function: Callable[[slice], Tensor], pairs: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield (chunk, function(chunk)) for the slices that `pairs` are cut into, in their order."""
        parts = self._chunk_gradient.parts(pairs, self.chunk_size)
        if self._pool is not None:
            yield from self._pool.map(function, parts)
        else:
            yield from ((part, function(part)) for part in parts)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the teacher's outputs for [B, 3, H, W], computed in chunks."""

        @torch.no_grad()
        def outputs(part: slice) -> Tensor:
            with exact_arithmetic(inputs.device):
                return self.model(inputs[part].contiguous(memory_format=torch.channels_last))

        return torch.cat([result for _, result in self._compute_in_chunks(outputs, len(inputs))]).float()

    def gradients(
        self, inputs: Tensor, baselines: Tensor, targets: Tensor, images: Tensor, nodes: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield (pairs of one chunk, their gradients [chunk, 3, H, W]) at points of the paths.

        Args:
            inputs: [B, 3, H, W].
            baselines: [B or 1, 3, H, W].
            targets: [B] int64.
            images: [P] int64, the image of each (image, step) pair.
            nodes: [P] positions in [0, 1].
        """
        difference = inputs - baselines
        baselines = baselines.expand_as(inputs)
        nodes = nodes.to(inputs).view(-1, 1, 1, 1)

        def gradient(part: slice) -> Tensor:
            index = images[part]  # points are made chunk by chunk: all of them would be n_steps times the batch
            points = torch.addcmul(baselines[index], nodes[part], difference[index])
            return self._chunk_gradient(points, targets[index], self.chunk_size)

        yield from self._compute_in_chunks(gradient, len(images))

    def attribute(self, inputs: Tensor, baselines: Tensor, targets: Tensor, logits: Tensor) -> Attribution:
        """Attribute the target outputs of inputs [B, 3, H, W], integrated gradients along the paths from `baselines`.

        Args:
            inputs: [B, 3, H, W].
            baselines: [B or 1, 3, H, W]; a method without a path reads none.
            targets: [B] int64.
            logits: [B, classes], the teacher's outputs for `inputs`.
        """
        if self.options.method != "ig":
            values = self._without_path(inputs, targets)
            steps = torch.full((len(inputs),), default_steps(self.options.method))
            zeros = torch.zeros(len(inputs), dtype=torch.float32)
            return Attribution(values, zeros, steps, torch.ones(len(inputs), dtype=torch.bool), logits)
        if self.options.n_steps == "auto":
            values, steps, converged = self._adaptive(inputs, baselines, targets)
        else:
            values = (inputs - baselines) * self._fixed(inputs, baselines, targets, self.options.n_steps)
            steps = torch.full((len(inputs),), self.options.n_steps)
            converged = torch.ones(len(inputs), dtype=torch.bool)
        start = selected_output(self.forward(baselines).expand(len(inputs), -1), targets, self.options.output)
        end = selected_output(logits, targets, self.options.output)
        # The delta is a small difference of large numbers: hundreds of thousands of values of both signs against the
        # change of the output. Summed in float32 it would show the rounding of the sum, not the error of the path.
        delta = values.sum((1, 2, 3), dtype=torch.float64) - (end.double() - start.double())
        return Attribution(values, delta.float(), steps, converged, logits)

    def _without_path(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return gradients, or inputs times them, [B, 3, H, W]; or Grad-CAM at the inputs' size, [B, 1, H, W].

        Of method "none": zeros, [B, 1, 1, 1].
        """
        if not self.options.has_maps:
            return inputs.new_zeros(len(inputs), 1, 1, 1)
        if self._grad_cam is not None:
            cam, signed = self._grad_cam, self.options.signed

            def coarse(part: slice) -> Tensor:
                with exact_arithmetic(inputs.device):
                    return cam(inputs[part].contiguous(memory_format=torch.channels_last), targets[part])

            maps = torch.cat([found for _, found in self._compute_in_chunks(coarse, len(inputs))])[:, None]
            return F.interpolate(maps if signed else maps.relu(), size=inputs.shape[2:], mode="bilinear")
        images = torch.arange(len(inputs), device=inputs.device)
        origin, ends = torch.zeros_like(inputs[:1]), torch.ones(len(inputs), dtype=torch.float32)
        gradient = torch.cat([found for _, found in self.gradients(inputs, origin, targets, images, ends)])
        return gradient if self.options.method == "saliency" else inputs * gradient

    def _fixed(self, inputs: Tensor, baselines: Tensor, targets: Tensor, n_steps: int) -> Tensor:
        """Return the mean gradient of each path by Gauss-Legendre, [B, 3, H, W] float32."""
        nodes, weights = gauss_legendre(n_steps)
        batch = len(inputs)
        images = torch.arange(batch, device=inputs.device).repeat_interleave(n_steps)
        pair_weights = weights.repeat(batch).to(inputs).view(-1, 1, 1, 1)
        total = torch.zeros_like(inputs, memory_format=torch.contiguous_format)
        for part, gradient in self.gradients(inputs, baselines, targets, images, nodes.repeat(batch)):
            # A chunk may hold the end of one image's path and the beginning of the next one's: each pair is added to
            # its own image. Chunks come in order, so the sum is the same to the bit whichever worker was first.
            total.index_add_(0, images[part], (gradient * pair_weights[part]).contiguous())
        return total

    def _adaptive(self, inputs: Tensor, baselines: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return attributions, gradients spent, and which images converged; see adaptive_path.py."""
        start = None
        # From one baseline for all every image of a class begins with the same gradient: computed once, not counted. A
        # batch of one image has one baseline too, of noise or blur its own.
        if len(baselines) == 1 and self.options.baseline in ("mean", "black"):
            start = torch.stack([self._start_gradient(baselines, target) for target in targets.tolist()])
        paths = AdaptivePaths(inputs - baselines, self.options, start)
        while len((wanted := paths.wanted())[0]):
            images, nodes = (torch.from_numpy(numbers) for numbers in wanted)
            for part, gradient in self.gradients(inputs, baselines, targets, images.to(inputs.device), nodes):
                paths.add(part, gradient)
            paths.refine()
        return paths.attribution, torch.from_numpy(paths.n_steps), torch.from_numpy(paths.converged)

    def _start_gradient(self, baseline: Tensor, target: int) -> Tensor:
        """Return the gradient at a shared baseline, [3, H, W]; one per class, computed alone and kept."""
        if target not in self._start_gradients:
            if sum(kept.numel() for kept in self._start_gradients.values()) > 1 << 26:  # 256 MiB
                self._start_gradients.clear()
            zero, targets = torch.zeros(1, dtype=torch.int64, device=baseline.device), torch.tensor([target])
            for _, gradient in self.gradients(
                baseline, baseline, targets.to(baseline.device), zero, torch.zeros(1, dtype=torch.float32)
            ):
                self._start_gradients[target] = gradient[0].contiguous()
        return self._start_gradients[target]
