"""What a training step holds in a rank's memory at its peak, counted structurally: phase by phase, buffer by buffer.

Counted: weights, gradients, AdamW's moments; what autograd keeps in eager mode; what FSDP2 gathers, reduces and has in
flight; the tensors of the head and its loss. Not counted: what the allocator rounds up or cannot reuse, the libraries'
own (CUDA's context, NCCL's and cuBLAS's buffers), batches of tokens, a checkpoint that is being staged. A compiled
model keeps no more than an eager one, mostly less: it computes cheap things again and keeps no copies of logits.
Validation and sampling need less than a step.

Letters as in model/gpt.py; N tokens of a micro-batch = B x T.
"""

import math
from dataclasses import dataclass

from model.config import ModelConfig
from model.costs.activations import (
    FP32_BYTES,
    Bytes,
    StepShape,
    block_shapes,
    count_block_activations,
    count_kept_by_norm,
    count_norm,
    root_shapes,
)

FP64_BYTES = 8


@dataclass(frozen=True)
class Memory:
    """Bytes by component in each phase of a step."""

    phases: dict[str, Bytes]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> Bytes:
        return self.phases[self.peak_phase]

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())


def count_shard(shapes: list[tuple[int, ...]], shards: int) -> int:
    """Elements of one rank's part, padding included: FSDP2 cuts every parameter by rows, the same number each."""
    return sum(math.ceil(rows / shards) * math.prod(rest) for rows, *rest in shapes)


def memory(config: ModelConfig, shape: StepShape) -> Memory:
    """Every phase of a step's last micro-batch, which finds the gradients of those before it; and the update."""
    blocks = range(config.num_layers)
    phases = {
        "the loss's forward pass": _loss_forward(config, shape),
        "the loss's backward pass": _loss_backward(config, shape),
        **{f"the backward pass of block {i}": _block_backward(config, shape, i) for i in blocks},
        **{f"the backward pass of block {i}'s attention": _attention_backward(config, shape, i) for i in blocks},
        "the end of the backward pass": _embedding_backward(config, shape, is_last=True),
        "the update": _update(config, shape),
    }
    if shape.is_sharded:
        phases["the last gathering in the forward pass"] = _forward_gathering(config, shape)
        phases |= {f"the backward pass, gathering block {i - 1}": _gathering(config, shape, i) for i in blocks[1:]}
        for is_sent, doing in ((False, "copying"), (True, "sending")):
            for i in blocks:
                name = f"the backward pass, {doing} block {i}'s gradients"
                phases[name] = _block_reduction(config, shape, i, is_sent=is_sent)
            name = f"the backward pass, {doing} the embedding's gradients"
            phases[name] = _root_reduction(config, shape, is_sent=is_sent)
        if shape.adds_up_whole:
            phases["the end of a backward pass before the last"] = _embedding_backward(config, shape, is_last=False)
    return Memory({name: {part: n for part, n in phase.items() if n} for name, phase in phases.items() if phase})


def count_activations(config: ModelConfig, shape: StepShape) -> int:
    """What autograd keeps between the last block's forward and its backward pass, low-precision weights included."""
    found = _at_the_loss(config, shape)
    return found["activations"] + found.get("low-precision weights", 0)


# --- What lasts -------------------------------------------------------------------------------------------------------


def _state(config: ModelConfig, shape: StepShape) -> Bytes:
    held = count_shard(root_shapes(config), shape.shards)
    held += config.num_layers * count_shard(block_shapes(config), shape.shards)
    return {"weights": FP32_BYTES * held, "optimizer": 2 * FP32_BYTES * held}


def _gradients(config: ModelConfig, shape: StepShape, *, done_blocks: int, is_root_done: bool) -> Bytes:
    """In the last micro-batch's backward pass, those of `done_blocks` blocks made and reduced.

    DDP's lie in its buckets all the time. Others are there from the first micro-batch to the update; whole ones that
    FSDP2 adds up become shards one block after the other.
    """
    blocks, num_done = config.num_layers, 1 if is_root_done else 0
    block, root = (FP32_BYTES * count_shard(f(config), 1) for f in (block_shapes, root_shapes))
    own_block, own_root = (FP32_BYTES * count_shard(f(config), shape.shards) for f in (block_shapes, root_shapes))
    if shape.adds_up_whole:
        whole = (blocks - done_blocks) * block + (1 - num_done) * root
        return {"gradients": done_blocks * own_block + num_done * own_root, "whole gradients": whole}
    if shape.mode == "ddp" or shape.accumulation > 1:
        done_blocks, num_done = blocks, 1
    return {"gradients": done_blocks * own_block + num_done * own_root}


def _kept(config: ModelConfig, shape: StepShape, *, blocks: int) -> Bytes:
    """What autograd keeps of the first `blocks` blocks."""
    N, D = shape.num_tokens, config.width
    if shape.activation_checkpointing:  # and the first block's values, as part of its queries, keys and values
        first_values = 3 * N * D if config.value_residual else 0
        return {"activations": (blocks * N * D + first_values) * shape.compute_bytes}
    return {
        "activations": blocks * sum(count_block_activations(config, shape).values()),
        "low-precision weights": blocks * _block_copies(config, shape),
    }


def _block_copies(config: ModelConfig, shape: StepShape) -> int:
    """Copies of a block's weights in the dtype they are used in; FSDP2 gathers the matrices in it."""
    if shape.compute_bytes == FP32_BYTES:
        return 0
    if shape.is_sharded:  # of its norms' weights in fp32
        return FP32_BYTES * (2 * count_norm(config) + 2 * config.head_size * config.qk_norm)
    return shape.compute_bytes * sum(math.prod(s) for s in block_shapes(config) if len(s) == 2)


def _gathered(config: ModelConfig, shape: StepShape, *, blocks: int) -> Bytes:
    """FSDP2's whole parameters: the root's, in fp32, and those of `blocks` blocks, in the dtype of the activations."""
    if not shape.is_sharded:
        return {}
    root = FP32_BYTES * shape.shards * count_shard(root_shapes(config), shape.shards)
    return {"gathered weights": root + blocks * _gathered_block(config, shape)}


def _gathered_block(config: ModelConfig, shape: StepShape) -> int:
    """As it comes, as it is laid out, and as gloo has it before."""
    return shape.compute_bytes * shape.shards * count_shard(block_shapes(config), shape.shards)


def _reduced(shapes: list[tuple[int, ...]], shape: StepShape) -> int:
    """FSDP2's gradients of a block or the root, as they are reduced."""
    return FP32_BYTES * shape.shards * count_shard(shapes, shape.shards)


def _left_over(config: ModelConfig, shape: StepShape) -> int:
    """FSDP2 lets go of what it reduced at the next reduction, or where the step's last backward pass ends."""
    is_reduced_before = shape.is_sharded and shape.accumulation > 1 and not shape.whole_gradients
    return _reduced(root_shapes(config), shape) if is_reduced_before else 0


# --- The phases -------------------------------------------------------------------------------------------------------


def _at_the_loss(config: ModelConfig, shape: StepShape) -> Bytes:
    """What is there between the last block's forward and its backward pass."""
    N, D, c = shape.num_tokens, config.width, shape.compute_bytes
    kept = _kept(config, shape, blocks=config.num_layers)
    kept["activations"] += N * D * c  # the head's input, and what its norm keeps
    kept["activations"] += count_kept_by_norm(config, shape) if config.has_last_norm else 0
    return {
        **_state(config, shape),
        **_gradients(config, shape, done_blocks=0, is_root_done=False),
        **kept,
        **_gathered(config, shape, blocks=1 if shape.reshard_after_forward else config.num_layers),
        "in flight": _left_over(config, shape),
    }


def _head_copy(config: ModelConfig, shape: StepShape) -> int:
    is_low = shape.compute_bytes < FP32_BYTES
    return shape.compute_bytes * config.padded_vocab_size * config.width if is_low else 0


def _forward_gathering(config: ModelConfig, shape: StepShape) -> Bytes:
    """FSDP2 before the last block: what came for the block before it is still held."""
    if shape.shards == 1 or shape.is_all_gathered:
        return {}
    blocks, came = config.num_layers, _gathered_block(config, shape)
    return {
        **_state(config, shape),
        **_gradients(config, shape, done_blocks=0, is_root_done=False),
        **_kept(config, shape, blocks=blocks - 1),
        **_gathered(config, shape, blocks=0 if shape.reshard_after_forward else blocks - 1),
        "in flight": _left_over(config, shape) + (2 if blocks > 1 else 1) * came,
        "gloo's copy": came if shape.on_cpu else 0,
    }


def _loss_forward(config: ModelConfig, shape: StepShape) -> Bytes:
    """FSDP2 still holds the last block's weights as they came."""
    N, D, V, c = shape.num_tokens, config.width, config.padded_vocab_size, shape.compute_bytes
    found = _at_the_loss(config, shape)
    if shape.is_sharded and shape.shards > 1 and not shape.is_all_gathered:
        found["in flight"] += _gathered_block(config, shape)
    if shape.chunk_tokens is None:
        # Logits, log-probabilities; between them logits without the padding's columns, in fp32.
        trimmed = config.vocab_size * FP32_BYTES
        is_copied = config.vocab_size < V or c < FP32_BYTES
        logits = N * (V * c + is_copied * trimmed + (c == FP32_BYTES) * trimmed)
        largest = max(logits, 2 * N * trimmed)
        if config.logit_softcap is not None:  # raw, before and after tanh; or that, capped ones and log-probabilities
            largest = N * (V * c + (c < FP32_BYTES) * trimmed + 2 * trimmed)
        return found | {"loss": largest, "head's weights": _head_copy(config, shape)}
    # A chunk's logits and two tensors of their size; or its gradient and the weight gradient that it makes.
    n = min(shape.chunk_tokens, N)
    product = _head_copy(config, shape) * (3 if shape.on_cpu else 1)  # a CPU adds up dtypes by way of a copy
    return found | {
        "loss": max((3 if config.logit_softcap is None else 4) * n * V * FP32_BYTES, n * V * c + product),
        "loss's gradients": N * D * c + V * D * FP32_BYTES,
        "head's weights": _head_copy(config, shape),
    }


def _loss_backward(config: ModelConfig, shape: StepShape) -> Bytes:
    N, D, V, c = shape.num_tokens, config.width, config.padded_vocab_size, shape.compute_bytes
    found = _at_the_loss(config, shape)
    if shape.chunk_tokens is not None:  # both gradients are there, and both again times the outer gradient
        return found | {"loss's gradients": 2 * (N * D * c + V * D * FP32_BYTES)}
    # Log-probabilities, their gradient, the logits' gradient; and what tanh made of them.
    losses = (3 if config.logit_softcap is None else 4) * N * config.vocab_size * FP32_BYTES
    products = N * V * c + N * D * c + V * D * c
    return found | {"loss": max(losses, products), "head's weights": _head_copy(config, shape)}


def _block_backward(config: ModelConfig, shape: StepShape, index: int) -> Bytes:
    """In block `index`, where its MLP's last matrix has made its gradients: all that the block kept is there. Or right
    after that, where SwiGLU's two factors or a square's base get theirs: but for what that matrix kept."""
    N, D, F, c = shape.num_tokens, config.width, config.resolved_mlp_width, shape.compute_bytes
    kept = _kept(config, shape, blocks=index + 1)
    if shape.activation_checkpointing:
        kept["recomputed block"] = sum(count_block_activations(config, shape).values()) + _block_copies(config, shape)
        kept["recomputed block"] -= _is_input_kept(config, shape) * N * D * c
    found = {
        **_state(config, shape),
        **_gradients(config, shape, done_blocks=config.num_layers - 1 - index, is_root_done=False),
        **kept,
        **_gathered(config, shape, blocks=1 if shape.reshard_after_forward else index + 1),
        "head's gradient": _head_gradient(config, shape),
        "block's gradients": N * D * c
        + max(N * F * c + F * D * c, F * D * FP32_BYTES, 2 * N * F * c if config.mlp in ("swiglu", "relu2") else 0),
    }
    if shape.is_sharded:
        found["in flight"] = _in_flight(config, shape, index)
    return found


def _is_input_kept(config: ModelConfig, shape: StepShape) -> bool:
    """Does autograd keep a block's input as it is, so that to keep it twice takes nothing?"""
    is_read_by_matrix = config.norm == "none" or config.norm_place == "post"
    return is_read_by_matrix or shape.compute_bytes == FP32_BYTES


def _attention_backward(config: ModelConfig, shape: StepShape, index: int) -> Bytes:
    """Of written-out attention, in the softmax: its gradients of both sides. The MLP has let go of what it kept."""
    if config.attention != "naive":
        return {}
    N, D, c = shape.num_tokens, config.width, shape.compute_bytes
    found = _block_backward(config, shape, index)
    block = count_block_activations(config, shape)
    holder = "recomputed block" if shape.activation_checkpointing else "activations"
    found[holder] -= block["mlp, between its matrices"] + block["matrices' inputs"] // 2
    found["block's gradients"] = 2 * N * D * c + 2 * N * config.num_heads * shape.seq_len * FP32_BYTES
    is_mlp_added_at_once = not shape.is_sharded and (shape.mode == "ddp" or shape.accumulation > 1)
    mlp = config.num_mlp_matrices * D * config.resolved_mlp_width
    return found | ({} if is_mlp_added_at_once else {"mlp's gradients": FP32_BYTES * mlp})


def _head_gradient(config: ModelConfig, shape: StepShape) -> int:
    """While the blocks' are made: a tied head's waits for the embedding's; another goes where its earlier ones are."""
    is_added_at_once = not shape.is_sharded and (shape.mode == "ddp" or shape.accumulation > 1)
    return 0 if not config.tie and is_added_at_once else FP32_BYTES * config.padded_vocab_size * config.width


def _gathering(config: ModelConfig, shape: StepShape, index: int) -> Bytes:
    """FSDP2 as block `index` begins its backward pass: the weights of the block before it are on their way."""
    if shape.shards == 1 or not shape.reshard_after_forward:
        return {}
    return {
        **_state(config, shape),
        **_gradients(config, shape, done_blocks=config.num_layers - 1 - index, is_root_done=False),
        **_kept(config, shape, blocks=index + 1),
        **_gathered(config, shape, blocks=1),
        "head's gradient": _head_gradient(config, shape),
        "block's gradients": shape.num_tokens * config.width * shape.compute_bytes,
        "in flight": _in_flight(config, shape, index),
        "gloo's copy": _gathered_block(config, shape) if shape.on_cpu else 0,
    }


def _in_flight(config: ModelConfig, shape: StepShape, index: int) -> int:
    """In the backward pass of block `index`: the weights of the block before it, the gradients of the one after it."""
    is_last = index == config.num_layers - 1
    gathered = _gathered_block(config, shape) if index > 0 and shape.shards > 1 and shape.reshard_after_forward else 0
    return gathered + (_left_over(config, shape) if is_last else _reduced(block_shapes(config), shape))


def _block_reduction(config: ModelConfig, shape: StepShape, index: int, *, is_sent: bool) -> Bytes:
    """FSDP2 after block `index`, its weights freed: its gradients are copied into what is sent in fp32, then let go."""
    N, D, c, last = shape.num_tokens, config.width, shape.compute_bytes, config.num_layers - 1
    is_prefetched = index > 0 and shape.shards > 1 and shape.reshard_after_forward
    found = {
        **_state(config, shape),
        **_gradients(config, shape, done_blocks=last - index + is_sent, is_root_done=False),
        **_kept(config, shape, blocks=index),
        **_gathered(config, shape, blocks=0 if shape.reshard_after_forward else index),
        "head's gradient": _head_gradient(config, shape),
        "block's gradients": N * D * c,
        "in flight": _reduced(block_shapes(config), shape) + (_gathered_block(config, shape) if is_prefetched else 0),
    }
    if is_sent:
        return found | _arrived(block_shapes(config), shape)
    found["block's gradients"] += 0 if shape.adds_up_whole else c * count_shard(block_shapes(config), 1)
    return found


def _arrived(shapes: list[tuple[int, ...]], shape: StepShape) -> Bytes:
    """What a reduction makes beside the gradients that it leaves."""
    own = FP32_BYTES * count_shard(shapes, shape.shards)
    return {
        "reduced, to add": own if shape.accumulation > 1 and not shape.whole_gradients else 0,
        "gloo's copy": _reduced(shapes, shape) if shape.on_cpu and shape.shards > 1 else 0,
    }


def _embedding_backward(config: ModelConfig, shape: StepShape, *, is_last: bool) -> Bytes:
    """The end of a backward pass: the embedding's gradient as head and as embedding, and their sum; of a head that is
    another matrix, the two by themselves."""
    N, D, V, c = shape.num_tokens, config.width, config.padded_vocab_size, shape.compute_bytes
    blocks = config.num_layers
    table = V * D * FP32_BYTES
    # autograd adds up in place what it owns: not what the plain loss makes in fp32, which is the transpose of another.
    tables = 3 if c == FP32_BYTES and shape.chunk_tokens is None else 2
    found = {
        **_state(config, shape),
        **_gradients(config, shape, done_blocks=blocks, is_root_done=False),
        **_gathered(config, shape, blocks=0),
        "embedding's gradients": (tables if config.tie else 1) * table + N * D * FP32_BYTES,
        "head's gradient": 0 if config.tie else _head_gradient(config, shape),
    }
    if not is_last:
        whole_blocks = blocks * count_shard(block_shapes(config), 1)
        whole_root = count_shard(root_shapes(config), 1) if shape.accumulation > 2 else 0
        found |= {"gradients": 0, "whole gradients": FP32_BYTES * (whole_blocks + whole_root)}
        found |= _gathered(config, shape, blocks=0 if shape.reshard_after_forward else blocks)
    elif shape.is_sharded:
        found["in flight"] = _reduced(block_shapes(config), shape)
    return found


def _root_reduction(config: ModelConfig, shape: StepShape, *, is_sent: bool) -> Bytes:
    """FSDP2 at the end: the same with the root's gradients. Its weights are freed by the last micro-batch alone."""
    is_repeated = shape.accumulation > 1 and not shape.whole_gradients
    found = {
        **_state(config, shape),
        **_gradients(config, shape, done_blocks=config.num_layers, is_root_done=is_sent),
        **(_gathered(config, shape, blocks=0) if is_repeated else {}),
        "in flight": _reduced(root_shapes(config), shape),
    }
    if is_sent:
        return found | _arrived(root_shapes(config), shape)
    return found | {
        "embedding's gradients": FP32_BYTES * (0 if shape.adds_up_whole else count_shard(root_shapes(config), 1))
    }


def _update(config: ModelConfig, shape: StepShape) -> Bytes:
    largest = max(count_shard([each], shape.shards) for each in block_shapes(config) + root_shapes(config))
    return {
        **_state(config, shape),
        **_gradients(config, shape, done_blocks=config.num_layers, is_root_done=True),
        "norm": FP64_BYTES * largest if shape.on_cpu else 0,
    }
