"""ModelConfig, the shape and switches of a model, and the named shapes: GPT-2's and three others."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, NamedTuple

from common.flags import HIDDEN

Kind = Literal["bigram", "head", "heads", "block", "gpt"]
SoftcapForm = Literal["tanh", "rsqrt"]
MLP_TOLERANCE = 0.02  # relative difference allowed between SwiGLU's parameters and those of two 4 x width matrices
# Fields that say how large a model is, not which architecture it has.
SIZES = ("num_layers", "num_heads", "width", "vocab_multiple", "vocab_size", "context_len", "eot_id")


class Softcap(NamedTuple):
    """A bound on the logits: --model.logit-softcap and --model.softcap-form."""

    cap: float
    form: SoftcapForm = "tanh"


@dataclass(frozen=True)
class ModelConfig:
    """GPT-2 with whatever the switches change. The data sets its vocabulary, --train.seq-len its context."""

    num_layers: int = 12
    """Number of blocks."""
    num_heads: int = 12
    """Attention heads per block. The number must divide the width."""
    width: int = 768
    """Width of the residual stream."""
    kind: Kind = "gpt"
    """The model to build: gpt, or a simpler one of model/ladder.py. bigram reads no other field, head reads the width
    only, heads and block read the width and the number of heads."""
    mlp_width: int | None = None
    """Width of the MLP between its matrices. None: 4 x width, or 8/3 x width with swiglu, whose three matrices are then
    as large as two (Shazeer 2020, section 2). 8/3 x width is rounded to a multiple of 64, or of 32, 16, ... where a
    larger multiple is more than 2 % off."""
    position_embedding: Literal["learned", "rope", "none"] = "learned"
    """learned: a trained vector per position (GPT-2). rope: queries and keys are turned by angles that grow with the
    position (Su et al. 2021, equation 34; base 10,000; element i is paired with i + half a head). none: the causal mask
    alone tells positions apart."""
    norm: Literal["layernorm", "rmsnorm", "none"] = "layernorm"
    """layernorm: Ba et al. 2016. rmsnorm: no mean and no bias (Zhang & Sennrich 2019, equation 4). none: no norms."""
    norm_place: Literal["pre", "post"] = "pre"
    """pre: the input of attention and of the MLP is normalised, and the stream once at the end (GPT-2). post: the sum
    of input and output is normalised, so no last norm is needed (Vaswani et al. 2017, section 3.1)."""
    mlp: Literal["gelu", "relu2", "silu", "swiglu"] = "gelu"
    """The MLP's non-linearity. gelu: the tanh form (Hendrycks & Gimpel 2016, section 2). relu2: ReLU squared (So et al.
    2021, "Primer"). silu: x sigmoid(x) (Elfwing et al. 2017). swiglu: SiLU of one matrix's outputs times another
    matrix's outputs (Shazeer 2020, equation 6)."""
    tie: bool = True
    """Use the token embedding as the head (Press & Wolf 2017); --model.no-tie gives the head its own matrix."""
    bias: bool = True
    """Biases in the blocks' matrices and in LayerNorm. PaLM has none (Chowdhery et al. 2022, section 2)."""
    qk_norm: bool = False
    """Apply RMSNorm to each head's queries and keys before rope; the heads share the gains (Dehghani et al. 2023,
    "ViT-22B", with LayerNorm; Qwen3 has RMSNorm)."""
    logit_softcap: float | None = None
    """Bound the logits by this cap (Gemma Team 2024, section 2, with a cap of 30). None: no bound."""
    softcap_form: SoftcapForm = "tanh"
    """The function that bounds the logits. tanh: cap x tanh(logits / cap). rsqrt: cap x logits / sqrt(logits^2 +
    cap^2), which costs a GPU less and nears the cap more slowly (Jordan et al. 2024, modded-nanogpt)."""
    zero_init_projections: bool = False
    """Start the last matrix of attention and of the MLP at 0, so that each block starts as the identity (Zhang, Dauphin
    & Ma 2019, section 3)."""
    zero_init_head: bool = False
    """Start an own head (--model.no-tie) at 0, so that all tokens are equally likely at first (Yang et al. 2022,
    appendix D.2)."""
    embedding_norm: bool = False
    """Apply the norm of --model.norm to the embedding too, before the first block (Le Scao et al. 2022, "BLOOM",
    section 3.2)."""
    embedding_shortcut: bool = False
    """Add the embedding to the input of every block: x + a x_0. Each block learns one a, which starts at 0 (Jordan et
    al. 2024, modded-nanogpt)."""
    value_embeddings: int = 0
    """Number of further tables with a row for each token, at most one for two blocks. Blocks i and L - 1 - i of L add
    the token's row of table i, times b, to their values. Each of them learns one b, which starts at 0.5 (Jordan et al.
    2024, modded-nanogpt)."""
    skips: bool = False
    """Add the outputs of the first half of the blocks to the inputs of the second half: block i of L gets the output
    of block L - 1 - i, times c. Each block of the second half learns one c, which starts at 1 (Jordan et al. 2024,
    modded-nanogpt)."""
    value_residual: bool = False
    """Mix the values of every later block with the first block's: a v_1 + (1 - a) v. Each block learns one a, which
    starts at 0.5 (Zhou et al. 2024, arXiv 2410.17897, "ResFormer")."""
    dropout: float = 0.0
    """Set so large a part of the embeddings' sum, of attention's and of the MLP's outputs to 0 in training, and scale
    the rest up (Srivastava et al. 2014). Attention's weights have no dropout. The masks depend on the seed and on a
    sequence's place in the order of the data alone: not on processes, micro-batch or device."""
    attention: Literal["sdpa", "naive", "flex"] = "sdpa"
    """sdpa: torch's fused kernels. naive: written out, with all scores in memory. flex: torch's FlexAttention, where a
    token sees only its own document, from the last end-of-text token on; flex cannot train on a CPU."""
    window: int | None = None
    """Tokens that a token may look at: itself and those right before it; None: all before it. sdpa and naive still
    compute all scores, and FlashAttention has no kernel for sdpa's mask; flex leaves out what no token sees."""
    vocab_multiple: int = 64
    """Round the embedding's rows up to a multiple of this number, since tensor cores are fast on such sizes: 50,257 ->
    50,304 (nanoGPT, build-nanogpt). 1: no rounding."""
    vocab_size: Annotated[int, HIDDEN] = 50257
    context_len: Annotated[int, HIDDEN] = 1024
    eot_id: Annotated[int | None, HIDDEN] = 50256  # begins each document; None: documents are not marked

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads

    @property
    def num_mlp_matrices(self) -> int:
        return 3 if self.mlp == "swiglu" else 2

    @property
    def resolved_mlp_width(self) -> int:
        """Return the MLP's width: --model.mlp-width, or its default if that is None."""
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
    def softcap(self) -> Softcap | None:
        return None if self.logit_softcap is None else Softcap(self.logit_softcap, self.softcap_form)

    def value_table(self, index: int) -> int | None:
        """Return which value embedding block `index` adds to its values, None for no one."""
        table = min(index, self.num_layers - 1 - index)
        return table if table < self.value_embeddings else None

    def skip_source(self, index: int) -> int | None:
        """Return the block whose output block `index` adds to its input, None for no one."""
        source = self.num_layers - 1 - index
        return source if self.skips and source < index else None

    @property
    def padded_vocab_size(self) -> int:
        """Return the rows of the embedding. The padding rows are never trained, scored or sampled."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def switched(self) -> dict[str, object]:
        """Return the fields, with their values, in which this architecture differs from GPT-2's."""
        names = [field.name for field in fields(self) if field.name not in SIZES]
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(GPT2, name)}

    def faults(self) -> list[str]:
        """Return every reason why this shape is impossible, one line each: value, rule and flag."""
        faults = [
            f"{flag_of(name)} {value} must be at least 1"
            for name in ("num_layers", "num_heads", "width", "mlp_width", "vocab_multiple")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if not faults and self.width % self.num_heads:
            faults.append(
                f"--model.width {self.width} is not divisible by --model.num-heads {self.num_heads}; "
                f"try --model.width {-(-self.width // self.num_heads) * self.num_heads}"
            )
        elif not faults and self.position_embedding == "rope" and self.head_size % 2:
            faults.append(
                f"--model.position-embedding rope needs an even head size, not {self.head_size} = "
                f"--model.width {self.width} / --model.num-heads {self.num_heads}; "
                f"try --model.width {self.width + self.num_heads}"
            )
        if self.norm == "none" and self.norm_place == "post":
            faults.append("--model.norm-place post says where norms stand, but --model.norm none has none; choose one")
        if self.norm == "none" and self.embedding_norm:
            faults.append("--model.embedding-norm applies the norm of --model.norm, which is none; choose one")
        if self.zero_init_head and self.tie:
            faults.append("--model.zero-init-head needs --model.no-tie: a tied head is the embedding")
        most = -(-self.num_layers // 2)
        if not 0 <= self.value_embeddings <= most:
            faults.append(
                f"--model.value-embeddings {self.value_embeddings} must be from 0 to {most}, half of "
                f"--model.num-layers {self.num_layers} rounded up"
            )
        switches = [name for name in self.switched() if name != "kind"]
        if self.kind != "gpt" and switches:
            faults.append(f"{', '.join(map(flag_of, switches))}: only for --model.kind gpt, not for {self.kind}")
        cap = self.logit_softcap
        if cap is not None and not 0 < cap < math.inf:
            faults.append(f"--model.logit-softcap {cap} must be a finite number above 0, or None")
        if self.window is not None and not 1 <= self.window <= self.context_len:
            faults.append(f"--model.window {self.window} must lie between 1 and --train.seq-len {self.context_len}")
        if not 0 <= self.dropout < 1:
            faults.append(f"--model.dropout {self.dropout} must lie in [0, 1)")
        return faults


GPT2 = ModelConfig()
# Names of fields in the records of earlier versions -> their current names.
FORMER_NAMES = {"rung": "kind", "hidden_size": "mlp_width", "positions": "position_embedding"}


def with_current_names(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a recorded ModelConfig under their current names."""
    return {FORMER_NAMES.get(name, name): value for name, value in recorded.items()}


def flag_of(name: str) -> str:
    """Return the command-line flag of a ModelConfig's field."""
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

# The four GPT-2 sizes are those of Radford et al. 2019, table 2, as released (the paper's parameter counts for the two
# smallest are wrong). The other shapes come from published exercises in building a language model from scratch.
NAMED_SHAPES = {
    "gpt2-small": ModelConfig(num_layers=12, num_heads=12, width=768),
    "gpt2-medium": ModelConfig(num_layers=24, num_heads=16, width=1024),
    "gpt2-large": ModelConfig(num_layers=36, num_heads=20, width=1280),
    "gpt2-xl": ModelConfig(num_layers=48, num_heads=25, width=1600),
    "gpt2-small-134m": ModelConfig(position_embedding="rope", tie=False, bias=False, vocab_size=32_000),
    "tinystories": STORIES,
    "openwebtext-32k": replace(STORIES, vocab_size=32_000),
}
