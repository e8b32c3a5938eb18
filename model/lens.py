"""Inspect a trained GPT: attention, logit lens, ablation, activation patching, induction heads.

    python model/lens.py attention runs/NAME --prompt "The cat sat"        # attention weights of every head
    python model/lens.py attention runs/NAME --prompt "The cat sat" --layer 1 --head 2 --out looked
    python model/lens.py logit-lens runs/NAME --prompt "The cat sat"       # next token by each layer
    python model/lens.py ablate runs/NAME --file some.txt                  # loss without each head and MLP
    python model/lens.py patch runs/NAME --clean "The cat" --corrupt "The dog" --answers " m" " b"
    python model/lens.py induction runs/NAME --ablate                      # which heads repeat earlier text
    python model/lens.py induction runs/NAME --every-checkpoint            # when they learned it

A model is named as for model/generate.py: a run, RUN@STEP, a checkpoint or a Hugging Face folder. Layers and heads
count from 0. The residual stream before all blocks is called "embedding", and after them "block 0", "block 1" and so
on. Each inspection prints a table. With --out DIR it also writes a picture, NAME.png (needs the extra `plots`), and the
numbers, NAME.json, rounded to six decimals. The JSON has `model` and `step` (null for a Hugging Face folder), for a
prompt its T `tokens` and their `texts`, and

    attention    heads: [{layer, head, weights [T][T], rows are queries}]; for a single head the file is
                 attention-LAYER.HEAD.json
    logit-lens   layers: [{after, top_tokens, top_texts and top_probabilities [T][--top-k], next_ranks (0: likeliest)
                 and next_losses [T - 1]}]; the last layer is the model's own output
    ablate       by, num_tokens, loss, parts: [{layer, head (null: the MLP), loss, change, standard_error (of the
                 change, over tokens)}]
    patch        part, corrupt_tokens, corrupt_texts, answers [2], clean and corrupt (logit of the first answer minus
                 logit of the second, after the last token), patched [L + 1][T] or [L][H], and restored, which is
                 (patched - corrupt) / (clean - corrupt)
    induction    half, num_sequences, seed, checkpoints: [{step, induction [L][H], previous [L][H], loss_first,
                 loss_second; with --ablate loss_first_without and loss_second_without [L][H]}]. With
                 --every-checkpoint the file is induction-checkpoints.json, and `step` is the last checkpoint's

An inspection of a model of a few million parameters takes some seconds. Ablation runs one pass for each head and MLP.
"""

import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro
from torch import Tensor

from common.byte_order import HEAD_BYTES, left_out, mark_bytes
from common.errors import InputError, one_line_errors, reading_from, warn, writing_to
from common.files import write_json_atomically
from common.reading import open_regular, require_place
from common.tables import markdown, new_figure, put_into
from data_prep.tokenizer import Tokenizer
from model.checkpoint import TrainedModel
from model.generate import encode_prompt
from model.interp import heatmaps, hooks
from model.interp.common import (
    Common,
    Result,
    cell,
    json_numbers,
    load_gpt,
    prompt_record,
    prompt_tokens,
    stream_names,
    token_text,
    token_texts,
)
from model.interp.induction import Induction, inspect_induction

MAX_NUMBERS = 10_000_000  # in a JSON file, which then has about 200 MB
MIN_LOGIT_CHANGE = 1e-4  # between the two prompts; a smaller change may be rounding
COLUMNS_OF_HEADS = ("layer", "head", "on itself", "on the one before", "on the first", "the last looks at (weight)")
COLUMNS_OF_PARTS = ("layer", "without", "loss", "change", "+-")
COLUMNS_OF_A_HEAD = ("place", "token", "looks at (weight)")


@dataclass(frozen=True, kw_only=True)
class Attention(Common):
    """Show the attention weights of each head."""

    prompt: str
    """Text that fits into the context."""
    layer: int | None = None
    """Layer to show; None: all layers."""
    head: int | None = None
    """Head to show, of --layer or of every layer; None: all heads."""

    @property
    def name(self) -> str:
        return "attention" if self.layer is None or self.head is None else f"attention-{self.layer}.{self.head}"


@dataclass(frozen=True, kw_only=True)
class LogitLens(Common):
    """Show which next tokens the model would predict if it ended after each layer."""

    prompt: str
    """Text that fits into the context."""
    top_k: int = 5
    """Number of likeliest tokens in the JSON for each layer and position."""
    name = "logit-lens"


@dataclass(frozen=True, kw_only=True)
class Ablate(Common):
    """Measure the loss of a text without each head and each MLP."""

    prompt: str | None = None
    """Text of at least two tokens; a text longer than the context is cut into sequences."""
    file: Path | None = None
    """UTF-8 file with the text, instead of --prompt."""
    max_tokens: int = 8192
    """Number of the text's tokens to score."""
    by: Literal["zero", "mean"] = "zero"
    """Output of an ablated part: zero, or the part's mean output over the text."""
    name = "ablate"


@dataclass(frozen=True, kw_only=True)
class Patch(Common):
    """Find the activations of one prompt that make the model answer another prompt like the first."""

    clean: str
    """Prompt from which activations are taken."""
    corrupt: str
    """Prompt into which they are put; it must have as many tokens as --clean."""
    answers: tuple[str, str] | None = None
    """Two tokens whose logits are compared; None: the likeliest after --clean and the likeliest after --corrupt."""
    part: Literal["stream", "heads"] = "stream"
    """stream: the residual stream after each layer at each token; heads: each head's outputs at all tokens."""
    name = "patch"


Options = Attention | LogitLens | Ablate | Patch | Induction


def chosen(flag: str, index: int | None, number: int) -> range:
    """Return the chosen index, or all if it is None. Raise InputError if the model does not have it."""
    if index is not None and not 0 <= index < number:
        raise InputError(f"{flag} {index}: the model has 0 to {number - 1}")
    return range(number) if index is None else range(index, index + 1)


# --- The inspections --------------------------------------------------------------------------------------------------


def inspect_attention(options: Attention) -> Result:
    model, trained = load_gpt(options.path, options)
    tokens_T = prompt_tokens(trained, "--prompt", options.prompt)
    layers = chosen("--layer", options.layer, model.config.num_layers)
    heads = chosen("--head", options.head, model.config.num_heads)
    if (count := len(layers) * len(heads) * len(tokens_T) ** 2) > MAX_NUMBERS:
        raise InputError(f"{count:,} weights are more than {MAX_NUMBERS:,}; give --layer, --head or a shorter --prompt")
    weights: dict[tuple[int, int], Tensor] = {}

    def keep(layer: int, weights_BHTT: Tensor) -> None:
        weights.update({(layer, head): weights_BHTT[0, head].cpu() for head in heads if layer in layers})

    hooks.read_attention(model, tokens_T[None], keep)
    record = prompt_record(options, trained, tokens_T)
    texts = record["texts"]
    record["heads"] = [{"layer": i, "head": h, "weights": json_numbers(w_TT)} for (i, h), w_TT in weights.items()]
    if len(weights) == 1:
        rows = [list(COLUMNS_OF_A_HEAD)]
        for position, row_T in enumerate(next(iter(weights.values()))):
            rows.append([str(position), cell(texts[position]), largest_weights(row_T[: position + 1], texts)])
    else:
        rows = [list(COLUMNS_OF_HEADS)]
        for (layer, head), weights_TT in weights.items():
            means = weights_TT.diagonal().mean(), weights_TT.diagonal(-1).mean(), weights_TT[1:, 0].mean()
            largest = largest_weights(weights_TT[-1], texts)
            rows.append([str(layer), str(head), *(f"{mean:.3f}" for mean in means), largest])
    return Result(markdown(rows), record, lambda figure: heatmaps.attention(figure, weights, texts))


def largest_weights(weights_T: Tensor, texts: Sequence[str]) -> str:
    """Return the three tokens with the largest weights, with their positions."""
    top = weights_T.topk(min(3, len(weights_T)))
    pairs = zip(top.values.tolist(), top.indices.tolist(), strict=True)
    return ", ".join(f"{position} {cell(texts[position])} ({weight:.2f})" for weight, position in pairs)


def inspect_logit_lens(options: LogitLens) -> Result:
    model, trained = load_gpt(options.path, options)
    tokens_T = prompt_tokens(trained, "--prompt", options.prompt)
    if not 1 <= options.top_k <= model.config.vocab_size:
        raise InputError(f"--top-k {options.top_k} must be at least 1 and at most {model.config.vocab_size}")
    record = prompt_record(options, trained, tokens_T) | {"layers": []}
    rows = [["after", "loss", "mean rank", "likeliest after the last token (probability)"]]
    streams_LTD = hooks.residual_streams(model, tokens_T[None])[:, 0]
    for name, x_TD in zip(stream_names(model.config.num_layers), streams_LTD, strict=True):
        log_p_TV = hooks.lens_logits(model, x_TD).log_softmax(dim=1)
        top = log_p_TV.topk(options.top_k, dim=1)
        next_t1 = log_p_TV[:-1].gather(1, tokens_T[1:, None])
        ranks_t = (log_p_TV[:-1] > next_t1).sum(dim=1)
        top_tokens, top_probabilities = top.indices.tolist(), json_numbers(top.values.exp())
        layer = {
            "after": name,
            "top_tokens": top_tokens,
            "top_texts": [token_texts(trained.tokenizer, ids) for ids in top_tokens],
            "top_probabilities": top_probabilities,
            "next_ranks": ranks_t.tolist(),
            "next_losses": json_numbers(-next_t1[:, 0]),
        }
        record["layers"].append(layer)
        likeliest = list(zip(layer["top_texts"][-1], top_probabilities[-1], strict=True))[:3]
        top_cell = ", ".join(f"{cell(text)} ({probability:.2f})" for text, probability in likeliest)
        rows.append([name, f"{-next_t1.mean():.4f}", f"{ranks_t.double().mean():.1f}", top_cell])
    return Result(markdown(rows), record, lambda figure: heatmaps.logit_lens(figure, record))


def read_text(options: Ablate) -> tuple[str, str]:
    """Return the flag that gives the text, and at least as much of the text as --max-tokens tokens."""
    if (options.prompt is None) == (options.file is None):
        raise InputError("give --prompt or --file, and not both")
    if options.max_tokens < 2:
        raise InputError(f"--max-tokens {options.max_tokens} must be at least 2")
    if options.file is None:
        return "--prompt", options.prompt or ""
    try:
        with open_regular(options.file) as file, reading_from(options.file):
            if mark := mark_bytes(file.read(HEAD_BYTES), str(options.file), flag="--file"):
                warn("lens", left_out(f"--file {options.file}"))
            file.seek(mark)
            # GPT-2's longest tokens, runs of one character, have 128 characters; in a book they have 4 on average.
            with io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
                return f"--file {options.file}", text.read(128 * options.max_tokens)
    except UnicodeDecodeError as error:
        raise InputError(f"--file {options.file}: not UTF-8 ({error.reason} at byte {error.start})") from error


def cut_into_sequences(trained: TrainedModel, flag: str, text: str, max_tokens: int) -> Tensor:
    """Return the text's tokens as sequences [B, S]; an incomplete last sequence is left out.

    Neighbours share one token, so that each token but the first is scored once.
    """
    try:
        tokens = encode_prompt(trained.tokenizer, text)[: max_tokens + 1] if text else []
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error
    if len(tokens) < 2:
        raise InputError(f"{flag} has {len(tokens)} tokens; a loss needs at least 2")
    length = min(trained.model.config.context_len, len(tokens) - 1)
    all_tokens = torch.tensor(tokens, device=trained.model.lm_head.weight.device)
    return all_tokens.unfold(0, length + 1, length).contiguous()


def inspect_ablation(options: Ablate) -> Result:
    flag, text = read_text(options)
    model, trained = load_gpt(options.path, options)
    sequences_BS = cut_into_sequences(trained, flag, text, options.max_tokens)
    by_zero = options.by == "zero"
    replacements = hooks.zero_replacements(model) if by_zero else hooks.mean_replacements(model, sequences_BS)
    intact_BT = hooks.losses(model, sequences_BS).double()
    parts = []
    for layer, head, losses_BT in hooks.losses_without_each(model, sequences_BS, replacements):
        change_BT = losses_BT.double() - intact_BT
        error = json_numbers(change_BT.std() / math.sqrt(change_BT.numel())) if change_BT.numel() > 1 else 0.0
        loss, change = json_numbers(losses_BT.mean()), json_numbers(change_BT.mean())
        parts.append({"layer": layer, "head": head, "loss": loss, "change": change, "standard_error": error})
    record: dict[str, Any] = {"model": options.path, "step": trained.step, "by": options.by}
    record |= {"num_tokens": intact_BT.numel(), "loss": json_numbers(intact_BT.mean()), "parts": parts}
    rows = [list(COLUMNS_OF_PARTS)]
    for part in sorted(parts, key=lambda part: -part["change"]):
        name = "MLP" if part["head"] is None else f"head {part['head']}"
        change = [f"{part['loss']:.4f}", f"{part['change']:+.4f}", f"{part['standard_error']:.4f}"]
        rows.append([str(part["layer"]), name, *change])
    title = f"Loss of {intact_BT.numel():,} tokens: {record['loss']:.4f}. Without one part each, by {options.by}:"
    return Result(f"{title}\n\n{markdown(rows)}", record, lambda figure: heatmaps.ablation(figure, parts))


def inspect_patches(options: Patch) -> Result:
    model, trained = load_gpt(options.path, options)
    clean_T = prompt_tokens(trained, "--clean", options.clean)
    corrupt_T = prompt_tokens(trained, "--corrupt", options.corrupt)
    if len(clean_T) != len(corrupt_T):
        raise InputError(f"--clean has {len(clean_T)} tokens, --corrupt {len(corrupt_T)}; give prompts of equal length")
    if torch.equal(clean_T, corrupt_T):
        raise InputError("--clean and --corrupt have the same tokens; give prompts that differ")
    last_BV = hooks.last_logits(model, torch.stack([clean_T, corrupt_T]))
    answers = answer_tokens(options, trained.tokenizer, last_BV)
    names = [cell(token_text(trained.tokenizer, answer)) for answer in answers]

    def difference(first_logits: Tensor, second_logits: Tensor) -> Tensor:
        return (first_logits - second_logits).double().cpu()

    clean, corrupt = json_numbers(difference(*last_BV[:, answers].unbind(-1)))
    if abs(clean - corrupt) < MIN_LOGIT_CHANGE:
        raise InputError(
            f"--answers: the logits of {' and '.join(names)} differ by the same after both prompts; give other answers"
        )
    patch_part = hooks.patch_stream if options.part == "stream" else hooks.patch_heads
    patched = difference(*patch_part(model, clean_T, corrupt_T, answers).unbind(-1))
    restored = (patched - corrupt) / (clean - corrupt)
    record = prompt_record(options, trained, clean_T) | {
        "part": options.part,
        "corrupt_tokens": corrupt_T.tolist(),
        "corrupt_texts": token_texts(trained.tokenizer, corrupt_T.tolist()),
        "answers": answers,
        "clean": clean,
        "corrupt": corrupt,
        "patched": json_numbers(patched),
        "restored": json_numbers(restored),
    }
    if options.part == "stream":
        layers = stream_names(model.config.num_layers)
        pairs = zip(record["corrupt_texts"], record["texts"], strict=True)
        changes = (text if former == text else f"{former} -> {text}" for former, text in pairs)
        columns = [f"{position} {change}" for position, change in enumerate(changes)]
        rows = [["at", *layers]]
        rows += [[cell(name), *map(two_decimals, row)] for name, row in zip(columns, restored.T, strict=True)]
    else:
        layers = [f"layer {layer}" for layer in range(model.config.num_layers)]
        columns = [f"head {head}" for head in range(model.config.num_heads)]
        rows = [["layer", *columns], *([str(i), *map(two_decimals, row)] for i, row in enumerate(restored))]
    title = (
        f"Logit of {names[0]} less that of {names[1]}: {clean:+.3f} clean, {corrupt:+.3f} corrupt. Restored, as a part:"
    )
    text = f"{title}\n\n{markdown(rows)}"
    return Result(text, record, lambda figure: heatmaps.patching(figure, restored, layers, columns))


def two_decimals(value: Tensor) -> str:
    return f"{round(value.item(), 2) + 0.0:.2f}"  # Adding 0.0 turns -0.00 into 0.00.


def answer_tokens(options: Patch, tokenizer: Tokenizer, last_BV: Tensor) -> list[int]:
    """Return the two answers of --answers, or the likeliest token after each prompt."""
    if options.answers is None:
        answers: list[int] = last_BV.argmax(dim=1).tolist()
        if answers[0] == answers[1]:
            name = token_text(tokenizer, answers[0])
            raise InputError(f"{name} is the likeliest token after both prompts; give --answers A B")
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


def inspect(options: Options) -> Result:
    """Run the inspection that the options are of."""
    match options:
        case Attention():
            return inspect_attention(options)
        case LogitLens():
            return inspect_logit_lens(options)
        case Ablate():
            return inspect_ablation(options)
        case Patch():
            return inspect_patches(options)
        case Induction():
            return inspect_induction(options)


def parse(args: Sequence[str] | None) -> Options:
    """Return the options of the subcommand that the arguments name."""
    options: Options = tyro.cli(Options, args=args, description=__doc__)
    return options


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; an InputError ends it with one line and exit code 2."""
    with one_line_errors("lens"):
        options = parse(args)
        if options.out is not None:
            require_place(options.out)
        figure: Any = None if options.out is None else new_figure()
        mark = f"lens {options.name}"
        if options.into is not None:
            put_into(options.into, mark, None)  # This raises now, rather than after the work, if the marks are missing.
        result = inspect(options)
        print(result.text)
        if options.into is not None:
            put_into(options.into, mark, result.text)
        if options.out is not None:
            with writing_to(options.out):
                options.out.mkdir(parents=True, exist_ok=True)
                write_json_atomically(options.out / f"{options.name}.json", result.record)
            result.draw(figure)
            with writing_to(options.out):
                figure.savefig(options.out / f"{options.name}.png", dpi=120)
            print(options.out / f"{options.name}.png")


if __name__ == "__main__":
    main()
