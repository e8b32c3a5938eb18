"""Validation loss and bits per byte on fixed tokens, shared among all ranks, the same at every world size."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_prep.errors import InputError
from data_prep.shards import TokenStream
from train.batches import pinned
from train.losses import IGNORED, Objective
from train.mesh import Mesh
from train.stops import Stops


@dataclass(frozen=True)
class Validation:
    """Mean loss in nats per token, its standard error, and bits per UTF-8 byte of exactly the tokens scored.

    The standard error is over windows, since the tokens of one window are not independent of each other (windows of
    one document are not either, so it is a little low). It is that of the text, not of the seed. None with one window.
    """

    loss: float
    stderr: float | None
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


def validate(
    objective: Objective, data: ValidationSet, *, mesh: Mesh, stops: Stops, beat: Callable[[str], None]
) -> Validation | None:
    """Score the set on all ranks, batch i on rank i mod W; None if a stop was asked for meanwhile. Collective.

    Each window is summed in fp32, the windows in fp64: how they are shared out changes the loss by its rounding only.
    `beat` hears before each batch which it is.
    """
    objective.eval()
    totals = torch.zeros(6, dtype=torch.float64, device=mesh.device)
    num_bytes = 0
    asked: Tensor | None = None  # to stop, by any rank; read a batch late, so that no batch waits for it
    for first in range(0, data.num_batches, mesh.world):
        beat(f"validation, batches from {first} of {data.num_batches}")
        inputs_BT, targets_BT, batch_bytes = data.batch(first + mesh.rank)
        inputs_BT = pinned(inputs_BT, mesh.device).to(mesh.device, non_blocking=True)
        targets_BT = pinned(targets_BT, mesh.device).to(mesh.device, non_blocking=True)
        losses_BT = objective.token_losses(inputs_BT, targets_BT)
        totals += window_sums(losses_BT.sum(dim=1).double(), (targets_BT != IGNORED).sum(dim=1))
        num_bytes += batch_bytes
        if asked is not None and asked.item():
            break
        asked = mesh.sum_(torch.full((), float(stops.wanted()), device=mesh.device))
    objective.train()
    if asked is not None and asked.item():
        return None
    loss, tokens, num_windows, *squares = mesh.sum_(totals).tolist()
    all_bytes = sum(mesh.gather(num_bytes))
    return Validation(
        loss / tokens,
        standard_error(loss, tokens, num_windows, *squares),
        loss / math.log(2) / all_bytes,
        int(tokens),
    )


def window_sums(losses_B: Tensor, tokens_B: Tensor) -> Tensor:
    """Sums over windows of: loss l, tokens n, windows with tokens, l^2, l n, n^2. fp64 [6]."""
    tokens_B = tokens_B.double()
    columns = (losses_B, tokens_B, (tokens_B > 0).double(), losses_B**2, losses_B * tokens_B, tokens_B**2)
    return torch.stack([column.sum() for column in columns])


def standard_error(
    loss: float, tokens: float, num_windows: float, loss_squared: float, loss_tokens: float, tokens_squared: float
) -> float | None:
    """Of the ratio loss / tokens, with windows as the sample (Cochran 1977, "Sampling Techniques", chapter 6)."""
    if num_windows < 2:
        return None
    mean = loss / tokens
    residual = max(0.0, loss_squared - 2 * mean * loss_tokens + mean**2 * tokens_squared)
    return math.sqrt(num_windows / (num_windows - 1) * residual) / tokens
