"""Heads that look, at a token that was there before, for what came after it; of one checkpoint or of all of a run.

Olsson et al. 2022, "In-context Learning and Induction Heads". model/lens.py is the command.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InputError
from common.tables import markdown
from model.checkpoint import list_checkpoints
from model.gpt import GPT
from model.hf.folder import is_hugging_face
from model.interp import heatmaps
from model.interp.common import Common, View, load, numbers
from model.interp.hooks import losses_without_each, rows_per_pass, see_attention, zeros

COLUMNS = ("layer", "head", "induction", "previous token", "first time without it", "second")
HALVES = ("first", "second")
COLUMNS_OVER_STEPS = ("step", "loss, first time", "second", "best induction head", "score", "best previous", "score")


@dataclass(frozen=True, kw_only=True)
class Induction(Common):
    """Which heads look, at a token that has been there before, for what came after it."""

    every_checkpoint: bool = False
    """Of a run: all its checkpoints, one after the other."""
    half: int | None = None
    """How many random tokens come twice. None: half of the context, or the vocabulary if that is less."""
    num_sequences: int = 32
    """Such sequences."""
    seed: int = 1
    """Of their tokens."""
    ablate: bool = False
    """Also the losses of both halves without each head."""

    @property
    def name(self) -> str:
        return "induction-checkpoints" if self.every_checkpoint else "induction"


class Repeats(NamedTuple):
    """What a model does with a half of random tokens that comes twice."""

    induction_LH: Tensor  # mean weight from the second half to the token after the same token in the first
    previous_LH: Tensor  # mean weight to the token before
    losses_BT: Tensor


def repeated_tokens(vocab_size: int, eot_id: int | None, *, half: int, num_rows: int, seed: int) -> Tensor:
    """[num_rows, 2 x half]: `half` different tokens, drawn alike of all but end-of-text, then the same again.

    Different, so that a token of the second half has one place where it was before, however small the vocabulary.
    """
    ids = torch.tensor([index for index in range(vocab_size) if index != eot_id])
    generator = torch.Generator().manual_seed(seed)
    halves = [ids[torch.randperm(len(ids), generator=generator)[:half]] for _ in range(num_rows)]
    return torch.stack([tokens.repeat(2) for tokens in halves])


@torch.no_grad()
def see_repeats(model: GPT, tokens_BT: Tensor) -> Repeats:
    """Olsson et al. 2022, "In-context Learning and Induction Heads": their prefix-matching score, with which they find
    the heads, and the loss of each token but the first."""
    (B, T), config = tokens_BT.shape, model.config
    half = T // 2
    induction_LH, previous_LH = torch.zeros(2, config.num_layers, config.num_heads, dtype=torch.float64)

    def see(layer: int, weights_BHTT: Tensor) -> None:
        looked_BHt = weights_BHTT.diagonal(1 - half, dim1=2, dim2=3)[..., 1:]  # of the first half's last token, too
        induction_LH[layer] += looked_BHt.double().mean(dim=2).sum(dim=0).cpu()
        previous_LH[layer] += weights_BHTT.diagonal(-1, dim1=2, dim2=3).double().mean(dim=2).sum(dim=0).cpu()

    found = []
    for some_BT in tokens_BT.split(rows_per_pass(T)):
        logits_BTV = see_attention(model, some_BT, see)[:, :-1]
        found.append(F.cross_entropy(logits_BTV.transpose(1, 2), some_BT[:, 1:], reduction="none"))
    return Repeats(induction_LH / B, previous_LH / B, torch.cat(found))


def loss_of_halves(losses_BT: Tensor) -> list[float]:
    """The mean loss of the first half's tokens and of the second's, each but the first."""
    half = (losses_BT.shape[1] + 1) // 2
    found: list[float] = numbers(torch.stack([losses_BT[:, : half - 1].mean(), losses_BT[:, half:].mean()]))
    return found


def even_score(half: int) -> float:
    """The induction score of a head that looks at all tokens so far alike."""
    return sum(1 / (place + 1) for place in range(half, 2 * half)) / half


def checkpoints_of(options: Induction) -> list[str]:
    """What to load, one after the other."""
    if not options.every_checkpoint:
        return [options.path]
    found = [] if is_hugging_face(Path(options.path)) else list_checkpoints(Path(options.path))
    if not found:
        raise InputError(f"{options.path}: --every-checkpoint needs a run directory with checkpoints in it")
    if options.ablate:
        raise InputError("--ablate is of one checkpoint, not with --every-checkpoint")
    return [str(path) for path in found]


def looks_of(options: Induction) -> Iterator[tuple[dict[str, Any], int]]:
    """Each checkpoint's numbers, and the half that they are of."""
    for path in checkpoints_of(options):
        model, trained = load(path, options)
        usable = model.config.vocab_size - (trained.tokenizer.eot_id is not None)
        largest = min(model.config.context_len // 2, usable)
        half = largest if options.half is None else options.half
        if not 2 <= half <= largest:
            raise InputError(
                f"--half {half} must be at least 2 and at most {largest}: half the context of "
                f"{model.config.context_len}, and the vocabulary of {usable}"
            )
        if options.num_sequences < 1:
            raise InputError(f"--num-sequences {options.num_sequences} must be at least 1")
        tokens_BT = repeated_tokens(
            model.config.vocab_size,
            trained.tokenizer.eot_id,
            half=half,
            num_rows=options.num_sequences,
            seed=options.seed,
        ).to(model.lm_head.weight.device)
        seen = see_repeats(model, tokens_BT)
        first, second = loss_of_halves(seen.losses_BT)
        look = {"step": trained.step, "induction": numbers(seen.induction_LH), "previous": numbers(seen.previous_LH)}
        look |= {"loss_first": first, "loss_second": second}
        if options.ablate:
            each = losses_without_each(model, tokens_BT, zeros(model), mlps=False)
            halves_N2 = torch.tensor([loss_of_halves(losses_BT) for _, _, losses_BT in each], dtype=torch.float64)
            halves_LH2 = halves_N2.view(model.config.num_layers, model.config.num_heads, 2)
            look |= {f"loss_{HALVES[i]}_without": numbers(halves_LH2[..., i]) for i in range(2)}
        yield look, half


def induction(options: Induction) -> View:
    found = list(looks_of(options))
    looks, half = [look for look, _ in found], found[0][1]
    record = {"model": options.path, "step": looks[-1]["step"], "half": half, "num_sequences": options.num_sequences}
    record |= {"seed": options.seed, "checkpoints": looks}
    what = (
        f"{options.num_sequences} sequences of {half} random tokens, each twice. "
        f"A head that looks everywhere alike has an induction score of {even_score(half):.3f}."
    )
    if options.every_checkpoint:
        text = f"{what}\n\n{markdown(rows_over_steps(looks))}"
        return View(text, record, lambda figure: heatmaps.induction_over_steps(figure, looks))
    [look] = looks
    first = f"{what} Loss {look['loss_first']:.3f} the first time, {look['loss_second']:.3f} the second."
    rows = [list(COLUMNS if options.ablate else COLUMNS[:-2])]
    for layer, (scores, previous) in enumerate(zip(look["induction"], look["previous"], strict=True)):
        for head, pair in enumerate(zip(scores, previous, strict=True)):
            cells = [f"{score:.3f}" for score in pair]
            if options.ablate:
                cells += [f"{look[f'loss_{name}_without'][layer][head]:.3f}" for name in HALVES]
            rows.append([str(layer), str(head), *cells])
    return View(f"{first}\n\n{markdown(rows)}", record, lambda figure: heatmaps.induction(figure, look))


def rows_over_steps(looks: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [list(COLUMNS_OVER_STEPS)]
    for look in looks:
        cells = []
        for kind in ("induction", "previous"):
            score, layer, head = max((s, i, h) for i, row in enumerate(look[kind]) for h, s in enumerate(row))
            cells += [f"{layer}.{head}", f"{score:.3f}"]
        rows.append([f"{look['step']:,}", f"{look['loss_first']:.3f}", f"{look['loss_second']:.3f}", *cells])
    return rows
