"""Draw the next token from logits: temperature, top-k, top-p and min-p, in this order.

Padding of the vocabulary is never drawn, and each row has its own generator. top-p applies to the probabilities that
top-k leaves. min-p compares with the likeliest token, which every filter keeps, so its rank in the order does not
matter. Ties go to the lower id throughout.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InputError

NUCLEUS_GUESS = 1024  # likeliest tokens to sort before the whole vocabulary is sorted


@dataclass(frozen=True)
class Sampling:
    """The settings of sampling. A temperature of 0 is greedy and ignores the others; None switches a filter off."""

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"--temperature {self.temperature} must be a finite number and not negative (0 is greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top-k {self.top_k} must be at least 1")
        for flag, value in (("--top-p", self.top_p), ("--min-p", self.min_p)):
            if value is not None and not 0 < value <= 1:
                raise InputError(f"{flag} {value} must be more than 0 and at most 1, or None")


class Choices(NamedTuple):
    """The tokens that each row may draw, N at most, and their probabilities in fp64; unused columns have 0.

    If `ids_BN` is None, column n is token n.
    """

    probabilities_BN: Tensor
    ids_BN: Tensor | None


def choices(logits_BV: Tensor, sampling: Sampling, vocab_size: int) -> Choices:
    """Return the tokens that `sampling` leaves of each row; columns from `vocab_size` on are padding.

    top_k keeps the k largest logits. top_p keeps the nucleus, the smallest set whose probability reaches p (Holtzman et
    al. 2020, section 3.1). min_p keeps tokens at least p times as likely as the likeliest (Nguyen et al. 2024, section
    3). All use the probabilities after temperature. Raise InputError for logits that are not finite.
    """
    logits_BV = logits_BV[:, :vocab_size].float()
    if not logits_BV.amax(dim=1).isfinite().all():  # the largest is NaN where any is
        raise InputError("the model's logits are not finite, so no token can be drawn; use another checkpoint")
    if sampling.temperature == 0:
        ids_B1 = logits_BV.argmax(dim=1, keepdim=True)
        return Choices(torch.ones(ids_B1.shape, dtype=torch.float64, device=ids_B1.device), ids_B1)
    ids_BN = None if sampling.top_k is None or sampling.top_k >= vocab_size else _largest(logits_BV, sampling.top_k)
    x_BN = (logits_BV if ids_BN is None else logits_BV.gather(1, ids_BN)).double()
    # fp64 makes the nucleus of 50,000 tokens exact. Subtracting the maximum first allows temperatures near 0.
    probabilities_BN = ((x_BN - x_BN.amax(dim=1, keepdim=True)) / sampling.temperature).softmax(dim=1)
    if sampling.top_p is not None and sampling.top_p < 1:  # with 1, rounding could drop a tail
        columns_BN, probabilities_BN = _nucleus(x_BN, probabilities_BN, sampling.top_p)
        ids_BN = columns_BN if ids_BN is None else ids_BN.gather(1, columns_BN)
    if sampling.min_p is not None:
        least_B1 = sampling.min_p * probabilities_BN.amax(dim=1, keepdim=True)
        probabilities_BN = probabilities_BN.masked_fill(probabilities_BN < least_B1, 0)
    return Choices(probabilities_BN / probabilities_BN.sum(dim=1, keepdim=True), ids_BN)


def _largest(logits_BV: Tensor, k: int) -> Tensor:
    """Return the ids of each row's k largest logits, ascending [B, k].

    topk alone breaks ties in no promised order; here they go to the lower id.
    """
    kth_B1 = logits_BV.topk(k, dim=1).values[:, -1:]
    above_BV, ties_BV = logits_BV > kth_B1, logits_BV == kth_B1
    room_B1 = k - above_BV.sum(dim=1, keepdim=True)
    kept_BV = above_BV | (ties_BV & (ties_BV.cumsum(dim=1) <= room_B1))
    return kept_BV.nonzero()[:, 1].view(-1, k)


def _nucleus(x_BN: Tensor, probabilities_BN: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return columns that hold each row's nucleus, likeliest first, and probabilities, 0 outside of it.

    The NUCLEUS_GUESS likeliest tokens are tried first, since sorting a whole vocabulary takes as long as a small
    model's pass.
    """
    for size in (NUCLEUS_GUESS, x_BN.shape[1]):
        if size < x_BN.shape[1]:
            columns_BN = _largest(x_BN, size)
        else:
            columns_BN = torch.arange(x_BN.shape[1], device=x_BN.device).expand(x_BN.shape)
        sorted_BN, order_BN = probabilities_BN.gather(1, columns_BN).sort(dim=1, descending=True, stable=True)
        reached_BN = sorted_BN.cumsum(dim=1)
        if (reached_BN[:, -1] >= top_p).all():
            break
    before_BN = F.pad(reached_BN[:, :-1], (1, 0))
    return columns_BN.gather(1, order_BN), sorted_BN.masked_fill(before_BN >= top_p, 0)


def draw(rows: Choices, generators: Sequence[torch.Generator | None]) -> list[int | None]:
    """Return a token per row, drawn on the CPU by the row's generator; None for a row without one."""
    probabilities_BN = rows.probabilities_BN.cpu()
    ids_BN = None if rows.ids_BN is None else rows.ids_BN.cpu()
    tokens = list[int | None]()
    for row, generator in enumerate(generators):
        if generator is None:
            tokens.append(None)
        else:
            index = int(torch.multinomial(probabilities_BN[row], 1, generator=generator))
            tokens.append(index if ids_BN is None else int(ids_BN[row, index]))
    return tokens
