"""Count what autograd keeps of one block in eager mode, and list the shapes of the parameters.

Letters are those of model/gpt.py; N = B x T is the number of tokens of a micro-batch.
"""

import math
from dataclasses import dataclass
from typing import Literal

from model.config import ModelConfig

FP32_BYTES = 4
HASH_BYTES = 2 * 8  # of each element of a mask of dropout while it is computed: two int64 tensors

Bytes = dict[str, int]  # component -> bytes


@dataclass(frozen=True)
class StepShape:
    """The settings beside the model that decide a step's memory. The defaults are one process, eager fp32, plain loss.

    `mode`, `shards`, `reshard_after_forward` and `whole_gradients` are those of train/parallel/plan.py. `chunk_tokens`
    is that of train/losses.py, None for the plain loss. `compute_bytes` is the size of an element of the activations,
    `reduce_bytes` that of a gradient as it is sent.
    `is_muon`: Muon updates the matrices, and the optimizer's state is spread over all `replicas` of the shards.
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
    is_muon: bool = False
    replicas: int = 1
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
    """Return the shapes of the parameters of a block that has all the learned numbers of any."""
    D, F, norm = config.width, config.resolved_mlp_width, norm_shapes(config)
    matrices = [(3 * D, D), (D, D), *[(F, D)] * (config.num_mlp_matrices - 1), (D, F)]
    biases = [(rows,) for rows, _ in matrices] if config.bias else []
    heads = [(config.head_size,)] * (2 * config.qk_norm)
    return [*norm, *matrices, *biases, *heads, *norm, *[(1,)] * num_learned_numbers(config)]


def num_learned_numbers(config: ModelConfig) -> int:
    """Return the most learned numbers of a block. Some blocks have fewer."""
    return config.value_residual + config.embedding_shortcut + config.skips + (config.value_embeddings > 0)


def root_shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    """Return the shapes of the root's parameters: embeddings, untied head, positions, first and last norm."""
    D, num_tables = config.width, (1 if config.tie else 2) + config.value_embeddings
    shapes: list[tuple[int, ...]] = [(config.padded_vocab_size, D)] * num_tables
    shapes += [(config.context_len, D)] * (config.position_embedding == "learned")
    return shapes + norm_shapes(config) * (config.has_last_norm + config.embedding_norm)


def count_shard(shapes: list[tuple[int, ...]], shards: int) -> int:
    """Return the elements of one rank's shard, padding included.

    FSDP2 cuts every parameter by rows and gives each rank the same number of them.
    """
    return sum(math.ceil(rows / shards) * math.prod(rest) for rows, *rest in shapes)


def count_between_blocks(config: ModelConfig, shape: StepShape, kept: int) -> int:
    """Return the bytes that autograd keeps for what the first `kept` blocks read beside the stream, in eager mode.

    These are the embedding, with what its norm keeps, the rows of value embeddings, and outputs of earlier blocks. With
    activation checkpointing embedding and outputs are the inputs of blocks, which are kept anyway.
    """
    num_tensors = min(config.value_embeddings, kept)
    if not shape.activation_checkpointing:
        num_tensors += config.embedding_shortcut and kept > 0
        num_tensors += sum(
            config.skip_source(index) is not None and not keeps_its_input(config, shape, config.num_layers - index)
            for index in range(kept)
        )
    norm = count_kept_by_norm(config, shape) if config.embedding_norm and kept else 0
    return num_tensors * shape.num_tokens * config.width * shape.compute_bytes + norm


def count_waiting_gradients(config: ModelConfig, shape: StepShape, index: int) -> int:
    """Return the bytes of the gradients that later blocks gave to what they read beside the stream.

    They wait in the backward pass of block `index`.
    """
    later = config.num_layers - 1 - index
    num_tensors = config.embedding_shortcut * min(1, later) + min(config.value_embeddings, later)
    num_tensors += config.skips * min(index, later)
    return num_tensors * shape.num_tokens * config.width * shape.compute_bytes


def keeps_its_input(config: ModelConfig, shape: StepShape, index: int) -> bool:
    """Return whether autograd keeps the input of block `index` itself, rather than a sum or a copy in fp32."""
    is_read_by_matrix = config.norm == "none" or config.norm_place == "post"
    is_added_to = config.embedding_shortcut or config.skip_source(index) is not None
    return (is_read_by_matrix or shape.compute_bytes == FP32_BYTES) and not is_added_to


def count_kept_by_norm(config: ModelConfig, shape: StepShape) -> int:
    """Return the bytes that autograd keeps for one norm of the residual stream, without the norm's output.

    These are the input and a few numbers per token, in fp32. On a CPU, where RMSNorm has no kernel of its own, it also
    keeps the normalized input.
    """
    N, D = shape.num_tokens, config.width
    if config.norm == "layernorm":
        return (N * D + 2 * N) * FP32_BYTES
    return ((2 if shape.on_cpu else 1) * N * D + N) * FP32_BYTES if config.norm == "rmsnorm" else 0


def count_mask_bytes(config: ModelConfig, shape: StepShape, num_masks: int) -> int:
    """Return the bytes of so many masks of dropout, a byte for each element."""
    return num_masks * shape.num_tokens * config.width if config.dropout else 0


def count_bias_bytes(config: ModelConfig, shape: StepShape) -> int:
    """Return the bytes of the window's mask, which all blocks share."""
    has_bias = config.window is not None and config.attention == "sdpa"
    return has_bias * shape.seq_len**2 * shape.compute_bytes


def count_block_activations(config: ModelConfig, shape: StepShape, index: int) -> Bytes:
    """Return the bytes that autograd keeps of block `index` in eager mode, by component.

    Norms are computed in fp32 and keep their input in fp32, whatever the dtype of the other activations. What the block
    reads beside the stream is not counted here.
    """
    D, F, H, N, c = config.width, config.resolved_mlp_width, config.num_heads, shape.num_tokens, shape.compute_bytes
    is_naive, is_low = config.attention == "naive", c < FP32_BYTES
    has_new_queries = config.qk_norm or config.position_embedding == "rope"  # and keys, beside c_attn's output
    reads_table, mixes = config.value_table(index) is not None, config.value_residual and index > 0
    # Batched products and flex attention copy their operands, which are strided views of c_attn's output. That output
    # is then kept only if another operation needs it. Values with a table's rows added are not in it.
    is_copied = is_naive or config.attention == "flex"
    are_values_in_it = not reads_table and (config.value_residual or not is_copied)
    are_queries_in_it = not (is_copied or has_new_queries) or (config.qk_norm and not is_low)
    is_output_kept = are_values_in_it or are_queries_in_it
    num_operands = 3 if is_copied else 2 * has_new_queries + (reads_table or mixes)
    num_operands += reads_table and (mixes or (config.value_residual and is_copied))  # the values that are mixed
    queries_and_keys = 2 * N * D * FP32_BYTES
    return {
        "norms": 2 * count_kept_by_norm(config, shape),
        "matrices' inputs": 2 * N * D * c,
        "queries, keys and values": (3 * is_output_kept + num_operands) * N * D * c,
        "their norms": config.qk_norm * ((shape.on_cpu + is_low) * queries_and_keys + 2 * N * H * FP32_BYTES),
        "attention's output": (2 if config.attention == "flex" else 1) * N * D * c,  # flex also keeps it in token order
        "attention's log-sums": 0 if is_naive else N * H * FP32_BYTES,
        "attention's weights": is_naive * N * H * shape.seq_len * (FP32_BYTES + is_low * c),
        "dropout's masks": count_mask_bytes(config, shape, 2),
        "mlp, between its matrices": (4 if config.mlp == "swiglu" else 2) * N * F * c,
    }
