"""--train.cuda-graphs: a micro-batch's whole pass as one CUDA graph, for small models.

A GPT of 4 layers x 128 launches some hundred kernels in each pass, and the GPU is done with each before the host has
sent the next one. A graph is sent at once. torch's own way, torch.compile(mode="reduce-overhead"), records each block
by itself. It gives gradients in memory that the next micro-batch overwrites, and a block's outputs to the next block
in validation, where it takes every block for a new step. So the pass is captured here, as a whole: forward, backward,
and the sum of the gradients in place.
"""

from typing import Any

import torch
from torch import Tensor, nn

from train.data import zero_batch
from train.losses import LossModel

WARM_UP_PASSES = 3  # compilation, and the libraries' own set-up, which cannot be captured


class GraphedPasses(nn.Module):
    """The loss model, whose passes of one shape are captured at the first call and then replayed.

    It is called as the loss model is. A replayed call leaves its gradients added to those of the parameters, so that
    `backward` of its result has nothing more to do. Batches of another shape are computed as ever.
    """

    def __init__(self, loss_model: LossModel, shape: tuple[int, int], device: torch.device) -> None:
        super().__init__()
        self.loss_model = loss_model
        self._batch = zero_batch(shape, has_dropout=loss_model.config.dropout > 0, device=device)
        self._scale = torch.zeros((), device=device)
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._losses = torch.zeros(2, device=device)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, scale: Tensor, *seeds: Tensor) -> Tensor:
        if inputs_BT.shape != self._batch[0].shape:
            losses: Tensor = self.loss_model(inputs_BT, targets_BT, scale, *seeds)
            return losses
        if self._graph is None:
            self._graph = self._capture()
        values = (inputs_BT, targets_BT, *seeds, scale)
        for static, value in zip((*self._batch, self._scale), values, strict=True):
            static.copy_(value, non_blocking=True)
        self._graph.replay()
        replayed: Tensor = Replayed.apply(self._anchor, self._losses)
        return replayed

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients in place, whatever `set_to_none` says: the graph adds to the tensors that it knows."""
        torch._foreach_zero_([p.grad for p in self.parameters() if p.grad is not None])

    def prepare(self) -> None:
        """Give every parameter the gradient that the graph adds to, and let the next pass add nothing to it."""
        for parameter in self.loss_model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._scale.zero_()

    def _capture(self) -> torch.cuda.CUDAGraph:
        self.prepare()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                self._pass()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may allocate pinned memory meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._losses = self._pass()
        return graph

    def _pass(self) -> Tensor:
        inputs_BT, targets_BT, *seeds = self._batch
        losses: Tensor = self.loss_model(inputs_BT, targets_BT, self._scale, *seeds)
        losses[0].backward()
        return losses.detach()


class Replayed(torch.autograd.Function):
    """A copy of a replayed pass's losses, which the next replay overwrites. Its backward pass gives nothing."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, losses: Tensor) -> Tensor:
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None
