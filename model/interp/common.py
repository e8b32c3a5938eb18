"""What every look of model/lens.py takes and gives: a trained model and a prompt; a table, numbers and a picture."""

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
    """What every look has."""

    path: Annotated[str, tyro.conf.Positional]
    """RUN directory, RUN@STEP, the path of one checkpoint, or a Hugging Face folder of GPT-2's."""
    out: Path | None = None
    """Folder for the picture and the numbers, NAME.png and NAME.json; None: only print."""
    into: Path | None = None
    """A page, to put what is printed between its <!-- lens NAME --> and <!-- end -->."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the products."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""


class View(NamedTuple):
    """What a look gives: printed, as numbers, and as a picture (which is drawn into a matplotlib figure)."""

    text: str
    record: dict[str, Any]
    draw: Callable[[Any], None]


def load(path: str, options: Common) -> tuple[GPT, TrainedModel]:
    check_device(options.device)
    trained = load_model(path, device=options.device, dtype=DTYPES[options.dtype])
    if not isinstance(trained.model, GPT):
        kind = trained.model.config.kind
        raise InputError(f"{path}: --model.kind {kind} has no blocks to look into; give a run of --model.kind gpt")
    return trained.model, trained


def encode(trained: TrainedModel, flag: str, text: str) -> Tensor:
    """The prompt as generate.py gives it to the model, [T]; InputError where it is not 2 tokens to a whole context."""
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


def numbers(values: Tensor) -> Any:
    """As nested lists for JSON; InputError where one is not finite."""
    if not values.isfinite().all():
        raise InputError("the model's numbers are not finite; take another checkpoint")
    return values.double().round(decimals=6).tolist()


def shown(tokenizer: Tokenizer, token: int) -> str:
    """A token's text in quotes, whatever it holds."""
    if token == tokenizer.eot_id:
        return EOT
    return repr(tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace"))


def texts_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    return [shown(tokenizer, token) for token in tokens]


def cell(text: str) -> str:
    """For a table of Markdown."""
    return text.replace("|", "\\|").replace("`", "\\`")


def header(options: Common, trained: TrainedModel, tokens_T: Tensor) -> dict[str, Any]:
    tokens = tokens_T.tolist()
    return {"model": options.path, "step": trained.step, "tokens": tokens, "texts": texts_of(trained.tokenizer, tokens)}


def layer_names(num_layers: int) -> list[str]:
    return ["embedding", *(f"block {layer}" for layer in range(num_layers))]
