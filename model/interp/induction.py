"""Measure induction heads in one checkpoint or in all checkpoints of a run; model/lens.py is the command.

An induction head attends from a repeated token to the token that followed it the first time (Olsson et al. 2022,
"In-context Learning and Induction Heads").
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InputError
from common.seeds import as_32_bits, seed_fault
from common.tables import markdown
from model.checkpoint import list_checkpoints
from model.gpt import GPT
from model.hf.folder import is_hugging_face
from model.interp import heatmaps
from model.interp.common import Common, Result, json_numbers, load_gpt
from model.interp.hooks import losses_without_each, read_attention, rows_per_pass, zero_replacements

COLUMNS = ("layer", "head", "induction", "previous token", "first time without it", "second")
HALVES = ("first", "second")
COLUMNS_OVER_STEPS = ("step", "loss, first time", "second", "best induction head", "score", "best previous", "score")


@dataclass(frozen=True, kw_only=True)
class Induction(Common):
    """Measure which heads attend from a repeated token to the token that followed it the first time."""

    every_checkpoint: bool = False
    """Measure all checkpoints of a run, one after the other."""
    half: int | None = None
    """Number of random tokens that come twice. None: half of the context, or the vocabulary if that is smaller."""
    num_sequences: int = 32
    """Number of sequences of repeated random tokens."""
    seed: int = 1
    """Seed of the random tokens."""
    ablate: bool = False
    """Also measure the losses of both halves without each head."""

    @property
    def name(self) -> str:
        return "induction-checkpoints" if self.every_checkpoint else "induction"


class Repeats(NamedTuple):
    """A model's attention and losses on random tokens that come twice."""

    induction_LH: Tensor  # mean weight from the second half to the token after the same token in the first
    previous_LH: Tensor  # mean weight to the token before
    losses_BT: Tensor


def repeated_tokens(vocab_size: int, eot_id: int | None, *, half: int, num_rows: int, seed: int) -> Tensor:
    """Return [num_rows, 2 x half]: `half` different random tokens, then the same tokens again.

    Every token except end-of-text is equally likely. The tokens of a half differ, so that each token of the second half
    occurs exactly once before, however small the vocabulary is.
    """
    ids = torch.tensor([index for index in range(vocab_size) if index != eot_id])
    generator = torch.Generator().manual_seed(as_32_bits(seed))
    halves = [ids[torch.randperm(len(ids), generator=generator)[:half]] for _ in range(num_rows)]
    return torch.stack([tokens.repeat(2) for tokens in halves])


@torch.no_grad()
def measure_repeats(model: GPT, tokens_BT: Tensor) -> Repeats:
    """Return each head's scores on repeated tokens, and the loss of each token but the first.

    The induction score is the prefix-matching score of Olsson et al. 2022, with which they identify the heads.
    """
    (B, T), config = tokens_BT.shape, model.config
    half = T // 2
    induction_LH, previous_LH = torch.zeros(2, config.num_layers, config.num_heads, dtype=torch.float64)

    def add_scores(layer: int, weights_BHTT: Tensor) -> None:
        # The diagonal begins with the last token of the first half, which is no repeated token.
        induction_BHt = weights_BHTT.diagonal(1 - half, dim1=2, dim2=3)[..., 1:]
        induction_LH[layer] += induction_BHt.double().mean(dim=2).sum(dim=0).cpu()
        previous_LH[layer] += weights_BHTT.diagonal(-1, dim1=2, dim2=3).double().mean(dim=2).sum(dim=0).cpu()

    losses = []
    for pass_BT in tokens_BT.split(rows_per_pass(T)):
        logits_BTV = read_attention(model, pass_BT, add_scores)[:, :-1]
        losses.append(F.cross_entropy(logits_BTV.transpose(1, 2), pass_BT[:, 1:], reduction="none"))
    return Repeats(induction_LH / B, previous_LH / B, torch.cat(losses))


def loss_of_halves(losses_BT: Tensor) -> list[float]:
    """Return the mean loss of the first and of the second half, each without its first token."""
    half = (losses_BT.shape[1] + 1) // 2
    means: list[float] = json_numbers(torch.stack([losses_BT[:, : half - 1].mean(), losses_BT[:, half:].mean()]))
    return means


def uniform_score(half: int) -> float:
    """Return the induction score of a head that attends equally to all tokens so far."""
    return sum(1 / (position + 1) for position in range(half, 2 * half)) / half


def checkpoints_of(options: Induction) -> list[str]:
    """Return the paths of the checkpoints to measure, in order."""
    if not options.every_checkpoint:
        return [options.path]
    checkpoints = [] if is_hugging_face(Path(options.path)) else list_checkpoints(Path(options.path))
    if not checkpoints:
        raise InputError(f"{options.path}: --every-checkpoint needs a run directory with checkpoints in it")
    if options.ablate:
        raise InputError("--ablate needs a single checkpoint; leave out --every-checkpoint")
    return [str(path) for path in checkpoints]


def measure_checkpoints(options: Induction) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each checkpoint's numbers, and the half that was used."""
    for path in checkpoints_of(options):
        model, trained = load_gpt(path, options)
        vocab_size, eot_id, num_rows = model.config.vocab_size, trained.tokenizer.eot_id, options.num_sequences
        usable = vocab_size - (eot_id is not None)
        largest = min(model.config.context_len // 2, usable)
        half = largest if options.half is None else options.half
        if not 2 <= half <= largest:
            raise InputError(
                f"--half {half} must be at least 2 and at most {largest}: half the context of "
                f"{model.config.context_len}, and the vocabulary of {usable}"
            )
        if (fault := seed_fault(options.seed)) is not None:
            raise InputError(fault)
        if num_rows < 1:
            raise InputError(f"--num-sequences {num_rows} must be at least 1")
        tokens_BT = repeated_tokens(vocab_size, eot_id, half=half, num_rows=num_rows, seed=options.seed)
        tokens_BT = tokens_BT.to(model.lm_head.weight.device)
        repeats = measure_repeats(model, tokens_BT)
        scores = {"induction": json_numbers(repeats.induction_LH), "previous": json_numbers(repeats.previous_LH)}
        first, second = loss_of_halves(repeats.losses_BT)
        result = {"step": trained.step, **scores, "loss_first": first, "loss_second": second}
        if options.ablate:
            each = losses_without_each(model, tokens_BT, zero_replacements(model), mlps=False)
            halves_N2 = torch.tensor([loss_of_halves(losses_BT) for _, _, losses_BT in each], dtype=torch.float64)
            halves_LH2 = halves_N2.view(model.config.num_layers, model.config.num_heads, 2)
            result |= {f"loss_{HALVES[i]}_without": json_numbers(halves_LH2[..., i]) for i in range(2)}
        yield result, half


def inspect_induction(options: Induction) -> Result:
    """Return the scores and losses of one checkpoint, or of all with --every-checkpoint."""
    results_and_halves = list(measure_checkpoints(options))
    results, half = [result for result, _ in results_and_halves], results_and_halves[0][1]
    record = {"model": options.path, "step": results[-1]["step"], "half": half, "num_sequences": options.num_sequences}
    record |= {"seed": options.seed, "checkpoints": results}
    sequences = (
        f"{options.num_sequences} sequences of {half} random tokens, each twice. "
        f"A head that looks everywhere alike has an induction score of {uniform_score(half):.3f}."
    )
    if options.every_checkpoint:
        text = f"{sequences}\n\n{markdown(rows_over_steps(results))}"
        return Result(text, record, lambda figure: heatmaps.induction_over_steps(figure, results))
    [result] = results
    title = f"{sequences} Loss {result['loss_first']:.3f} the first time, {result['loss_second']:.3f} the second."
    rows = [list(COLUMNS if options.ablate else COLUMNS[:-2])]
    for layer, (scores, previous) in enumerate(zip(result["induction"], result["previous"], strict=True)):
        for head, pair in enumerate(zip(scores, previous, strict=True)):
            cells = [f"{score:.3f}" for score in pair]
            if options.ablate:
                cells += [f"{result[f'loss_{name}_without'][layer][head]:.3f}" for name in HALVES]
            rows.append([str(layer), str(head), *cells])
    return Result(f"{title}\n\n{markdown(rows)}", record, lambda figure: heatmaps.induction(figure, result))


def rows_over_steps(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a table row for each checkpoint: the losses and the best heads."""
    rows = [list(COLUMNS_OVER_STEPS)]
    for result in results:
        cells = []
        for kind in ("induction", "previous"):
            score, layer, head = max((s, i, h) for i, row in enumerate(result[kind]) for h, s in enumerate(row))
            cells += [f"{layer}.{head}", f"{score:.3f}"]
        rows.append([f"{result['step']:,}", f"{result['loss_first']:.3f}", f"{result['loss_second']:.3f}", *cells])
    return rows
