"""Validation loss and bits per byte on fixed tokens, shared among all ranks, the same at every world size."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.errors import InputError
from data_prep.shards import TokenStream
from train.batches import to_device
from train.losses import IGNORED, summed_cross_entropy
from train.mesh import Mesh
from train.stops import Stops


@dataclass(frozen=True)
class Validation:
    """Mean loss in nats per token, and bits per UTF-8 byte of exactly the tokens scored."""

    loss: float
    bits_per_byte: float
    tokens: int


class ValidationSet:
    """The first `num_tokens` predictions of a split (None: all), in windows of seq_len.

    The last window may be short; it is padded with ignored targets, so that every forward pass has one shape.
    byte_lengths: int64 [vocab_size], UTF-8 bytes of each id.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        seq_len: int,
        micro_batch: int,
        num_tokens: int | None,
        byte_lengths: np.ndarray,
    ) -> None:
        available = len(stream) - 1
        if available < 1:
            raise InputError(f"the validation split has {len(stream)} tokens; prepare it with a larger --val-fraction")
        self.num_tokens = available if num_tokens is None else min(num_tokens, available)
        self._stream = stream
        self._seq_len = seq_len
        self._micro_batch = micro_batch
        self._byte_lengths = byte_lengths

    @property
    def num_batches(self) -> int:
        return -(-self.num_tokens // (self._seq_len * self._micro_batch))

    def batch(self, index: int) -> tuple[Tensor, Tensor, int]:
        """inputs_BT, targets_BT with IGNORED beyond the end, and the bytes that the scored targets stand for."""
        B, T = self._micro_batch, self._seq_len
        start = index * B * T
        stop = max(start, min(start + B * T, self.num_tokens))
        inputs, targets = np.zeros(B * T, dtype=np.int64), np.full(B * T, IGNORED, dtype=np.int64)
        if stop > start:
            tokens = self._stream.read(start, stop + 1).astype(np.int64)
            inputs[: stop - start] = tokens[:-1]
            targets[: stop - start] = tokens[1:]
        num_bytes = int(self._byte_lengths[targets[: stop - start]].sum())
        return torch.from_numpy(inputs).view(B, T), torch.from_numpy(targets).view(B, T), num_bytes


@torch.no_grad()
def validate(model: nn.Module, data: ValidationSet, *, vocab_size: int, mesh: Mesh, stops: Stops) -> Validation | None:
    """Score the set on all ranks, batch i on rank i mod W; None if a stop was asked for meanwhile. Collective.

    Each micro-batch is summed in fp32, the micro-batches in fp64: their number and size change the loss by its
    rounding only.
    """
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=mesh.device)  # loss, tokens, bytes
    stopped = False
    for first in range(0, data.num_batches, mesh.world):
        inputs_BT, targets_BT, num_bytes = data.batch(first + mesh.rank)
        logits_BTV = model(to_device(inputs_BT, mesh.device))
        totals[0] += summed_cross_entropy(logits_BTV, to_device(targets_BT, mesh.device), vocab_size)
        totals[1] += int((targets_BT != IGNORED).sum())
        totals[2] += num_bytes
        if mesh.sum_(torch.tensor(float(stops.wanted()), device=mesh.device)).item():
            stopped = True
            break
    model.train()
    if stopped:
        return None
    loss_sum, tokens, num_bytes_scored = mesh.sum_(totals).tolist()
    return Validation(loss_sum / tokens, loss_sum / math.log(2) / num_bytes_scored, int(tokens))
