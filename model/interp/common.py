"""Options, loading and output that all inspections of model/lens.py share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor

from common.errors import InputError
from data_prep.tokenizer import EOT, Tokenizer
from model.checkpoint import TrainedModel, check_device, load_model
from model.generate import DTYPES, encode_prompt
from model.gpt import GPT


@dataclass(frozen=True, kw_only=True)
class Common:
    """The options of every inspection."""

    path: Annotated[str, tyro.conf.Positional]
    """A run directory, RUN@STEP, the path of one checkpoint, or a Hugging Face folder of GPT-2."""
    out: Path | None = None
    """Folder for the picture NAME.png and the numbers NAME.json; None: only print."""
    into: Path | None = None
    """Page in which the printed text replaces what stands between <!-- lens NAME --> and <!-- end -->."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of the matrix products."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device on which the model runs."""


class Result(NamedTuple):
    """The result of an inspection: printed text, numbers for JSON, and a function that draws into a figure."""

    text: str
    record: dict[str, Any]
    draw: Callable[[Any], None]


def load_gpt(path: str, options: Common) -> tuple[GPT, TrainedModel]:
    """Return the trained model, also by its type GPT. Raise InputError for any other kind of model."""
    check_device(options.device)
    trained = load_model(path, device=options.device, dtype=DTYPES[options.dtype])
    if not isinstance(trained.model, GPT):
        kind = trained.model.config.kind
        raise InputError(f"{path}: --model.kind {kind} has no blocks to inspect; give a run of --model.kind gpt")
    return trained.model, trained


def prompt_tokens(trained: TrainedModel, flag: str, text: str) -> Tensor:
    """Return the tokens that generate.py would give to the model, [T]. Raise InputError unless 2 <= T <= context."""
    if not text:
        raise InputError(f"{flag} is empty; give some text")
    try:
        tokens = encode_prompt(trained.tokenizer, text)
    except InputError as error:
        raise InputError(f"{flag} {text!r}: {error}") from error
    context_len = trained.model.config.context_len
    if not 2 <= len(tokens) <= context_len:
        raise InputError(f"{flag} has {len(tokens)} tokens; the model's context takes 2 to {context_len}")
    return torch.tensor(tokens, device=trained.model.lm_head.weight.device)


def json_numbers(values: Tensor) -> Any:
    """Return nested lists, rounded to six decimals. Raise InputError if a number is not finite."""
    if not values.isfinite().all():
        raise InputError("the model's numbers are not finite; give another checkpoint")
    return values.double().round(decimals=6).tolist()


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text in quotes, with escapes for bytes that are no text."""
    if token == tokenizer.eot_id:
        return EOT
    return repr(tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace"))


def token_texts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    return [token_text(tokenizer, token) for token in tokens]


def cell(text: str) -> str:
    """Return `text` with escapes for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("`", "\\`")


def prompt_record(options: Common, trained: TrainedModel, tokens_T: Tensor) -> dict[str, Any]:
    """Return the first entries of the JSON of every inspection that has a prompt."""
    tokens = tokens_T.tolist()
    texts = token_texts(trained.tokenizer, tokens)
    return {"model": options.path, "step": trained.step, "tokens": tokens, "texts": texts}


def stream_names(num_layers: int) -> list[str]:
    """Return the names of residual streams 0 to L."""
    return ["embedding", *(f"block {layer}" for layer in range(num_layers))]
