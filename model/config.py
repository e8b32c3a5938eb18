"""The shape of a model and its switches, and the named shapes of GPT-2."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import tyro

Kind = Literal["bigram", "head", "heads", "block", "gpt"]
MLP_TOLERANCE = 0.02  # by how much SwiGLU's parameters may miss those of two matrices of 4 x width


@dataclass(frozen=True)
class ModelConfig:
    """A GPT-2, but for what the switches change. Its vocabulary is the data's, its context is --train.seq-len."""

    num_layers: int = 12
    """Blocks."""
    num_heads: int = 12
    """Attention heads per block; must divide the width."""
    width: int = 768
    """Size of the residual stream."""
    kind: Kind = "gpt"
    """Which model: gpt, or one of the steps to it that model/ladder.py has. Of the other fields head reads the width
    alone, heads and block also the number of heads, bigram none."""
    mlp_width: int | None = None
    """Width of the MLP between its matrices. None: 4 x width; with swiglu, so that its three matrices are as large as
    the others' two (Shazeer 2020, section 2), 8/3 x width to the nearest multiple of 64, or of 32, 16, ... where that
    is more than 2 % off."""
    position_embedding: Literal["learned", "rope", "none"] = "learned"
    """learned: a vector for each (GPT-2). rope: queries and keys are turned by angles that grow with the position (Su
    et al. 2021, equation 34; base 10,000; the two halves of a head are the pairs). none: only the causal mask tells."""
    norm: Literal["layernorm", "rmsnorm", "none"] = "layernorm"
    """layernorm: Ba et al. 2016. rmsnorm: without a mean and a bias (Zhang & Sennrich 2019, equation 4)."""
    norm_place: Literal["pre", "post"] = "pre"
    """pre: of what each half of a block reads, and once at the end (GPT-2). post: of the sum of a half's input and
    output, so none is needed at the end (Vaswani et al. 2017, section 3.1)."""
    mlp: Literal["gelu", "relu2", "silu", "swiglu"] = "gelu"
    """gelu: its tanh form (Hendrycks & Gimpel 2016, section 2). relu2: ReLU squared (So et al. 2021, "Primer").
    silu: x sigmoid(x) (Elfwing et al. 2017). swiglu: SiLU of one matrix's outputs times another's, then the last matrix
    (Shazeer 2020, equation 6)."""
    tie: bool = True
    """The head is the token embedding (Press & Wolf 2017); --model.no-tie gives it a matrix of its own."""
    bias: bool = True
    """Biases in the blocks' matrices and in LayerNorm; without as in PaLM (Chowdhery et al. 2022, section 2)."""
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys, with gains that the heads share, before rope (Dehghani et al. 2023,
    "ViT-22B", with LayerNorm; Qwen3 has RMSNorm)."""
    logit_softcap: float | None = None
    """Logits are cap x tanh(logits / cap) (Gemma Team 2024, section 2: 30); None: as they are."""
    zero_init_projections: bool = False
    """The last matrix of each half of a block begins at 0, so that each block begins as the identity (Zhang, Dauphin &
    Ma 2019, section 3)."""
    value_residual: bool = False
    """From the second block on, values are mixed with the first block's: a v_1 + (1 - a) v, with one learned a per
    block, at first 0.5 (Zhou et al. 2024, arXiv 2410.17897, "ResFormer")."""
    attention: Literal["sdpa", "naive", "flex"] = "sdpa"
    """sdpa: torch's fused kernels. naive: written out, with all scores in memory. flex: torch's FlexAttention, in which
    a token sees only its own document, from the last end-of-text token on; it cannot train on a CPU."""
    vocab_multiple: int = 64
    """The embedding's rows are the vocabulary rounded up to a multiple of this, a matrix side that tensor cores like:
    50,257 -> 50,304 (nanoGPT, build-nanogpt). 1: as many as the vocabulary has."""
    vocab_size: Annotated[int, tyro.conf.Suppress] = 50257
    context_len: Annotated[int, tyro.conf.Suppress] = 1024
    eot_id: Annotated[int | None, tyro.conf.Suppress] = 50256  # begins a document; None: nothing does

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads

    @property
    def num_mlp_matrices(self) -> int:
        return 3 if self.mlp == "swiglu" else 2

    @property
    def resolved_mlp_width(self) -> int:
        """Return the MLP's width: --model.mlp-width, or what None stands for."""
        if self.mlp_width is not None:
            return self.mlp_width
        if self.mlp != "swiglu":
            return 4 * self.width
        exact, multiple = 8 * self.width / 3, 64
        while multiple > 1 and abs(round(exact / multiple) * multiple - exact) > MLP_TOLERANCE * exact:
            multiple //= 2
        return round(exact / multiple) * multiple

    @property
    def has_last_norm(self) -> bool:
        return self.norm != "none" and self.norm_place == "pre"

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up. The padding is never trained, scored or sampled."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def switched(self) -> dict[str, object]:
        """What makes this another architecture than GPT-2's, by field."""
        names = (
            "kind mlp_width position_embedding norm norm_place mlp tie bias qk_norm logit_softcap "
            "zero_init_projections value_residual attention"
        )
        return {name: getattr(self, name) for name in names.split() if getattr(self, name) != getattr(GPT2, name)}

    def faults(self) -> list[str]:
        """Everything that makes this shape impossible: value, rule and flag, one line each."""
        found = [
            f"{flag_of(name)} {value} must be at least 1"
            for name in ("num_layers", "num_heads", "width", "mlp_width", "vocab_multiple")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if not found and self.width % self.num_heads:
            found.append(
                f"--model.width {self.width} is not divisible by --model.num-heads {self.num_heads}; "
                f"try --model.width {-(-self.width // self.num_heads) * self.num_heads}"
            )
        elif not found and self.position_embedding == "rope" and self.head_size % 2:
            found.append(
                f"--model.position-embedding rope turns pairs, but a head has {self.head_size} = "
                f"--model.width {self.width} / --model.num-heads {self.num_heads} elements; "
                f"try --model.width {self.width + self.num_heads}"
            )
        if self.norm == "none" and self.norm_place == "post":
            found.append("--model.norm-place post says where norms stand, but --model.norm none has none; give one")
        odd = [name for name in self.switched() if name != "kind"]
        if self.kind != "gpt" and odd:
            found.append(f"{', '.join(map(flag_of, odd))}: of --model.kind gpt only; {self.kind} is what it is")
        cap = self.logit_softcap
        if cap is not None and not 0 < cap < math.inf:
            found.append(f"--model.logit-softcap {cap} must be a finite number above 0, or None")
        return found


GPT2 = ModelConfig()


# Fields as runs of earlier versions recorded them -> as they are called now.
FORMER_NAMES = {"rung": "kind", "hidden_size": "mlp_width", "positions": "position_embedding"}


def with_current_names(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded ModelConfig's fields under their current names."""
    return {FORMER_NAMES.get(name, name): value for name, value in recorded.items()}


def flag_of(name: str) -> str:
    return f"--model.{name.replace('_', '-')}"


STORIES = ModelConfig(
    num_layers=8,
    num_heads=8,
    width=512,
    mlp_width=1408,
    position_embedding="rope",
    norm="rmsnorm",
    mlp="swiglu",
    tie=False,
    bias=False,
    vocab_size=10_000,
    context_len=256,
)

# GPT-2's: Radford et al. 2019, table 2, as released (the paper's parameter counts for the two smallest are wrong).
# The others: published exercises in building a language model from scratch.
NAMED_SHAPES = {
    "gpt2-small": ModelConfig(num_layers=12, num_heads=12, width=768),
    "gpt2-medium": ModelConfig(num_layers=24, num_heads=16, width=1024),
    "gpt2-large": ModelConfig(num_layers=36, num_heads=20, width=1280),
    "gpt2-xl": ModelConfig(num_layers=48, num_heads=25, width=1600),
    "gpt2-small-134m": ModelConfig(position_embedding="rope", tie=False, bias=False, vocab_size=32_000),
    "tinystories": STORIES,
    "openwebtext-32k": replace(STORIES, vocab_size=32_000),
}
