"""The shape of a model, and the named shapes of GPT-2."""

from dataclasses import dataclass
from typing import Annotated

import tyro

VOCAB_MULTIPLE = 64  # a matrix side that tensor cores like: 50,257 -> 50,304 (nanoGPT, build-nanogpt)


@dataclass(frozen=True)
class ModelConfig:
    """A GPT-2. Its vocabulary is the data's, its context is --train.seq-len."""

    num_layers: int = 12
    """Blocks."""
    num_heads: int = 12
    """Attention heads per block; must divide the width."""
    width: int = 768
    """Size of the residual stream."""
    vocab_size: Annotated[int, tyro.conf.Suppress] = 50257
    context_len: Annotated[int, tyro.conf.Suppress] = 1024

    @property
    def hidden_size(self) -> int:
        """Width of the MLP between its two matrices: 4 x width in GPT-2."""
        return 4 * self.width

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up. The padding is never trained, scored or sampled."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def faults(self) -> list[str]:
        """Everything that makes this shape impossible: value, rule and flag, one line each."""
        found = [
            f"--model.{name.replace('_', '-')} {value} must be at least 1"
            for name in ("num_layers", "num_heads", "width")
            if (value := getattr(self, name)) < 1
        ]
        if not found and self.width % self.num_heads:
            found.append(
                f"--model.width {self.width} is not divisible by --model.num-heads {self.num_heads}; "
                f"try --model.width {-(-self.width // self.num_heads) * self.num_heads}"
            )
        return found


# Radford et al. 2019, table 2, as released (the paper's parameter counts for the two smallest are wrong).
NAMED_SHAPES = {
    "gpt2-small": ModelConfig(num_layers=12, num_heads=12, width=768),
    "gpt2-medium": ModelConfig(num_layers=24, num_heads=16, width=1024),
    "gpt2-large": ModelConfig(num_layers=36, num_heads=20, width=1280),
    "gpt2-xl": ModelConfig(num_layers=48, num_heads=25, width=1600),
}
