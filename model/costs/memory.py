"""Count the memory of a rank at the peak of a training step, phase by phase and buffer by buffer.

Counted: weights, gradients, the optimizer's state; what autograd keeps in eager mode; what FSDP2 gathers, reduces and
has in flight; the tensors of the head and its loss. Not counted: what the allocator rounds up or cannot reuse, the
libraries' own memory (CUDA's context, buffers of NCCL and cuBLAS, oneDNN's scratch), batches of tokens, a checkpoint
that is being staged. A compiled model needs no more than an eager one and mostly less: it recomputes cheap values and
keeps no copies of logits. Validation and sampling need less than a step.

Letters are those of model/gpt.py; N = B x T is the number of tokens of a micro-batch.
"""

import math
from dataclasses import dataclass

from model.config import ModelConfig
from model.costs.activations import (
    FP32_BYTES,
    HASH_BYTES,
    Bytes,
    StepShape,
    block_shapes,
    count_between_blocks,
    count_bias_bytes,
    count_block_activations,
    count_kept_by_norm,
    count_mask_bytes,
    count_shard,
    count_waiting_gradients,
    keeps_its_input,
    norm_shapes,
    root_shapes,
)
from model.costs.optimizer import count_muon_update, count_optimizer

FP64_BYTES = 8


@dataclass(frozen=True)
class Memory:
    """Bytes by component, for each phase of a step."""

    phases: dict[str, Bytes]

    @property
    def peak_phase(self) -> str:
        """Return the name of the phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> Bytes:
        """Return the components of the phase that needs most."""
        return self.phases[self.peak_phase]

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())


def memory(config: ModelConfig, shape: StepShape) -> Memory:
    """Return every phase of a step's last micro-batch, and the update.

    The last micro-batch needs most, because gradients of the earlier ones exist already.
    """
    blocks = range(config.num_layers)
    phases = {
        "the loss's forward pass": _loss_forward(config, shape),
        "the loss's backward pass": _loss_backward(config, shape),
        **{f"the backward pass of block {i}": _block_backward(config, shape, i) for i in blocks},
        **{f"the backward pass of block {i}'s attention": _attention_backward(config, shape, i) for i in blocks},
        "the end of the backward pass": _embedding_backward(config, shape, is_last=True),
        "the update": _update(config, shape),
        "Muon's update": _muon_update(config, shape) if shape.is_muon else {},
    }
    if shape.is_sharded:
        phases["the last gathering in the forward pass"] = _forward_gathering(config, shape)
        phases |= {f"the backward pass, gathering block {i - 1}": _gathering(config, shape, i) for i in blocks[1:]}
        for is_sent, action in ((False, "copying"), (True, "sending")):
            for i in blocks:
                name = f"the backward pass, {action} block {i}'s gradients"
                phases[name] = _block_reduction(config, shape, i, is_sent=is_sent)
            name = f"the backward pass, {action} the embedding's gradients"
            phases[name] = _root_reduction(config, shape, is_sent=is_sent)
        if shape.adds_up_whole:
            phases["the end of a backward pass before the last"] = _embedding_backward(config, shape, is_last=False)
    return Memory({name: {part: n for part, n in phase.items() if n} for name, phase in phases.items() if phase})


def count_activations(config: ModelConfig, shape: StepShape) -> int:
    """Return the bytes that autograd keeps when the loss is computed, low-precision weights included."""
    components = _at_the_loss(config, shape)
    return components["activations"] + components.get("low-precision weights", 0)


# --- Components -------------------------------------------------------------------------------------------------------


def _gradients(config: ModelConfig, shape: StepShape, done: int, *, is_root_done: bool) -> Bytes:
    """Return the gradients in the last micro-batch's backward pass, after those of `done` blocks are reduced.

    DDP's gradients lie in its buckets all the time. Accumulated gradients exist from the first micro-batch to the
    update. The whole gradients that FSDP2 adds up become shards one block after the other. What DDP sends in bf16 is
    a copy; it is counted whole, though buckets free it one by one.
    """
    blocks, num_roots_done = config.num_layers, int(is_root_done)
    own_block, own_root = (count_shard(f(config), shape.shards) for f in (block_shapes, root_shapes))
    copies = {}
    if shape.mode == "ddp" and shape.reduce_bytes < FP32_BYTES:
        copies["gradients in bf16"] = shape.reduce_bytes * (blocks * own_block + own_root)
    if shape.mode == "ddp" or (shape.accumulation > 1 and not shape.adds_up_whole):
        done, num_roots_done = blocks, 1
    components = {"gradients": FP32_BYTES * (done * own_block + num_roots_done * own_root)} | copies
    if shape.adds_up_whole:
        block, root = (FP32_BYTES * count_shard(f(config), 1) for f in (block_shapes, root_shapes))
        components["whole gradients"] = (blocks - done) * block + (1 - num_roots_done) * root
    return components


def _kept_state(
    config: ModelConfig, shape: StepShape, *, done: int = 0, is_root_done: bool = False, kept: int = 0
) -> Bytes:
    """Return weights, optimizer state, gradients of `done` blocks, and what autograd keeps of the first `kept`."""
    N, D = shape.num_tokens, config.width
    elements = count_shard(root_shapes(config), shape.shards)
    elements += config.num_layers * count_shard(block_shapes(config), shape.shards)
    components = {"weights": FP32_BYTES * elements, "optimizer": count_optimizer(config, shape)}
    components["mean of the weights"] = shape.has_average * FP32_BYTES * elements
    components |= _gradients(config, shape, done, is_root_done=is_root_done)
    between = count_between_blocks(config, shape, kept)
    between += count_mask_bytes(config, shape, 1) + count_bias_bytes(config, shape) if kept else 0
    if shape.activation_checkpointing:
        # The first block's values are a view of its queries, keys and values, which are therefore kept whole. If a
        # table's rows are added to them, they are a tensor of their own.
        first_values = (1 if config.value_embeddings else 3) * N * D if config.value_residual and kept else 0
        return components | {"activations": (kept * N * D + first_values) * shape.compute_bytes + between}
    of_blocks = sum(sum(count_block_activations(config, shape, index).values()) for index in range(kept))
    copies = kept * _block_copies(config, shape)
    return components | {"activations": of_blocks + between, "low-precision weights": copies}


def _block_copies(config: ModelConfig, shape: StepShape) -> int:
    """Return the bytes of a block's weights that are copied to the dtype of their use.

    FSDP2 gathers the matrices in the compute dtype already, so that only the norms' weights are copied, to fp32.
    """
    if shape.compute_bytes == FP32_BYTES:
        return 0
    if shape.is_sharded:
        return FP32_BYTES * (2 * config.width * len(norm_shapes(config)) + 2 * config.head_size * config.qk_norm)
    return shape.compute_bytes * sum(math.prod(s) for s in block_shapes(config) if len(s) == 2)


def _gathered(config: ModelConfig, shape: StepShape, blocks: int, *, in_use: int = 0) -> Bytes:
    """Return FSDP2's gathered weights: the root's in fp32, and those of `blocks` blocks in the compute dtype.

    With resharding only the weights of `in_use` blocks are there: others are freed after their forward pass.
    """
    blocks = in_use if shape.reshard_after_forward else blocks
    return {"gathered weights": reduction_bytes(root_shapes(config), shape) + blocks * _gathered_block(config, shape)}


def _gathered_block(config: ModelConfig, shape: StepShape) -> int:
    """Return the bytes of one block gathered: as received, as laid out for use, or in gloo's copy."""
    return shape.is_sharded * shape.compute_bytes * shape.shards * count_shard(block_shapes(config), shape.shards)


def _prefetched_block(config: ModelConfig, shape: StepShape, index: int) -> int:
    """Return the bytes that FSDP2 prefetches in the backward pass of block `index`: the previous block's weights."""
    return _gathered_block(config, shape) if index > 0 and shape.shards > 1 and shape.reshard_after_forward else 0


def reduction_bytes(shapes: list[tuple[int, ...]], shape: StepShape) -> int:
    """Return the bytes of FSDP2's reduction buffer for the gradients of `shapes`, in fp32 and padded."""
    return shape.is_sharded * FP32_BYTES * shape.shards * count_shard(shapes, shape.shards)


def _previous_reduction(config: ModelConfig, shape: StepShape) -> int:
    """Return the bytes of the previous micro-batch's last reduction buffer.

    FSDP2 releases a reduction buffer at the next reduction, or where the step's last backward pass ends.
    """
    return reduction_bytes(root_shapes(config), shape) if shape.reduces_each else 0


# --- Phases -----------------------------------------------------------------------------------------------------------


def _at_the_loss(config: ModelConfig, shape: StepShape) -> Bytes:
    """Return what exists between the last block's forward pass and its backward pass."""
    components = {
        **_kept_state(config, shape, kept=config.num_layers),
        **_gathered(config, shape, config.num_layers, in_use=1),
        "in flight": _previous_reduction(config, shape),
    }
    components["activations"] += shape.num_tokens * config.width * shape.compute_bytes  # the head's input
    components["activations"] += count_kept_by_norm(config, shape) if config.has_last_norm else 0
    return components


def _head_copy(config: ModelConfig, shape: StepShape) -> int:
    """Return the bytes of the head's weights in the compute dtype, if that is not fp32."""
    is_low = shape.compute_bytes < FP32_BYTES
    return is_low * shape.compute_bytes * config.padded_vocab_size * config.width


def _forward_gathering(config: ModelConfig, shape: StepShape) -> Bytes:
    """Return FSDP2's phase before the last block, when the previous block's receive buffer still exists."""
    if shape.shards == 1 or shape.is_all_gathered:
        return {}
    blocks, block_bytes = config.num_layers, _gathered_block(config, shape)
    return {
        **_kept_state(config, shape, kept=blocks - 1),
        **_gathered(config, shape, blocks - 1),
        "in flight": _previous_reduction(config, shape) + min(blocks, 2) * block_bytes,
        "gloo's copy": block_bytes if shape.on_cpu else 0,
    }


def _loss_forward(config: ModelConfig, shape: StepShape) -> Bytes:
    """Return the loss's forward pass, in which FSDP2 still holds the last block's receive buffer."""
    N, D, V, c = shape.num_tokens, config.width, config.padded_vocab_size, shape.compute_bytes
    components = _at_the_loss(config, shape)
    if shape.shards > 1 and not shape.is_all_gathered:
        components["in flight"] += _gathered_block(config, shape)
    if shape.chunk_tokens is None:
        # Logits, fp32 logits without the padding's columns, and log-probabilities.
        trimmed = config.vocab_size * FP32_BYTES
        is_copied = config.vocab_size < V or c < FP32_BYTES
        logits = N * (V * c + is_copied * trimmed + (c == FP32_BYTES) * trimmed)
        largest = max(logits, 2 * N * trimmed)
        if config.logit_softcap is not None:  # one more: tanh keeps its result
            largest = N * (V * c + (c < FP32_BYTES) * trimmed + 2 * trimmed)
        return components | {"loss": largest, "head's weights": _head_copy(config, shape)}
    # Either a chunk's logits and two tensors of their size, or the logits' gradient and the weight gradient.
    n = min(shape.chunk_tokens, N)
    # A GPU's product adds to the weight gradient itself; a CPU makes one of its own and copies it to fp32.
    product = _head_copy(config, shape) * 3 if shape.on_cpu else 0
    return components | {
        "loss": max((3 if config.logit_softcap is None else 4) * n * V * FP32_BYTES, n * V * c + product),
        "loss's gradients": N * D * c + V * D * FP32_BYTES,
        "head's weights": _head_copy(config, shape),
    }


def _loss_backward(config: ModelConfig, shape: StepShape) -> Bytes:
    """Return the loss's backward pass."""
    N, D, V, c = shape.num_tokens, config.width, config.padded_vocab_size, shape.compute_bytes
    components = _at_the_loss(config, shape)
    if shape.chunk_tokens is not None:  # both gradients exist, and both again, multiplied by the outer gradient
        return components | {"loss's gradients": 2 * (N * D * c + V * D * FP32_BYTES)}
    # Log-probabilities, their gradient, the logits' gradient; with a soft cap also the result of tanh.
    losses = (3 if config.logit_softcap is None else 4) * N * config.vocab_size * FP32_BYTES
    products = N * V * c + N * D * c + V * D * c
    return components | {"loss": max(losses, products), "head's weights": _head_copy(config, shape)}


def _in_block(config: ModelConfig, shape: StepShape, index: int) -> Bytes:
    """Return what exists in the backward pass of block `index`, without the gradients that it computes."""
    is_last = index == config.num_layers - 1
    previous = _previous_reduction(config, shape) if is_last else reduction_bytes(block_shapes(config), shape)
    return {
        **_kept_state(config, shape, done=config.num_layers - 1 - index, kept=index + 1),
        **_gathered(config, shape, index + 1, in_use=1),
        "head's gradient": _head_gradient(config, shape),
        "waiting gradients": count_waiting_gradients(config, shape, index),
        "in flight": previous + _prefetched_block(config, shape, index),
    }


def _block_backward(config: ModelConfig, shape: StepShape, index: int) -> Bytes:
    """Return block `index` at the gradients of its MLP's last matrix, while all that the block kept exists.

    Slightly later, SwiGLU's two factors or ReLU squared's base get their gradients; the larger of both is counted. So
    is what the block's last dropout holds in the forward pass, which activation checkpointing repeats right before.
    """
    N, D, F, c = shape.num_tokens, config.width, config.resolved_mlp_width, shape.compute_bytes
    components = _in_block(config, shape, index)
    if shape.activation_checkpointing:
        kept = sum(count_block_activations(config, shape, index).values())
        components["recomputed block"] = kept + _block_copies(config, shape)
        # Where autograd keeps a block's input itself, recomputation keeps no second copy.
        components["recomputed block"] -= keeps_its_input(config, shape, index) * N * D * c
    factors = {"swiglu": 2, "relu2": 3}.get(config.mlp, 0) * N * F * c
    # Also there: the MLP's output, attention's output, and in low precision the stream, which nothing else counts.
    hashes = N * D * (c + FP32_BYTES + HASH_BYTES) if config.dropout else 0
    largest = max(N * F * c + F * D * c, F * D * FP32_BYTES, factors, hashes)
    return components | {"block's gradients": N * D * c + largest}


def _attention_backward(config: ModelConfig, shape: StepShape, index: int) -> Bytes:
    """Return naive attention in its softmax, with the gradients of both of its sides.

    By then the activations that the MLP kept are released.
    """
    if config.attention != "naive":
        return {}
    N, D, c = shape.num_tokens, config.width, shape.compute_bytes
    components = _block_backward(config, shape, index)
    block = count_block_activations(config, shape, index)
    holder = "recomputed block" if shape.activation_checkpointing else "activations"
    components[holder] -= block["mlp, between its matrices"] + block["matrices' inputs"] // 2
    components["block's gradients"] = 2 * N * D * c + 2 * N * config.num_heads * shape.seq_len * FP32_BYTES
    mlp = config.num_mlp_matrices * D * config.resolved_mlp_width
    return components | {"mlp's gradients": 0 if shape.adds_at_once else FP32_BYTES * mlp}


def _head_gradient(config: ModelConfig, shape: StepShape) -> int:
    """Return the bytes of the head's gradient that wait while the blocks' gradients are computed.

    A tied head's gradient waits for the embedding's. An untied head's is added at once to an existing one.
    """
    return 0 if not config.tie and shape.adds_at_once else FP32_BYTES * config.padded_vocab_size * config.width


def _gathering(config: ModelConfig, shape: StepShape, index: int) -> Bytes:
    """Return FSDP2's phase at the start of block `index`'s backward pass, while it gathers the previous block."""
    if not (prefetched := _prefetched_block(config, shape, index)):
        return {}
    return _in_block(config, shape, index) | {
        "block's gradients": shape.num_tokens * config.width * shape.compute_bytes,
        "gloo's copy": prefetched if shape.on_cpu else 0,
    }


def _block_reduction(config: ModelConfig, shape: StepShape, index: int, *, is_sent: bool) -> Bytes:
    """Return FSDP2's phase after block `index`, whose weights are freed.

    The gradients are copied into the fp32 buffer that is sent, then released.
    """
    c, shapes = shape.compute_bytes, block_shapes(config)
    is_copied = not is_sent and not shape.adds_up_whole
    return {
        **_kept_state(config, shape, done=config.num_layers - 1 - index + is_sent, kept=index),
        **_gathered(config, shape, index),
        "head's gradient": _head_gradient(config, shape),
        "waiting gradients": count_waiting_gradients(config, shape, index),
        "block's gradients": shape.num_tokens * config.width * c + is_copied * c * count_shard(shapes, 1),
        "in flight": reduction_bytes(shapes, shape) + _prefetched_block(config, shape, index),
        **(_reduction_results(shapes, shape) if is_sent else {}),
    }


def _reduction_results(shapes: list[tuple[int, ...]], shape: StepShape) -> Bytes:
    """Return what a reduction allocates beside the gradients that it leaves."""
    own = FP32_BYTES * count_shard(shapes, shape.shards)
    return {
        "reduced, to add": own if shape.reduces_each else 0,
        "gloo's copy": reduction_bytes(shapes, shape) if shape.on_cpu and shape.shards > 1 else 0,
    }


def _embedding_backward(config: ModelConfig, shape: StepShape, *, is_last: bool) -> Bytes:
    """Return the end of a backward pass: the table's gradients as head and as embedding, and their sum.

    An untied head and embedding have one gradient each, and no sum.
    """
    blocks = config.num_layers
    table = config.padded_vocab_size * config.width * FP32_BYTES
    # autograd adds in place only to tensors that it owns. The plain loss's fp32 gradient is a view, a transpose.
    tables = 3 if shape.compute_bytes == FP32_BYTES and shape.chunk_tokens is None else 2
    components = {
        **_kept_state(config, shape, done=blocks),
        **_gathered(config, shape, 0 if is_last else blocks),
        "embedding's gradients": (tables if config.tie else 1) * table + shape.num_tokens * config.width * FP32_BYTES,
        "head's gradient": 0 if config.tie else _head_gradient(config, shape),
        "value embeddings' gradients": 0 if shape.adds_at_once else config.value_embeddings * table,
        "in flight": reduction_bytes(block_shapes(config), shape) if is_last else 0,
    }
    if is_last:
        return components
    whole_blocks = blocks * count_shard(block_shapes(config), 1)
    whole_root = count_shard(root_shapes(config), 1) if shape.accumulation > 2 else 0
    return components | {"gradients": 0, "whole gradients": FP32_BYTES * (whole_blocks + whole_root)}


def _root_reduction(config: ModelConfig, shape: StepShape, *, is_sent: bool) -> Bytes:
    """Return FSDP2's phase at the end, the root's reduction; only the last micro-batch frees the root's weights."""
    shapes = root_shapes(config)
    gradients = 0 if is_sent or shape.adds_up_whole else FP32_BYTES * count_shard(shapes, 1)
    return {
        **_kept_state(config, shape, done=config.num_layers, is_root_done=is_sent),
        **(_gathered(config, shape, 0) if shape.reduces_each else {}),
        "embedding's gradients": gradients,
        "in flight": reduction_bytes(shapes, shape),
        **(_reduction_results(shapes, shape) if is_sent else {}),
    }


def _update(config: ModelConfig, shape: StepShape) -> Bytes:
    """Return the update. On a CPU the norm takes an fp64 copy of one gradient after the other."""
    largest = max(count_shard([each], shape.shards) for each in block_shapes(config) + root_shapes(config))
    norm = FP64_BYTES * largest if shape.on_cpu else 0
    state = _kept_state(config, shape, done=config.num_layers, is_root_done=True)
    return state | {"norm": norm}


def _muon_update(config: ModelConfig, shape: StepShape) -> Bytes:
    state = _kept_state(config, shape, done=config.num_layers, is_root_done=True)
    return state | {"matrices": count_muon_update(config, shape)}
