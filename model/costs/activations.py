"""What autograd keeps of a block in eager mode, switch by switch; the shapes of what a block holds.

Letters as in model/gpt.py; N tokens of a micro-batch = B x T.
"""

from dataclasses import dataclass
from typing import Literal

from model.config import ModelConfig

FP32_BYTES = 4

Bytes = dict[str, int]  # by component


@dataclass(frozen=True)
class StepShape:
    """What decides a step's memory beside the model. The defaults: one process, plain eager fp32, one micro-batch.

    `mode`, `shards`, `reshard_after_forward` and `whole_gradients` as in train/parallel/plan.py, `chunk_tokens` as in
    train/losses.py, None for the plain loss. `compute_bytes`: of an element of the activations.
    `on_cpu`: FSDP2 then communicates by gloo, which copies what it gathers and reduces, and the norm of the gradients
    is taken of an fp64 copy of each.
    """

    micro_batch: int
    seq_len: int
    accumulation: int = 1
    compute_bytes: int = FP32_BYTES
    activation_checkpointing: bool = False
    chunk_tokens: int | None = None
    mode: Literal["none", "ddp", "fsdp", "hsdp"] = "none"
    shards: int = 1
    reshard_after_forward: bool = True
    whole_gradients: bool = True
    on_cpu: bool = False

    @property
    def is_sharded(self) -> bool:
        return self.mode in ("fsdp", "hsdp")

    @property
    def adds_up_whole(self) -> bool:
        """Are there whole gradients of earlier micro-batches beside the shards?"""
        return self.is_sharded and self.whole_gradients and self.accumulation > 1

    @property
    def reduces_each(self) -> bool:
        """Are the gradients of every micro-batch reduced by themselves, and added up as shards?"""
        return self.is_sharded and not self.whole_gradients and self.accumulation > 1

    @property
    def adds_at_once(self) -> bool:
        """Is each gradient added, as it is made, to one that is there already?"""
        return not self.is_sharded and (self.mode == "ddp" or self.accumulation > 1)

    @property
    def is_all_gathered(self) -> bool:
        """Are all weights there already, from the micro-batch before the last?"""
        return self.adds_up_whole and not self.reshard_after_forward

    @property
    def num_tokens(self) -> int:
        return self.micro_batch * self.seq_len


def norm_shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    """Of one norm of the residual stream."""
    if config.norm == "none":
        return []
    return [(config.width,)] * (2 if config.norm == "layernorm" and config.bias else 1)


def block_shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    """Of one block's parameters; the first one has no weight to mix values with."""
    D, F, norm = config.width, config.resolved_mlp_width, norm_shapes(config)
    matrices = [(3 * D, D), (D, D), *[(F, D)] * (config.num_mlp_matrices - 1), (D, F)]
    biases = [(rows,) for rows, _ in matrices] if config.bias else []
    heads = [(config.head_size,)] * (2 * config.qk_norm) + [(1,)] * config.value_residual
    return [*norm, *matrices, *biases, *heads, *norm]


def root_shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    """Of the rest: the embedding, the head if it is another matrix, the positions, the last norm."""
    D = config.width
    shapes: list[tuple[int, ...]] = [(config.padded_vocab_size, D)] * (1 if config.tie else 2)
    shapes += [(config.context_len, D)] * (config.position_embedding == "learned")
    return shapes + (norm_shapes(config) if config.has_last_norm else [])


def count_kept_by_norm(config: ModelConfig, shape: StepShape) -> int:
    """By one norm of the residual stream, but for its output: its input and a few numbers of each token, in fp32.

    RMSNorm keeps what it divided too, where it has no kernel of its own: on a CPU.
    """
    N, D = shape.num_tokens, config.width
    if config.norm == "layernorm":
        return (N * D + 2 * N) * FP32_BYTES
    return ((2 if shape.on_cpu else 1) * N * D + N) * FP32_BYTES if config.norm == "rmsnorm" else 0


def count_block_activations(config: ModelConfig, shape: StepShape) -> Bytes:
    """What autograd keeps of one block in eager mode; fp32 norms keep their input in fp32, whatever the rest is."""
    D, F, H, N, c = config.width, config.resolved_mlp_width, config.num_heads, shape.num_tokens, shape.compute_bytes
    is_naive, is_low = config.attention == "naive", c < FP32_BYTES
    is_made_anew = config.qk_norm or config.position_embedding == "rope"  # queries and keys, beside what c_attn made
    # Products of batches copy their operands, which lie far apart in what c_attn made, and for flex they are copied.
    # What c_attn made then stays only for whom else it serves.
    is_copied = is_naive or config.attention == "flex"
    is_first_kept = not is_copied or config.qk_norm or config.value_residual
    num_operands = 3 if is_copied else 2 * is_made_anew + config.value_residual
    normed = 2 * N * D * FP32_BYTES  # queries and keys
    return {
        "norms": 2 * count_kept_by_norm(config, shape),
        "matrices' inputs": 2 * N * D * c,
        "queries, keys and values": (3 * is_first_kept + num_operands) * N * D * c,
        "their norms": config.qk_norm * ((shape.on_cpu + is_low) * normed + 2 * N * H * FP32_BYTES),
        "attention's output": (2 if config.attention == "flex" else 1) * N * D * c,  # and in the order of tokens
        "attention's log-sums": 0 if is_naive else N * H * FP32_BYTES,
        "attention's weights": is_naive * N * H * shape.seq_len * (FP32_BYTES + is_low * c),
        "mlp, between its matrices": (4 if config.mlp == "swiglu" else 2) * N * F * c,
    }
