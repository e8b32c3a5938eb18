"""Validation loss and bits per byte on fixed tokens, shared by all ranks, the same at every world size."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError
from data_prep.shards import TokenStream
from train.data import pinned
from train.losses import IGNORED, LossModel
from train.processes.group import ProcessGroup
from train.processes.stop_requests import StopRequests


@dataclass(frozen=True)
class Validation:
    """Mean loss in nats per token, bits per UTF-8 byte of exactly the tokens scored, and their standard errors.

    The standard errors are over sequences, since the tokens of a sequence depend on each other. So do the sequences of
    one document, which makes the errors a little low. They are None for a single sequence.
    """

    loss: float
    stderr: float | None
    bits_per_byte: float
    bits_per_byte_stderr: float | None
    tokens: int


@dataclass(frozen=True)
class Scoring:
    """The processes that score together, their requests to stop, and a heartbeat before each batch."""

    group: ProcessGroup
    stop_requests: StopRequests
    heartbeat: Callable[[str], None]


class StopRequestedError(Exception):
    """Some rank was asked to stop before everything was scored; raised on all ranks."""


class Batches(Protocol):
    """Tokens to score, in batches of few shapes."""

    @property
    def num_batches(self) -> int: ...

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs_BT and targets_BT, IGNORED where nothing is scored: everywhere beyond the last batch."""
        ...


def scored_batches(
    loss_model: LossModel, data: Batches, scoring: Scoring, *, name: str
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (index, targets_BT, losses_BT) of each batch of this rank; the ranks take batches in turn.

    Collective: every rank must exhaust the iterator. A rank without a batch left gets one without targets, so that all
    ranks call the model equally often. Raise StopRequestedError on all ranks if any rank is asked to stop, InputError
    if any rank cannot read its batch.
    """
    group = scoring.group
    loss_model.eval()
    stop: Tensor | None = None  # above 0: some rank must stop; read one batch late, so that no batch waits
    faults: list[InputError] = []
    for first in range(0, data.num_batches, group.world):
        scoring.heartbeat(f"{name}, batches from {first} of {data.num_batches}")
        index = first + group.rank
        try:
            batch = data.batch(index)
        except InputError as error:  # this rank's alone, while the others score
            faults.append(error)
            batch = data.batch(data.num_batches)
        inputs_BT, targets_BT = (
            pinned(tensor_BT, group.device).to(group.device, non_blocking=True) for tensor_BT in batch
        )
        yield index, targets_BT, loss_model.token_losses(inputs_BT, targets_BT)
        if stop is not None and stop.item():
            break
        must_stop = scoring.stop_requests.wanted() or bool(faults)
        stop = group.sum_(torch.full((), float(must_stop), device=group.device))
    loss_model.train()
    if stop is not None and stop.item():
        group.on_all(lambda: raise_first(faults))
        raise StopRequestedError


def raise_first(faults: list[InputError]) -> None:
    if faults:
        raise faults[0]


class ValidationSet:
    """The first `num_tokens` predictions of a split (None: all), in sequences of `seq_len`.

    A short last sequence is padded with ignored targets, so that every forward pass has one shape.
    `byte_lengths`: int64 [vocab_size], UTF-8 bytes of each id.
    """

    def __init__(
        self, stream: TokenStream, *, seq_len: int, micro_batch: int, num_tokens: int | None, byte_lengths: np.ndarray
    ) -> None:
        available = len(stream) - 1
        if available < 1:
            raise InputError(f"the validation split has {len(stream)} tokens; prepare it with a larger --val-fraction")
        self.num_tokens = available if num_tokens is None else min(num_tokens, available)
        self.byte_lengths = byte_lengths
        self._stream = stream
        self._seq_len = seq_len
        self._micro_batch = micro_batch

    @property
    def shape(self) -> tuple[int, int]:
        """Return (rows, tokens) of every batch."""
        return self._micro_batch, self._seq_len

    @property
    def num_batches(self) -> int:
        return -(-self.num_tokens // (self._seq_len * self._micro_batch))

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        B, T = self._micro_batch, self._seq_len
        start = index * B * T
        stop = max(start, min(start + B * T, self.num_tokens))
        inputs, targets = np.zeros(B * T, dtype=np.int64), np.full(B * T, IGNORED, dtype=np.int64)
        if stop > start:
            tokens = self._stream.read(start, stop + 1).astype(np.int64)
            inputs[: stop - start] = tokens[:-1]
            targets[: stop - start] = tokens[1:]
        return torch.from_numpy(inputs).view(B, T), torch.from_numpy(targets).view(B, T)


def validate(loss_model: LossModel, data: ValidationSet, scoring: Scoring) -> Validation | None:
    """Return the loss of the set, batch i on rank i mod W; None if a stop is requested meanwhile. Collective.

    Losses are summed in fp32 within a sequence and in fp64 over sequences, so that the number of ranks changes only the
    rounding of the fp64 sums.
    """
    device = scoring.group.device
    byte_lengths_V = torch.from_numpy(data.byte_lengths).to(device)
    totals = torch.zeros(2, 6, dtype=torch.float64, device=device)  # per token, per byte
    try:
        for _, targets_BT, losses_BT in scored_batches(loss_model, data, scoring, name="validation"):
            is_scored_BT = targets_BT != IGNORED
            bytes_BT = byte_lengths_V[targets_BT.clamp(min=0)] * is_scored_BT
            losses_B = losses_BT.sum(dim=1).double()
            totals += torch.stack([sequence_sums(losses_B, each_BT.sum(dim=1)) for each_BT in (is_scored_BT, bytes_BT)])
    except StopRequestedError:
        return None
    per_token, per_byte = scoring.group.sum_(totals).tolist()
    loss, tokens, *_ = per_token
    byte_stderr = standard_error(*per_byte)
    return Validation(
        loss=loss / tokens,
        stderr=standard_error(*per_token),
        bits_per_byte=loss / math.log(2) / per_byte[1],
        bits_per_byte_stderr=None if byte_stderr is None else byte_stderr / math.log(2),
        tokens=int(tokens),
    )


def sequence_sums(losses_B: Tensor, units_B: Tensor) -> Tensor:
    """Return the sums over sequences of l, n, [n > 0], l^2, l n, n^2, as fp64 [6].

    l is a sequence's loss, n its number of units (tokens or bytes).
    """
    units_B = units_B.double()
    columns = (losses_B, units_B, (units_B > 0).double(), losses_B**2, losses_B * units_B, units_B**2)
    return torch.stack([column.sum() for column in columns])


def standard_error(
    loss: float, units: float, num_sequences: float, loss_squared: float, loss_units: float, units_squared: float
) -> float | None:
    """Return the standard error of loss / units, with sequences as the sample; None for a single sequence.

    Source: the ratio estimator of Cochran 1977, "Sampling Techniques", chapter 6.
    """
    if num_sequences < 2:
        return None
    mean = loss / units
    residual = max(0.0, loss_squared - 2 * mean * loss_units + mean**2 * units_squared)
    return math.sqrt(num_sequences / (num_sequences - 1) * residual) / units
