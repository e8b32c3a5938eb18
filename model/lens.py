"""Look inside a trained GPT: what its heads look at, what each layer would say, what each part is for.

    python model/lens.py attention runs/NAME --prompt "The cat sat"        # weights of every head
    python model/lens.py attention runs/NAME --prompt "The cat sat" --layer 1 --head 2 --out looked
    python model/lens.py logit-lens runs/NAME --prompt "The cat sat"       # what each layer would say
    python model/lens.py ablate runs/NAME --file some.txt                  # the loss without each head and MLP
    python model/lens.py patch runs/NAME --clean "The cat" --corrupt "The dog" --answers " m" " b"
    python model/lens.py induction runs/NAME --ablate                      # which heads repeat what came before
    python model/lens.py induction runs/NAME --every-checkpoint            # and when they learned to

A model is named as for model/generate.py: a run, RUN@STEP, a checkpoint, a Hugging Face folder. Layers and heads count
from 0; the stream after a layer is called "block 0" and so on, that before them all "embedding". Each prints a table;
--out DIR takes a picture, NAME.png (needs the extra `plots`), and the numbers, NAME.json, rounded to six decimals:
`model` and `step` (null of a Hugging Face folder), `tokens` and `texts` of a prompt of T tokens, and

    attention    heads: [{layer, head, weights [T][T], rows are what looks}]; of one head attention-LAYER.HEAD.json
    logit-lens   layers: [{after, top_tokens, top_texts and top_probabilities [T][--top-k], next_ranks (0: likeliest)
                 and next_losses [T - 1]}]; the last layer is the model's own output
    ablate       by, num_tokens, loss, parts: [{layer, head (null: the MLP), loss, change, standard_error of the change,
                 over tokens}]
    patch        part, corrupt_tokens, corrupt_texts, answers [2], clean and corrupt (logit of the first answer less
                 that of the second, after the last token), patched [L + 1][T] or [L][H], and restored, which is
                 (patched - corrupt) / (clean - corrupt)
    induction    half, num_sequences, seed, checkpoints: [{step, induction [L][H], previous [L][H], loss_first,
                 loss_second; with --ablate loss_first_without and loss_second_without [L][H]}]. Of many it is
                 induction-checkpoints.json, and the step beside them the last one's

A model of a few million parameters takes some seconds, ablating its heads a pass for each.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro
from torch import Tensor

from common.errors import InputError, one_line_errors, reading_from, writing_to
from common.files import write_json_atomically
from common.tables import markdown, new_figure, put_into
from data_prep.tokenizer import Tokenizer
from model.checkpoint import TrainedModel
from model.generate import encode_prompt
from model.interp import heatmaps, hooks
from model.interp.common import Common, View, cell, encode, header, layer_names, load, numbers, shown, texts_of
from model.interp.induction import Induction, induction

MAX_NUMBERS = 10_000_000  # in a JSON file, which then has some 200 MB
LEAST_DIFFERENCE = 1e-4  # of logits; less may be rounding
COLUMNS_OF_HEADS = ("layer", "head", "on itself", "on the one before", "on the first", "the last looks at (weight)")
COLUMNS_OF_PARTS = ("layer", "without", "loss", "change", "+-")
COLUMNS_OF_A_HEAD = ("place", "token", "looks at (weight)")


@dataclass(frozen=True, kw_only=True)
class Attention(Common):
    """Where each head looks: the weights that it gives to the tokens so far."""

    prompt: str
    """A text that fits the context."""
    layer: int | None = None
    """This layer alone."""
    head: int | None = None
    """This head alone, of --layer or of every layer."""

    @property
    def name(self) -> str:
        return "attention" if self.layer is None or self.head is None else f"attention-{self.layer}.{self.head}"


@dataclass(frozen=True, kw_only=True)
class LogitLens(Common):
    """What the model would say if it ended after each layer."""

    prompt: str
    """A text that fits the context."""
    top_k: int = 5
    """How many tokens of each layer and place to keep in the JSON."""
    name = "logit-lens"


@dataclass(frozen=True, kw_only=True)
class Ablate(Common):
    """What a text's loss becomes without each head and each MLP."""

    prompt: str | None = None
    """A text of at least two tokens; one longer than the context is cut into windows."""
    file: Path | None = None
    """Or a file of one."""
    max_tokens: int = 8192
    """How many of its tokens to score."""
    by: Literal["zero", "mean"] = "zero"
    """What a part gives instead: nothing, or its own mean over the text."""
    name = "ablate"


@dataclass(frozen=True, kw_only=True)
class Patch(Common):
    """Which activations of one prompt make the model answer another as it does that one."""

    clean: str
    """The prompt that they are taken from."""
    corrupt: str
    """The prompt that they are put into, of as many tokens."""
    answers: tuple[str, str] | None = None
    """Two tokens; None: the likeliest after --clean and the likeliest after --corrupt."""
    part: Literal["stream", "heads"] = "stream"
    """stream: the residual stream after each layer at each token. heads: each head's results at all tokens."""
    name = "patch"


Options = Attention | LogitLens | Ablate | Patch | Induction


def check_choice(flag: str, given: int | None, number: int) -> range:
    """All of them, or the one that is given."""
    if given is not None and not 0 <= given < number:
        raise InputError(f"{flag} {given}: the model has 0 to {number - 1}")
    return range(number) if given is None else range(given, given + 1)


# --- The looks --------------------------------------------------------------------------------------------------------


def attention(options: Attention) -> View:
    model, trained = load(options.path, options)
    tokens_T = encode(trained, "--prompt", options.prompt)
    layers = check_choice("--layer", options.layer, model.config.num_layers)
    heads = check_choice("--head", options.head, model.config.num_heads)
    if (count := len(layers) * len(heads) * len(tokens_T) ** 2) > MAX_NUMBERS:
        raise InputError(f"{count:,} weights are more than {MAX_NUMBERS:,}; give --layer, --head or a shorter --prompt")
    kept: dict[tuple[int, int], Tensor] = {}

    def see(layer: int, weights_BHTT: Tensor) -> None:
        kept.update({(layer, head): weights_BHTT[0, head].cpu() for head in heads if layer in layers})

    hooks.see_attention(model, tokens_T[None], see)
    record = header(options, trained, tokens_T)
    texts = record["texts"]
    record["heads"] = [{"layer": i, "head": h, "weights": numbers(w_TT)} for (i, h), w_TT in kept.items()]
    if len(kept) == 1:
        rows = [list(COLUMNS_OF_A_HEAD)]
        for place, row_T in enumerate(next(iter(kept.values()))):
            rows.append([str(place), cell(texts[place]), looked_at(row_T[: place + 1], texts)])
    else:
        rows = [list(COLUMNS_OF_HEADS)]
        for (layer, head), weights_TT in kept.items():
            means = weights_TT.diagonal().mean(), weights_TT.diagonal(-1).mean(), weights_TT[1:, 0].mean()
            rows.append([str(layer), str(head), *(f"{mean:.3f}" for mean in means), looked_at(weights_TT[-1], texts)])
    return View(markdown(rows), record, lambda figure: heatmaps.attention(figure, kept, texts))


def looked_at(weights_T: Tensor, texts: Sequence[str]) -> str:
    """The three tokens that get most, with their places."""
    most = weights_T.topk(min(3, len(weights_T)))
    found = zip(most.values.tolist(), most.indices.tolist(), strict=True)
    return ", ".join(f"{place} {cell(texts[place])} ({weight:.2f})" for weight, place in found)


def logit_lens(options: LogitLens) -> View:
    model, trained = load(options.path, options)
    tokens_T = encode(trained, "--prompt", options.prompt)
    if not 1 <= options.top_k <= model.config.vocab_size:
        raise InputError(f"--top-k {options.top_k} must be at least 1 and at most the vocabulary's")
    record = header(options, trained, tokens_T) | {"layers": []}
    rows = [["after", "loss", "mean rank", "likeliest after the last token (probability)"]]
    for name, x_TD in zip(
        layer_names(model.config.num_layers), hooks.streams(model, tokens_T[None])[:, 0], strict=True
    ):
        log_p_TV = hooks.lens_logits(model, x_TD).log_softmax(dim=1)
        most = log_p_TV.topk(options.top_k, dim=1)
        next_t1 = log_p_TV[:-1].gather(1, tokens_T[1:, None])
        ranks_t = (log_p_TV[:-1] > next_t1).sum(dim=1)
        top_tokens, top_probabilities = most.indices.tolist(), numbers(most.values.exp())
        layer = {
            "after": name,
            "top_tokens": top_tokens,
            "top_texts": [texts_of(trained.tokenizer, ids) for ids in top_tokens],
            "top_probabilities": top_probabilities,
            "next_ranks": ranks_t.tolist(),
            "next_losses": numbers(-next_t1[:, 0]),
        }
        record["layers"].append(layer)
        likeliest = list(zip(layer["top_texts"][-1], top_probabilities[-1], strict=True))[:3]
        said = ", ".join(f"{cell(text)} ({probability:.2f})" for text, probability in likeliest)
        rows.append([name, f"{-next_t1.mean():.4f}", f"{ranks_t.double().mean():.1f}", said])
    return View(markdown(rows), record, lambda figure: heatmaps.logit_lens(figure, record))


def text_of(options: Ablate) -> tuple[str, str]:
    """The flag that gives it, and as much of the text as --max-tokens tokens can be."""
    if (options.prompt is None) == (options.file is None):
        raise InputError("give --prompt or --file, and not both")
    if options.max_tokens < 2:
        raise InputError(f"--max-tokens {options.max_tokens} must be at least 2")
    if options.file is None:
        return "--prompt", options.prompt or ""
    try:
        with reading_from(options.file), options.file.open(encoding="utf-8", newline="") as file:
            # GPT-2's longest tokens, runs of one character, have 128; a book's have 4 on average.
            return f"--file {options.file}", file.read(128 * options.max_tokens)
    except UnicodeDecodeError as error:
        raise InputError(f"--file {options.file}: not UTF-8 ({error.reason} at byte {error.start})") from error


def windows_of(trained: TrainedModel, flag: str, text: str, max_tokens: int) -> Tensor:
    """[B, S]: neighbours share one token, so that each but the first of all is scored once; the rest is left out."""
    try:
        tokens = encode_prompt(trained.tokenizer, text)[: max_tokens + 1] if text else []
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error
    if len(tokens) < 2:
        raise InputError(f"{flag} has {len(tokens)} tokens; a loss needs at least 2")
    length = min(trained.model.config.context_len, len(tokens) - 1)
    found = torch.tensor(tokens, device=trained.model.lm_head.weight.device).unfold(0, length + 1, length)
    return found.contiguous()


def ablate(options: Ablate) -> View:
    flag, text = text_of(options)
    model, trained = load(options.path, options)
    windows_BS = windows_of(trained, flag, text, options.max_tokens)
    instead = hooks.zeros(model) if options.by == "zero" else hooks.means(model, windows_BS)
    whole_BT = hooks.losses(model, windows_BS).double()
    parts = []
    for layer, head, losses_BT in hooks.losses_without_each(model, windows_BS, instead):
        change_BT = losses_BT.double() - whole_BT
        error = numbers(change_BT.std() / math.sqrt(change_BT.numel())) if change_BT.numel() > 1 else 0.0
        loss, change = numbers(losses_BT.mean()), numbers(change_BT.mean())
        parts.append({"layer": layer, "head": head, "loss": loss, "change": change, "standard_error": error})
    record: dict[str, Any] = {"model": options.path, "step": trained.step, "by": options.by}
    record |= {"num_tokens": whole_BT.numel(), "loss": numbers(whole_BT.mean()), "parts": parts}
    rows = [list(COLUMNS_OF_PARTS)]
    for part in sorted(parts, key=lambda part: -part["change"]):
        name = "MLP" if part["head"] is None else f"head {part['head']}"
        change = [f"{part['loss']:.4f}", f"{part['change']:+.4f}", f"{part['standard_error']:.4f}"]
        rows.append([str(part["layer"]), name, *change])
    first = f"Loss of {whole_BT.numel():,} tokens: {record['loss']:.4f}. Without one part each, by {options.by}:"
    return View(f"{first}\n\n{markdown(rows)}", record, lambda figure: heatmaps.ablation(figure, parts))


def patch(options: Patch) -> View:
    model, trained = load(options.path, options)
    clean_T, corrupt_T = (
        encode(trained, flag, text) for flag, text in (("--clean", options.clean), ("--corrupt", options.corrupt))
    )
    if len(clean_T) != len(corrupt_T):
        raise InputError(f"--clean has {len(clean_T)} tokens, --corrupt {len(corrupt_T)}; give prompts of as many")
    if torch.equal(clean_T, corrupt_T):
        raise InputError("--clean and --corrupt are the same tokens; give prompts that differ")
    last_BV = hooks.last_logits(model, torch.stack([clean_T, corrupt_T]))
    answers = answers_of(options, trained.tokenizer, last_BV)
    names = [cell(shown(trained.tokenizer, answer)) for answer in answers]

    def difference(logits: Tensor) -> Tensor:
        return (logits[..., answers[0]] - logits[..., answers[1]]).double().cpu()

    clean, corrupt = numbers(difference(last_BV))
    if abs(clean - corrupt) < LEAST_DIFFERENCE:
        raise InputError(f"--answers: the logits of {' and '.join(names)} differ alike after both; name others")
    patch_part = hooks.patch_stream if options.part == "stream" else hooks.patch_heads
    of_first, of_second = patch_part(model, clean_T, corrupt_T, answers).unbind(-1)
    patched = (of_first - of_second).double().cpu()
    restored = (patched - corrupt) / (clean - corrupt)
    record = header(options, trained, clean_T) | {
        "part": options.part,
        "corrupt_tokens": corrupt_T.tolist(),
        "corrupt_texts": texts_of(trained.tokenizer, corrupt_T.tolist()),
        "answers": answers,
        "clean": clean,
        "corrupt": corrupt,
        "patched": numbers(patched),
        "restored": numbers(restored),
    }
    if options.part == "stream":
        columns = layer_names(model.config.num_layers)
        positions = [
            f"{place} {new}" if new == old else f"{place} {old} -> {new}"
            for place, (new, old) in enumerate(zip(record["texts"], record["corrupt_texts"], strict=True))
        ]
        rows = [
            ["at", *columns],
            *([cell(p), *map(as_part, row)] for p, row in zip(positions, restored.T, strict=True)),
        ]
    else:
        positions = [f"head {head}" for head in range(model.config.num_heads)]
        columns = [f"layer {layer}" for layer in range(model.config.num_layers)]
        rows = [["layer", *positions], *([str(i), *map(as_part, row)] for i, row in enumerate(restored))]
    first = (
        f"Logit of {names[0]} less that of {names[1]}: {clean:+.3f} clean, {corrupt:+.3f} corrupt. Restored, as a part:"
    )
    return View(
        f"{first}\n\n{markdown(rows)}", record, lambda figure: heatmaps.patching(figure, restored, columns, positions)
    )


def as_part(value: Tensor) -> str:
    return f"{round(value.item(), 2) + 0.0:.2f}"  # not -0.00


def answers_of(options: Patch, tokenizer: Tokenizer, last_BV: Tensor) -> list[int]:
    if options.answers is None:
        answers: list[int] = last_BV.argmax(dim=1).tolist()
        if answers[0] == answers[1]:
            raise InputError(
                f"both prompts are most likely continued by {shown(tokenizer, answers[0])}; give --answers A B"
            )
        return answers
    answers = []
    for text in options.answers:
        try:
            tokens = tokenizer.encode(text).tolist()
        except InputError as error:
            raise InputError(f"--answers {text!r}: {error}") from error
        if len(tokens) != 1:
            raise InputError(f"--answers {text!r} is {len(tokens)} tokens; each must be one")
        answers += tokens
    if answers[0] == answers[1]:
        raise InputError("--answers must be two different tokens")
    return answers


# --- The command ------------------------------------------------------------------------------------------------------


def view_of(options: Options) -> View:
    match options:
        case Attention():
            return attention(options)
        case LogitLens():
            return logit_lens(options)
        case Ablate():
            return ablate(options)
        case Patch():
            return patch(options)
        case Induction():
            return induction(options)


def parse(args: Sequence[str] | None) -> Options:
    command = (
        Annotated[Attention, tyro.conf.subcommand("attention")]
        | Annotated[LogitLens, tyro.conf.subcommand("logit-lens")]
        | Annotated[Ablate, tyro.conf.subcommand("ablate")]
        | Annotated[Patch, tyro.conf.subcommand("patch")]
        | Annotated[Induction, tyro.conf.subcommand("induction")]
    )
    options: Options = tyro.cli(command, args=args, description=__doc__)
    return options


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors("lens"):
        options = parse(args)
        figure: Any = None if options.out is None else new_figure()
        mark = f"lens {options.name}"
        if options.into is not None:
            put_into(options.into, mark, None)
        view = view_of(options)
        print(view.text)
        if options.into is not None:
            put_into(options.into, mark, view.text)
        if options.out is not None:
            with writing_to(options.out):
                options.out.mkdir(parents=True, exist_ok=True)
                write_json_atomically(options.out / f"{options.name}.json", view.record)
            view.draw(figure)
            with writing_to(options.out):
                figure.savefig(options.out / f"{options.name}.png", dpi=120)
            print(options.out / f"{options.name}.png")


if __name__ == "__main__":
    main()
