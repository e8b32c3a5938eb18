"""The rungs below GPT: complete language models, short to read, each with one idea more than the last.

    python train/main.py shakespeare-char-cpu --model.kind bigram       # train one, as a GPT is trained
    python launch/sweep.py ladder                                       # train all: a table, a picture, samples
    python model/ladder.py data/tinyshakespeare                         # show stoi, itos and a counted bigram

    bigram   a table of what comes after each token
    head     one head of attention over the tokens so far and their positions
    heads    several heads side by side
    block    residuals, norms and an MLP around the heads
    gpt      many blocks in a row: model/gpt.py

The last command takes two seconds on a CPU. For Tiny Shakespeare it prints 65 characters and a validation loss of
2.4819 for the counted bigram. The course is docs/ladder.md. The shape letters are those of model/gpt.py; the
vocabulary has no padding here.
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
from torch import Tensor, nn

from common.errors import InputError, one_line_errors
from common.flags import POSITIONAL, mark_for_tyro
from data_prep.manifest import open_split
from data_prep.tokenizer import CharTokenizer, load_tokenizer
from model.base import INIT_STD, LanguageModel
from model.config import ModelConfig
from model.gpt import GPT
from model.layers import Embedding, LayerNorm, Linear


def make_model(config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Return the model that `config` describes, without initial values."""
    return MODELS[config.kind](config, compute_dtype=compute_dtype)


class CourseModel(LanguageModel):
    """A rung below GPT. Its matrices start as normal(0, 1 / inputs), which keeps the scale from layer to layer.

    The head starts small, so that the first loss is ln V, the loss of a uniform guess.
    """

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        if "norm" in name:
            return torch.ones(shape)
        std = INIT_STD if name == "lm_head.weight" else 1.0 if "embedding" in name else 1 / math.sqrt(shape[1])
        return torch.zeros(shape).normal_(0.0, std, generator=generator)


class Bigram(CourseModel):
    """A V x V table: row i holds the logits of the token after token i. The model reads nothing else."""

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, compute_dtype=compute_dtype)
        self.lm_head = Linear(config.vocab_size, config.vocab_size, bias=False)

    def hidden_states(self, tokens_BT: Tensor) -> Tensor:
        """Return one-hot rows, whose product with the head's matrix looks up rows of its transpose."""
        self.check_length(tokens_BT)
        return F.one_hot(tokens_BT, self.config.vocab_size).to(self.compute_dtype)


class Head(nn.Module):
    """Causal self-attention, x_BTD -> y_BTK. Each token has a query, a key that queries match, and a value to give."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (Linear(width, head_size, bias=False) for _ in range(3))

    def forward(self, x_BTD: Tensor) -> Tensor:
        T = x_BTD.shape[1]
        q_BTK, k_BTK, v_BTK = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        scores_BTT = q_BTK @ k_BTK.transpose(1, 2) / math.sqrt(q_BTK.shape[2])
        is_future_TT = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).triu(1)
        weights_BTT = scores_BTT.masked_fill(is_future_TT, -torch.inf).softmax(dim=2)  # each row adds up to 1
        return weights_BTT @ v_BTK


class OneHead(CourseModel):
    """A model of one head: it predicts from a mean of the values so far, weighted by the last token's query."""

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, compute_dtype=compute_dtype)
        self.token_embedding = Embedding(config.vocab_size, config.width)
        self.position_embedding = Embedding(config.context_len, config.width)
        self.heads = self.make_heads()
        self.lm_head = Linear(config.width, config.vocab_size, bias=False)

    def make_heads(self) -> nn.ModuleList:
        return nn.ModuleList([Head(self.config.width, self.config.width)])

    def hidden_states(self, tokens_BT: Tensor) -> Tensor:
        return self.attend(self.embed(tokens_BT))

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Return the sum of each token's embedding and its position's embedding, x_BTD."""
        positions_T = torch.arange(self.check_length(tokens_BT), device=tokens_BT.device)
        return (self.token_embedding(tokens_BT) + self.position_embedding(positions_T)).to(self.compute_dtype)

    def attend(self, x_BTD: Tensor) -> Tensor:
        return torch.cat([head(x_BTD) for head in self.heads], dim=2)


class Heads(OneHead):
    """A model of several heads. Each has a share of the width, so that together they cost as much as one."""

    def make_heads(self) -> nn.ModuleList:
        width, num_heads = self.config.width, self.config.num_heads
        return nn.ModuleList(Head(width, width // num_heads) for _ in range(num_heads))


class OneBlock(Heads):
    """A model of one block: attention and an MLP read the normalised stream and add their outputs to it."""

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, compute_dtype=compute_dtype)
        self.norm_1, self.norm_2, self.norm_3 = (LayerNorm(config.width, bias=False) for _ in range(3))
        self.mix = Linear(config.width, config.width, bias=False)  # mixes the heads' outputs
        self.up = Linear(config.width, 4 * config.width, bias=False)
        self.down = Linear(4 * config.width, config.width, bias=False)

    def hidden_states(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embed(tokens_BT)
        x_BTD = x_BTD + self.mix(self.attend(self.norm_1(x_BTD)))
        x_BTD = x_BTD + self.down(F.gelu(self.up(self.norm_2(x_BTD)), approximate="tanh"))
        return self.norm_3(x_BTD)


MODELS: dict[str, type[LanguageModel]]
MODELS = {"bigram": Bigram, "head": OneHead, "heads": Heads, "block": OneBlock, "gpt": GPT}


# --- The command ------------------------------------------------------------------------------------------------------

EVERYTHING_ONCE = 1  # added to every count, so that no pair has a probability of 0


@dataclass(frozen=True)
class Options:
    """Show a text's characters as numbers, and a bigram model made by counting instead of training."""

    dir: Annotated[Path, POSITIONAL]
    """Data directory of characters (data_prep/textfiles.py --tokenizer char)."""


def count_pairs(ids: npt.NDArray[np.integer], vocab_size: int) -> npt.NDArray[np.int64]:
    """Return how often each id follows each other one, int64 [V, V]; the row is the first id of a pair."""
    pairs = ids[:-1].astype(np.int64) * vocab_size + ids[1:]
    return np.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size)


def counted_loss(known_pairs: npt.NDArray[np.int64], scored_pairs: npt.NDArray[np.int64]) -> float:
    """Return the mean loss in nats of `scored_pairs` under the frequencies of `known_pairs`.

    Training a bigram on `known_pairs` approaches its counted loss: no table gives those pairs a lower loss, but for the
    1 that is added to each count.
    """
    counts = known_pairs + EVERYTHING_ONCE
    losses = -np.log(counts / counts.sum(axis=1, keepdims=True))
    return float((losses * scored_pairs).sum() / scored_pairs.sum())


def report(directory: Path) -> str:
    """Return everything that the command prints. Raise InputError if the data is not of characters."""
    streams = {split: open_split(directory, split) for split in ("train", "val")}
    tokenizer = load_tokenizer(directory)
    if not isinstance(tokenizer, CharTokenizer):
        raise InputError(f"{directory} has no character tokenizer; prepare it with --tokenizer char")
    stoi, itos, vocab_size = tokenizer.stoi, tokenizer.itos, tokenizer.vocab_size
    ids = {split: stream.read(0, len(stream)) for split, stream in streams.items()}
    train_pairs, val_pairs = (count_pairs(ids[split], vocab_size) for split in ("train", "val"))
    first_ids = ids["train"][:24].tolist()
    frequent_pairs = np.argsort(train_pairs, axis=None)[::-1][:5].tolist()
    lines = [
        f"{vocab_size} characters: {''.join(itos)!r}",
        "stoi: " + ", ".join(f"{character!r}: {stoi[character]}" for character in itos[:8]) + ", ...",
        f"the text begins {''.join(itos[i] for i in first_ids)!r}",
        f"as tokens       {first_ids}",
        "",
        "most frequent pairs: "
        + ", ".join(f"{itos[pair // vocab_size] + itos[pair % vocab_size]!r}" for pair in frequent_pairs),
        f"loss of knowing nothing, ln {vocab_size}:           {math.log(vocab_size):.4f}",
        f"loss of the counted bigram, train:        {counted_loss(train_pairs, train_pairs):.4f}",
        f"loss of the counted bigram, validation:   {counted_loss(train_pairs, val_pairs):.4f}",
    ]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    """Print the report of a data directory."""
    import tyro  # here, because every run builds its model with this module

    with one_line_errors("ladder"):
        mark_for_tyro(Options)
        options = tyro.cli(Options, args=args, description=__doc__)
        print(report(options.dir))


if __name__ == "__main__":
    main()
