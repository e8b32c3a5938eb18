"""HellaSwag in the completion style: which of four endings does the model find likeliest?

A row is `ctx`, a space and an ending, its two parts tokenised apart, with nothing before it (no end-of-text token): as
build-nanogpt and llm.c do it. Only the ending's tokens are scored:

    acc        the ending with the lowest summed loss is the right one
    acc_norm   the same by the mean loss per token

OpenAI's GPT-2 small has 0.2859 and 0.2955 in this style (published with build-nanogpt, not measured here).
lm-evaluation-harness, which train/harness.py runs, rewrites the text first and divides by the ending's characters:
0.2892 and 0.3114. Numbers of the two styles do not compare.

For GPT-2's vocabulary the parts' ids are those of the whole text (of all 4,000 rows of the 1,000 items that the tests
have); of bytes and characters always; of other byte pairs mostly. A row longer than the model's context + 1 (its last
token is only predicted) loses tokens on its left: of the context first, then of the ending, and is counted. The first
token of all is never predicted: it follows nothing.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import InputError
from data_prep.hellaswag import NUM_ENDINGS, Item, open_items
from data_prep.tokenizer import Tokenizer
from train.evals.validation import StopAskedError, scored_batches
from train.losses import IGNORED, LossModel
from train.processes.group import ProcessGroup
from train.processes.stop_requests import StopRequests

SHORTEST = 32  # tokens that a row is padded to at least
STYLE = "completion, as build-nanogpt's: acc_norm is by the mean loss per token"


@dataclass(frozen=True)
class Question:
    """A context with each of its endings as token ids, how many at the end of each are scored, and which is right."""

    rows: tuple[tuple[int, ...], ...]
    num_scored: tuple[int, ...]
    label: int

    @property
    def num_inputs(self) -> int:
        return max(map(len, self.rows)) - 1


@dataclass(frozen=True)
class Score:
    """Shares of right answers, with standard errors as the harness has them: sqrt(p (1 - p) / (n - 1)), None of one
    item. NaN where some loss is no number."""

    acc: float
    acc_stderr: float | None
    acc_norm: float
    acc_norm_stderr: float | None
    items: int


def make_questions(items: Sequence[Item], tokenizer: Tokenizer, context_len: int) -> tuple[list[Question], int]:
    """The items as a model of such a context reads them, and of how many the context or an ending was cut.

    InputError if the tokenizer cannot write some of them: what is right about the others would compare with nothing.
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
            f"HellaSwag: {len(faults):,} of {len(items):,} items cannot be written with this tokenizer, first item "
            f"{number}: {fault}; bytes and byte pairs write any text"
        )
    short = next((number for number, question in enumerate(questions, start=1) if 0 in question.num_scored), None)
    if short is not None:
        raise InputError(f"HellaSwag: item {short} has an ending of one token and no context, so nothing to score")
    return questions, num_cut


class HellaSwag:
    """The questions in batches, longest first, padded on the right, where causality hides it.

    As many at once as make up `batch_tokens`, but at least one. A compiled model wants few shapes: with `fixed_shapes`
    rows are of context_len, a half of it, a quarter and so on, none under SHORTEST, and all batches of one length have
    as many; without, they are as long as the batch's longest. `is_pinned`: these are all items of the
    pinned set. `remarks`: what a reader of the score must know.
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
        to_do = sorted(range(len(questions)), key=lambda number: -questions[number].num_inputs)
        T = context_len
        while to_do:
            needed = questions[to_do[0]].num_inputs
            while max(needed, SHORTEST) <= T // 2:
                T //= 2
            if not fixed_shapes:
                T = needed
            at_once = max(1, batch_tokens // (NUM_ENDINGS * T))
            now, to_do = to_do[:at_once], to_do[at_once:]
            self._batches.append((NUM_ENDINGS * (at_once if fixed_shapes else len(now)), T, now))

    def fingerprint(self) -> str:
        """Of what is scored, whatever file it came from: tokens and labels."""
        digest = hashlib.sha256()
        for question in self.questions:
            digest.update(json.dumps([question.rows, question.num_scored, question.label]).encode())
        return digest.hexdigest()

    @property
    def num_batches(self) -> int:
        return len(self._batches)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and their length, of all batches."""
        return sorted({(B, T) for B, T, _ in self._batches})

    def questions_of(self, index: int) -> list[int]:
        """The numbers of a batch's questions; none beyond the last batch."""
        return self._batches[index][2] if index < len(self._batches) else []

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        B, T, _ = self._batches[min(index, len(self._batches) - 1)]
        inputs_BT, targets_BT = torch.zeros(B, T, dtype=torch.int64), torch.full((B, T), IGNORED)
        for place, number in enumerate(self.questions_of(index)):
            question = self.questions[number]
            for b, (row, num_scored) in enumerate(
                zip(question.rows, question.num_scored, strict=True), start=place * NUM_ENDINGS
            ):
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
    """What is at `path` (data_prep/hellaswag.py's directory, or a file in the original form), or its first items."""
    found = open_items(path, most=most)
    questions, num_cut = make_questions(found.items, tokenizer, context_len)
    remarks = []
    if not found.is_pinned:
        remarks.append(f"{path}: {len(questions):,} items, not the whole pinned set: compares with nobody's score")
    if num_cut:
        remarks.append(
            f"{path}: {num_cut:,} items are longer than the model's context of {context_len}: cut on the left"
        )
    return HellaSwag(
        questions,
        context_len=context_len,
        batch_tokens=batch_tokens,
        fixed_shapes=fixed_shapes,
        is_pinned=found.is_pinned,
        remarks=remarks,
    )


def ending_losses(
    loss_model: LossModel,
    data: HellaSwag,
    *,
    group: ProcessGroup,
    stop_requests: StopRequests,
    heartbeat: Callable[[str], None],
) -> Tensor | None:
    """Return the summed loss of each ending in nats, fp64 [questions, 4] on the CPU; None if a stop was asked for
    meanwhile. Collective; the same at every world size."""
    losses_Q4 = torch.zeros(len(data.questions), NUM_ENDINGS, dtype=torch.float64, device=group.device)
    try:
        for number, _, losses_BT in scored_batches(
            loss_model, data, what="HellaSwag", group=group, stop_requests=stop_requests, heartbeat=heartbeat
        ):
            found_Q4 = losses_BT.double().sum(dim=1).view(-1, NUM_ENDINGS)
            questions = data.questions_of(number)
            losses_Q4[questions] = found_Q4[: len(questions)]
    except StopAskedError:
        return None
    return group.sum_(losses_Q4).cpu()


def score(questions: Sequence[Question], losses_Q4: Tensor) -> Score:
    """Of the endings' summed losses; of equal ones the first is taken."""
    num_scored_Q4 = torch.tensor([question.num_scored for question in questions])
    labels_Q = torch.tensor([question.label for question in questions])
    acc, acc_norm = (
        (each_Q4.argmin(dim=1) == labels_Q).double().mean().item() if each_Q4.isfinite().all() else math.nan
        for each_Q4 in (losses_Q4, losses_Q4 / num_scored_Q4)
    )
    return Score(
        acc=acc,
        acc_stderr=standard_error(acc, len(questions)),
        acc_norm=acc_norm,
        acc_norm_stderr=standard_error(acc_norm, len(questions)),
        items=len(questions),
    )


def standard_error(share: float, num_items: int) -> float | None:
    """Of a share of right answers: their sample standard deviation / sqrt(n)."""
    return math.sqrt(share * (1 - share) / (num_items - 1)) if num_items > 1 else None
