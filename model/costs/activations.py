"""Count what autograd keeps of one block in eager mode, and list the shapes of the parameters.

Letters are those of model/gpt.py; N = B x T is the number of tokens of a micro-batch.
"""

from dataclasses import dataclass
from typing import Literal

from model.config import ModelConfig

FP32_BYTES = 4

Bytes = dict[str, int]  # component -> bytes


@dataclass(frozen=True)
class StepShape:
    """The settings beside the model that decide a step's memory. The defaults are one process, eager fp32, plain loss.

    `mode`, `shards`, `reshard_after_forward` and `whole_gradients` are those of train/parallel/plan.py. `chunk_tokens`
    is that of train/losses.py, None for the plain loss. `compute_bytes` is the size of an element of the activations,
    `reduce_bytes` that of a gradient as it is sent.
    `on_cpu`: FSDP2 communicates by gloo, which copies what it gathers and reduces, and the gradients' norm is taken of
    an fp64 copy of each gradient. `has_average`: a mean of the weights is kept.
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
    reduce_bytes: int = FP32_BYTES
    on_cpu: bool = False
    has_average: bool = False

    @property
    def is_sharded(self) -> bool:
        return self.mode in ("fsdp", "hsdp")

    @property
    def adds_up_whole(self) -> bool:
        """Return whether whole gradients of earlier micro-batches exist beside the shards."""
        return self.is_sharded and self.whole_gradients and self.accumulation > 1

    @property
    def reduces_each(self) -> bool:
        """Return whether each micro-batch's gradients are reduced alone and added up as shards."""
        return self.is_sharded and not self.whole_gradients and self.accumulation > 1

    @property
    def adds_at_once(self) -> bool:
        """Return whether each new gradient is added at once to an existing one."""
        return not self.is_sharded and (self.mode == "ddp" or self.accumulation > 1)

    @property
    def is_all_gathered(self) -> bool:
        """Return whether all weights are still gathered from the previous micro-batch."""
        return self.adds_up_whole and not self.reshard_after_forward

    @property
    def num_tokens(self) -> int:
        return self.micro_batch * self.seq_len


def norm_shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    """Return the shapes of the parameters of one norm of the residual stream."""
    if config.norm == "none":
        return []
    return [(config.width,)] * (2 if config.norm == "layernorm" and config.bias else 1)


def block_shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    """Return the shapes of one block's parameters. (The first block has no weight that mixes values.)"""
    D, F, norm = config.width, config.resolved_mlp_width, norm_shapes(config)
    matrices = [(3 * D, D), (D, D), *[(F, D)] * (config.num_mlp_matrices - 1), (D, F)]
    biases = [(rows,) for rows, _ in matrices] if config.bias else []
    heads = [(config.head_size,)] * (2 * config.qk_norm) + [(1,)] * config.value_residual
    return [*norm, *matrices, *biases, *heads, *norm]


def root_shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    """Return the shapes of the root's parameters: embedding, untied head, positions and last norm."""
    D = config.width
    shapes: list[tuple[int, ...]] = [(config.padded_vocab_size, D)] * (1 if config.tie else 2)
    shapes += [(config.context_len, D)] * (config.position_embedding == "learned")
    return shapes + (norm_shapes(config) if config.has_last_norm else [])


def count_kept_by_norm(config: ModelConfig, shape: StepShape) -> int:
    """Return the bytes that autograd keeps for one norm of the residual stream, without the norm's output.

    These are the input and a few numbers per token, in fp32. On a CPU, where RMSNorm has no kernel of its own, it also
    keeps the normalized input.
    """
    N, D = shape.num_tokens, config.width
    if config.norm == "layernorm":
        return (N * D + 2 * N) * FP32_BYTES
    return ((2 if shape.on_cpu else 1) * N * D + N) * FP32_BYTES if config.norm == "rmsnorm" else 0


def count_block_activations(config: ModelConfig, shape: StepShape) -> Bytes:
    """Return the bytes that autograd keeps of one block in eager mode, by component.

    Norms are computed in fp32 and keep their input in fp32, whatever the dtype of the other activations.
    """
    D, F, H, N, c = config.width, config.resolved_mlp_width, config.num_heads, shape.num_tokens, shape.compute_bytes
    is_naive, is_low = config.attention == "naive", c < FP32_BYTES
    has_new_queries = config.qk_norm or config.position_embedding == "rope"  # and keys, beside c_attn's output
    # Batched products and flex attention copy their operands, which are strided views of c_attn's output. That output
    # is then kept only if another operation needs it.
    is_copied = is_naive or config.attention == "flex"
    is_output_kept = not is_copied or config.qk_norm or config.value_residual
    num_operands = 3 if is_copied else 2 * has_new_queries + config.value_residual
    queries_and_keys = 2 * N * D * FP32_BYTES
    return {
        "norms": 2 * count_kept_by_norm(config, shape),
        "matrices' inputs": 2 * N * D * c,
        "queries, keys and values": (3 * is_output_kept + num_operands) * N * D * c,
        "their norms": config.qk_norm * ((shape.on_cpu + is_low) * queries_and_keys + 2 * N * H * FP32_BYTES),
        "attention's output": (2 if config.attention == "flex" else 1) * N * D * c,  # flex also keeps it in token order
        "attention's log-sums": 0 if is_naive else N * H * FP32_BYTES,
        "attention's weights": is_naive * N * H * shape.seq_len * (FP32_BYTES + is_low * c),
        "mlp, between its matrices": (4 if config.mlp == "swiglu" else 2) * N * F * c,
    }
