"""HellaSwag in the completion style: which of four endings does the model find likeliest?

A row is `ctx`, a space and an ending, as in build-nanogpt and llm.c. Context and ending are tokenised separately, and
no end-of-text token comes before them. Only the ending's tokens are scored:

    acc        the ending with the lowest summed loss is the right one
    acc_norm   the same by the mean loss per token

OpenAI's GPT-2 small has 0.2859 and 0.2955 in this style (published with build-nanogpt, not measured here).
lm-evaluation-harness, which train/harness.py runs, rewrites the text first and divides by the ending's characters:
0.2892 and 0.3114. Numbers of the two styles do not compare.

Tokenised separately, the parts have the ids of the whole text with GPT-2's vocabulary (in all 4,000 rows of the 1,000
items in the tests), always with bytes and characters, and mostly with other byte pairs. A row may have one token more
than the model's context, since its last token is only predicted. A longer row is cut on the left, first in the context,
then in the ending, and is counted. A row's first token is never predicted.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import InputError
from data_prep.hellaswag import NUM_ENDINGS, Item, open_items
from data_prep.tokenizer import Tokenizer
from train.evals.validation import Scoring, StopRequestedError, scored_batches
from train.losses import IGNORED, LossModel

SHORTEST = 32  # tokens; rows are padded at least to this length
STYLE = "completion, as build-nanogpt's: acc_norm is by the mean loss per token"


@dataclass(frozen=True)
class Question:
    """The token ids of a context with each ending, the number scored at each end, and the right ending."""

    rows: tuple[tuple[int, ...], ...]
    num_scored: tuple[int, ...]
    label: int

    @property
    def num_inputs(self) -> int:
        return max(map(len, self.rows)) - 1


@dataclass(frozen=True)
class Score:
    """Shares of right answers, NaN if a loss is not finite, with lm-eval's standard errors, None for a single item."""

    acc: float
    acc_stderr: float | None
    acc_norm: float
    acc_norm_stderr: float | None
    items: int


def make_questions(items: Sequence[Item], tokenizer: Tokenizer, context_len: int) -> tuple[list[Question], int]:
    """Return the items as token ids within a context, and the number of items that were cut.

    Raise InputError if the tokenizer cannot encode an item: a score of the others would compare with nothing.
    """
    questions, faults, num_cut = [], list[tuple[int, InputError]](), 0
    for number, item in enumerate(items, start=1):
        try:
            before = tokenizer.encode(item.ctx).tolist()
            endings = [tokenizer.encode(f" {ending}").tolist() for ending in item.endings]
        except InputError as error:
            faults.append((number, error))
            continue
        rows = [tuple((before + ending)[-(context_len + 1) :]) for ending in endings]
        num_cut += any(len(row) < len(before) + len(ending) for row, ending in zip(rows, endings, strict=True))
        num_scored = (min(len(ending), len(row) - 1) for row, ending in zip(rows, endings, strict=True))
        questions.append(Question(tuple(rows), tuple(num_scored), item.label))
    if faults:
        number, fault = faults[0]
        raise InputError(
            f"HellaSwag: {len(faults):,} of {len(items):,} items cannot be encoded with this tokenizer, first item "
            f"{number}: {fault}; bytes and byte pairs encode any text"
        )
    short = next((number for number, question in enumerate(questions, start=1) if 0 in question.num_scored), None)
    if short is not None:
        raise InputError(f"HellaSwag: item {short} has an ending of one token and no context, so nothing to score")
    return questions, num_cut


class HellaSwag:
    """HellaSwag's questions in batches, longest first, padded on the right, which a causal model never sees.

    A batch has as many questions as fit into `batch_tokens`, but at least one. Rows are padded to the longest of their
    batch. `fixed_shapes` is for a compiled model, which wants few shapes: rows have context_len tokens, a half, a
    quarter and so on down to SHORTEST, and all batches of one length have equally many rows. `is_pinned`: these are
    all items of the pinned set. `remarks` are for the reader of the score.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        *,
        context_len: int,
        batch_tokens: int,
        fixed_shapes: bool,
        is_pinned: bool = False,
        remarks: Sequence[str] = (),
    ) -> None:
        self.questions = questions
        self.is_pinned = is_pinned
        self.remarks = remarks
        self._batches: list[tuple[int, int, list[int]]] = []  # rows, their length, questions
        remaining = sorted(range(len(questions)), key=lambda number: -questions[number].num_inputs)
        T = context_len
        while remaining:
            needed = questions[remaining[0]].num_inputs
            while max(needed, SHORTEST) <= T // 2:
                T //= 2
            if not fixed_shapes:
                T = needed
            num_questions = max(1, batch_tokens // (NUM_ENDINGS * T))
            batch, remaining = remaining[:num_questions], remaining[num_questions:]
            self._batches.append((NUM_ENDINGS * (num_questions if fixed_shapes else len(batch)), T, batch))

    def fingerprint(self) -> str:
        """Return the hash of the tokens and labels, the same for any file with them."""
        digest = hashlib.sha256()
        for question in self.questions:
            digest.update(json.dumps([question.rows, question.num_scored, question.label]).encode())
        return digest.hexdigest()

    @property
    def num_batches(self) -> int:
        return len(self._batches)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Return the distinct (rows, tokens) of the batches."""
        return sorted({(B, T) for B, T, _ in self._batches})

    def questions_of(self, index: int) -> list[int]:
        """Return the indices of a batch's questions; none beyond the last batch."""
        return self._batches[index][2] if index < len(self._batches) else []

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        B, T, _ = self._batches[min(index, len(self._batches) - 1)]
        inputs_BT, targets_BT = torch.zeros(B, T, dtype=torch.int64), torch.full((B, T), IGNORED)
        for row_group, number in enumerate(self.questions_of(index)):
            question = self.questions[number]
            endings = zip(question.rows, question.num_scored, strict=True)
            for b, (row, num_scored) in enumerate(endings, start=row_group * NUM_ENDINGS):
                end = len(row) - 1
                inputs_BT[b, :end] = torch.tensor(row[:-1])
                targets_BT[b, end - num_scored : end] = torch.tensor(row[-num_scored:])
        return inputs_BT, targets_BT


def open_hellaswag(
    path: Path,
    tokenizer: Tokenizer,
    *,
    context_len: int,
    batch_tokens: int,
    fixed_shapes: bool,
    most: int | None = None,
) -> HellaSwag:
    """Return the items at `path`, or the first `most` of them.

    `path` is the directory of data_prep/hellaswag.py, or a file in the original form.
    """
    loaded = open_items(path, most=most)
    questions, num_cut = make_questions(loaded.items, tokenizer, context_len)
    remarks = []
    if not loaded.is_pinned:
        remarks.append(f"{path}: {len(questions):,} items, not the whole pinned set, so the score is not comparable")
    if num_cut:
        remarks.append(
            f"{path}: {num_cut:,} items are longer than the model's context of {context_len}: cut on the left"
        )
    return HellaSwag(
        questions,
        context_len=context_len,
        batch_tokens=batch_tokens,
        fixed_shapes=fixed_shapes,
        is_pinned=loaded.is_pinned,
        remarks=remarks,
    )


def ending_losses(loss_model: LossModel, data: HellaSwag, scoring: Scoring) -> Tensor | None:
    """Return the summed loss of each ending in nats, or None if a stop is requested meanwhile. Collective.

    fp64 [questions, 4] on the CPU, the same at every world size.
    """
    losses_Q4 = torch.zeros(len(data.questions), NUM_ENDINGS, dtype=torch.float64, device=scoring.group.device)
    try:
        for index, _, losses_BT in scored_batches(loss_model, data, scoring, name="HellaSwag"):
            sums_Q4 = losses_BT.double().sum(dim=1).view(-1, NUM_ENDINGS)
            questions = data.questions_of(index)
            losses_Q4[questions] = sums_Q4[: len(questions)]
    except StopRequestedError:
        return None
    return scoring.group.sum_(losses_Q4).cpu()


def score(questions: Sequence[Question], losses_Q4: Tensor) -> Score:
    """Return the score of the endings' summed losses; of equal losses the first counts as the answer."""
    num_scored_Q4 = torch.tensor([question.num_scored for question in questions])
    labels_Q = torch.tensor([question.label for question in questions])
    acc, acc_norm = (
        (losses.argmin(dim=1) == labels_Q).double().mean().item() if losses.isfinite().all() else math.nan
        for losses in (losses_Q4, losses_Q4 / num_scored_Q4)
    )
    items = len(questions)
    return Score(acc, standard_error(acc, items), acc_norm, standard_error(acc_norm, items), items)


def standard_error(share: float, num_items: int) -> float | None:
    """Return the standard error of a share p of n items, sqrt(p (1 - p) / (n - 1)); None for a single item."""
    return math.sqrt(share * (1 - share) / (num_items - 1)) if num_items > 1 else None
