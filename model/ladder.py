"""The rungs below GPT: each a whole language model, short enough to read at once, with one idea more than the last.

    python train/main.py shakespeare-char-cpu --model.kind bigram       # trains any of them, as it trains a GPT
    python launch/sweep.py ladder                                       # all: a table, a picture, a sample of each
    python model/ladder.py data/tinyshakespeare                         # stoi, itos, and a bigram by counting

    bigram   a table: what comes after this token
    head     one head of attention: what came before, and where
    heads    several heads: several questions at once
    block    residuals, norms and an MLP around them
    gpt      model/gpt.py: blocks on blocks

docs/ladder.md is the course. Letters as in model/gpt.py; there is no padding of the vocabulary here.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from common.errors import InputError, one_line_errors
from data_prep.manifest import open_split
from data_prep.tokenizer import CharTokenizer, load_tokenizer
from model.base import INIT_STD, LanguageModel
from model.config import ModelConfig
from model.gpt import GPT, LayerNorm, Linear


def make_model(config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model that `config` describes, without initial values."""
    return MODELS[config.kind](config, compute_dtype=compute_dtype)


class CourseModel(LanguageModel):
    """Matrices begin as normal(0, 1 / inputs), so that numbers keep their size from layer to layer; the head small, so
    that the first loss is ln V, that of knowing nothing."""

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        if "norm" in name:
            return torch.ones(shape)
        std = INIT_STD if name == "lm_head.weight" else 1.0 if "embedding" in name else 1 / math.sqrt(shape[1])
        return torch.zeros(shape).normal_(0.0, std, generator=generator)


class Bigram(CourseModel):
    """Row i of a V x V table holds the logits of what comes after token i. Nothing else is read."""

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, compute_dtype=compute_dtype)
        self.lm_head = Linear(config.vocab_size, config.vocab_size, bias=False)

    def hidden_states(self, tokens_BT: Tensor) -> Tensor:
        """One-hot: the product with the head's matrix is then the look-up of a row of its transpose."""
        self.check_length(tokens_BT)
        return F.one_hot(tokens_BT, self.config.vocab_size).to(self.compute_dtype)


class Head(nn.Module):
    """Causal self-attention, x_BTD -> y_BTK: each token asks (query), can be asked (key), and has to give (value)."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (Linear(width, head_size, bias=False) for _ in range(3))

    def forward(self, x_BTD: Tensor) -> Tensor:
        T = x_BTD.shape[1]
        q_BTK, k_BTK, v_BTK = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        scores_BTT = q_BTK @ k_BTK.transpose(1, 2) / math.sqrt(q_BTK.shape[2])
        is_future_TT = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).triu(1)
        weights_BTT = scores_BTT.masked_fill(is_future_TT, -torch.inf).softmax(dim=2)  # a row adds up to 1
        return weights_BTT @ v_BTK


class OneHead(CourseModel):
    """The next token from a mean of what all tokens so far have to give, weighted by whom the last one asks for."""

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, compute_dtype=compute_dtype)
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_len, config.width)
        self.heads = self.make_heads()
        self.lm_head = Linear(config.width, config.vocab_size, bias=False)

    def make_heads(self) -> nn.ModuleList:
        return nn.ModuleList([Head(self.config.width, self.config.width)])

    def hidden_states(self, tokens_BT: Tensor) -> Tensor:
        return self.attend(self.embed(tokens_BT))

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """What a token is, and where it stands: x_BTD."""
        positions_T = torch.arange(self.check_length(tokens_BT), device=tokens_BT.device)
        return (self.token_embedding(tokens_BT) + self.position_embedding(positions_T)).to(self.compute_dtype)

    def attend(self, x_BTD: Tensor) -> Tensor:
        return torch.cat([head(x_BTD) for head in self.heads], dim=2)


class Heads(OneHead):
    """Several heads, each with its own share of the width, so that they cost what one does."""

    def make_heads(self) -> nn.ModuleList:
        width, num_heads = self.config.width, self.config.num_heads
        return nn.ModuleList(Head(width, width // num_heads) for _ in range(num_heads))


class OneBlock(Heads):
    """Attention and an MLP, each of which reads the normalised stream and adds to it what it found."""

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, compute_dtype=compute_dtype)
        self.norm_1, self.norm_2, self.norm_3 = (LayerNorm(config.width, bias=False) for _ in range(3))
        self.mix = Linear(config.width, config.width, bias=False)  # of what the heads found
        self.up = Linear(config.width, 4 * config.width, bias=False)
        self.down = Linear(4 * config.width, config.width, bias=False)

    def hidden_states(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embed(tokens_BT)
        x_BTD = x_BTD + self.mix(self.attend(self.norm_1(x_BTD)))
        x_BTD = x_BTD + self.down(F.gelu(self.up(self.norm_2(x_BTD)), approximate="tanh"))
        return self.norm_3(x_BTD)


MODELS: dict[str, type[LanguageModel]] = {
    "bigram": Bigram,
    "head": OneHead,
    "heads": Heads,
    "block": OneBlock,
    "gpt": GPT,
}


# --- The command ------------------------------------------------------------------------------------------------------

EVERYTHING_ONCE = 1  # added to every count, so that no pair that comes up later has a probability of 0


@dataclass(frozen=True)
class Options:
    """Characters as numbers, and the bigram without any training: by counting."""

    dir: Annotated[Path, tyro.conf.Positional]
    """Data directory of characters (data_prep/textfiles.py --tokenizer char)."""


def count_pairs(ids: npt.NDArray[np.integer], vocab_size: int) -> npt.NDArray[np.int64]:
    """How often each id comes after each: int64 [V, V], rows are what comes first."""
    pairs = ids[:-1].astype(np.int64) * vocab_size + ids[1:]
    return np.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size)


def counted_loss(seen: npt.NDArray[np.int64], asked: npt.NDArray[np.int64]) -> float:
    """Mean loss in nats of the pairs `asked` under the frequencies of the pairs `seen`: what training a bigram can
    reach, since no other table gives the pairs that it was counted from a lower loss."""
    counts = seen + EVERYTHING_ONCE
    losses = -np.log(counts / counts.sum(axis=1, keepdims=True))
    return float((losses * asked).sum() / asked.sum())


def report(directory: Path) -> str:
    """All that the command prints."""
    streams = {split: open_split(directory, split) for split in ("train", "val")}
    tokenizer = load_tokenizer(directory)
    if not isinstance(tokenizer, CharTokenizer):
        raise InputError(f"{directory} has no character tokenizer; prepare it with --tokenizer char")
    stoi, itos, vocab_size = tokenizer.stoi, tokenizer.itos, tokenizer.vocab_size
    ids = {split: stream.read(0, len(stream)) for split, stream in streams.items()}
    seen, asked = (count_pairs(ids[split], vocab_size) for split in ("train", "val"))
    first = ids["train"][:24].tolist()
    pairs = np.argsort(seen, axis=None)[::-1][:5]
    lines = [
        f"{vocab_size} characters: {''.join(itos)!r}",
        "stoi: " + ", ".join(f"{character!r}: {stoi[character]}" for character in itos[:8]) + ", ...",
        f"the text begins {''.join(itos[i] for i in first)!r}",
        f"as tokens       {first}",
        "",
        "most frequent pairs: "
        + ", ".join(f"{itos[p // vocab_size] + itos[p % vocab_size]!r}" for p in pairs.tolist()),
        f"loss of knowing nothing, ln {vocab_size}:           {math.log(vocab_size):.4f}",
        f"loss of the counted bigram, train:        {counted_loss(seen, seen):.4f}",
        f"loss of the counted bigram, validation:   {counted_loss(seen, asked):.4f}",
    ]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors("ladder"):
        options = tyro.cli(Options, args=args, description=__doc__)
        print(report(options.dir))


if __name__ == "__main__":
    main()
