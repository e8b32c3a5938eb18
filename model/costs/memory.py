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
    norm_shapes,
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


def _gradients(config: ModelConfig, shape: StepShape, done: int, *, is_root_done: bool) -> Bytes:
    """In the last micro-batch's backward pass, those of `done` blocks made and reduced.

    DDP's lie in its buckets all the time. Others are there from the first micro-batch to the update; whole ones that
    FSDP2 adds up become shards one block after the other.
    """
    blocks, num_done = config.num_layers, 1 if is_root_done else 0
    if shape.mode == "ddp" or (shape.accumulation > 1 and not shape.adds_up_whole):
        done, num_done = blocks, 1
    own_block, own_root = (FP32_BYTES * count_shard(f(config), shape.shards) for f in (block_shapes, root_shapes))
    found = {"gradients": done * own_block + num_done * own_root}
    if shape.adds_up_whole:
        block, root = (FP32_BYTES * count_shard(f(config), 1) for f in (block_shapes, root_shapes))
        found["whole gradients"] = (blocks - done) * block + (1 - num_done) * root
    return found


def _held(config: ModelConfig, shape: StepShape, *, done: int = 0, is_root_done: bool = False, kept: int = 0) -> Bytes:
    """The state, the gradients when those of `done` blocks are made, and what autograd keeps of the first `kept`."""
    N, D = shape.num_tokens, config.width
    found = {**_state(config, shape), **_gradients(config, shape, done, is_root_done=is_root_done)}
    if shape.activation_checkpointing:  # and the first block's values, as part of its queries, keys and values
        first_values = 3 * N * D if config.value_residual and kept else 0
        return found | {"activations": (kept * N * D + first_values) * shape.compute_bytes}
    return found | {
        "activations": kept * sum(count_block_activations(config, shape).values()),
        "low-precision weights": kept * _block_copies(config, shape),
    }


def _block_copies(config: ModelConfig, shape: StepShape) -> int:
    """Copies of a block's weights in the dtype they are used in; FSDP2 gathers the matrices in it."""
    if shape.compute_bytes == FP32_BYTES:
        return 0
    if shape.is_sharded:  # of its norms' weights in fp32
        return FP32_BYTES * (2 * config.width * len(norm_shapes(config)) + 2 * config.head_size * config.qk_norm)
    return shape.compute_bytes * sum(math.prod(s) for s in block_shapes(config) if len(s) == 2)


def _gathered(config: ModelConfig, shape: StepShape, blocks: int, *, in_use: int = 0) -> Bytes:
    """FSDP2's whole parameters: the root's, in fp32, and those of `blocks` blocks, in the dtype of the activations; of
    the blocks `in_use` alone where others are freed after their forward pass."""
    blocks = in_use if shape.reshard_after_forward else blocks
    return {"gathered weights": _reduced(root_shapes(config), shape) + blocks * _gathered_block(config, shape)}


def _gathered_block(config: ModelConfig, shape: StepShape) -> int:
    """As it comes, as it is laid out, and as gloo has it before."""
    return shape.is_sharded * shape.compute_bytes * shape.shards * count_shard(block_shapes(config), shape.shards)


def _coming(config: ModelConfig, shape: StepShape, index: int) -> int:
    """In the backward pass of block `index`: FSDP2's weights of the block before it, on their way."""
    return _gathered_block(config, shape) if index > 0 and shape.shards > 1 and shape.reshard_after_forward else 0


def _reduced(shapes: list[tuple[int, ...]], shape: StepShape) -> int:
    """FSDP2's gradients of a block or the root, as they are reduced."""
    return shape.is_sharded * FP32_BYTES * shape.shards * count_shard(shapes, shape.shards)


def _left_over(config: ModelConfig, shape: StepShape) -> int:
    """FSDP2 lets go of what it reduced at the next reduction, or where the step's last backward pass ends."""
    return _reduced(root_shapes(config), shape) if shape.reduces_each else 0


# --- The phases -------------------------------------------------------------------------------------------------------


def _at_the_loss(config: ModelConfig, shape: StepShape) -> Bytes:
    """What is there between the last block's forward and its backward pass."""
    found = {
        **_held(config, shape, kept=config.num_layers),
        **_gathered(config, shape, config.num_layers, in_use=1),
        "in flight": _left_over(config, shape),
    }
    found["activations"] += shape.num_tokens * config.width * shape.compute_bytes  # the head's input; its norm's:
    found["activations"] += count_kept_by_norm(config, shape) if config.has_last_norm else 0
    return found


def _head_copy(config: ModelConfig, shape: StepShape) -> int:
    is_low = shape.compute_bytes < FP32_BYTES
    return shape.compute_bytes * config.padded_vocab_size * config.width if is_low else 0


def _forward_gathering(config: ModelConfig, shape: StepShape) -> Bytes:
    """FSDP2 before the last block: what came for the block before it is still held."""
    if shape.shards == 1 or shape.is_all_gathered:
        return {}
    blocks, came = config.num_layers, _gathered_block(config, shape)
    return {
        **_held(config, shape, kept=blocks - 1),
        **_gathered(config, shape, blocks - 1),
        "in flight": _left_over(config, shape) + min(blocks, 2) * came,
        "gloo's copy": came if shape.on_cpu else 0,
    }


def _loss_forward(config: ModelConfig, shape: StepShape) -> Bytes:
    """FSDP2 still holds the last block's weights as they came."""
    N, D, V, c = shape.num_tokens, config.width, config.padded_vocab_size, shape.compute_bytes
    found = _at_the_loss(config, shape)
    if shape.shards > 1 and not shape.is_all_gathered:
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


def _in_block(config: ModelConfig, shape: StepShape, index: int) -> Bytes:
    """What is there in the backward pass of block `index`, beside what it makes itself."""
    is_last = index == config.num_layers - 1
    left = _left_over(config, shape) if is_last else _reduced(block_shapes(config), shape)
    return {
        **_held(config, shape, done=config.num_layers - 1 - index, kept=index + 1),
        **_gathered(config, shape, index + 1, in_use=1),
        "head's gradient": _head_gradient(config, shape),
        "in flight": left + _coming(config, shape, index),
    }


def _block_backward(config: ModelConfig, shape: StepShape, index: int) -> Bytes:
    """In block `index`, where its MLP's last matrix has made its gradients: all that the block kept is there. Or right
    after that, where SwiGLU's two factors or a square's base get theirs: but for what that matrix kept."""
    N, D, F, c = shape.num_tokens, config.width, config.resolved_mlp_width, shape.compute_bytes
    found = _in_block(config, shape, index)
    if shape.activation_checkpointing:
        found["recomputed block"] = sum(count_block_activations(config, shape).values()) + _block_copies(config, shape)
        found["recomputed block"] -= _is_input_kept(config, shape) * N * D * c
    factors = {"swiglu": 2, "relu2": 3}.get(config.mlp, 0) * N * F * c
    return found | {"block's gradients": N * D * c + max(N * F * c + F * D * c, F * D * FP32_BYTES, factors)}


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
    mlp = config.num_mlp_matrices * D * config.resolved_mlp_width
    return found | {"mlp's gradients": 0 if shape.adds_at_once else FP32_BYTES * mlp}


def _head_gradient(config: ModelConfig, shape: StepShape) -> int:
    """While the blocks' are made: a tied head's waits for the embedding's; another goes where its earlier ones are."""
    return 0 if not config.tie and shape.adds_at_once else FP32_BYTES * config.padded_vocab_size * config.width


def _gathering(config: ModelConfig, shape: StepShape, index: int) -> Bytes:
    """FSDP2 as block `index` begins its backward pass: the weights of the block before it are on their way."""
    if not (coming := _coming(config, shape, index)):
        return {}
    return _in_block(config, shape, index) | {
        "block's gradients": shape.num_tokens * config.width * shape.compute_bytes,
        "gloo's copy": coming if shape.on_cpu else 0,
    }


def _block_reduction(config: ModelConfig, shape: StepShape, index: int, *, is_sent: bool) -> Bytes:
    """FSDP2 after block `index`, its weights freed: its gradients are copied into what is sent in fp32, then let go."""
    c, shapes = shape.compute_bytes, block_shapes(config)
    is_copied = not is_sent and not shape.adds_up_whole
    return {
        **_held(config, shape, done=config.num_layers - 1 - index + is_sent, kept=index),
        **_gathered(config, shape, index),
        "head's gradient": _head_gradient(config, shape),
        "block's gradients": shape.num_tokens * config.width * c + is_copied * c * count_shard(shapes, 1),
        "in flight": _reduced(shapes, shape) + _coming(config, shape, index),
        **(_arrived(shapes, shape) if is_sent else {}),
    }


def _arrived(shapes: list[tuple[int, ...]], shape: StepShape) -> Bytes:
    """What a reduction makes beside the gradients that it leaves."""
    own = FP32_BYTES * count_shard(shapes, shape.shards)
    return {
        "reduced, to add": own if shape.reduces_each else 0,
        "gloo's copy": _reduced(shapes, shape) if shape.on_cpu and shape.shards > 1 else 0,
    }


def _embedding_backward(config: ModelConfig, shape: StepShape, *, is_last: bool) -> Bytes:
    """The end of a backward pass: the embedding's gradient as head and as embedding, and their sum; of a head that is
    another matrix, the two by themselves."""
    blocks = config.num_layers
    table = config.padded_vocab_size * config.width * FP32_BYTES
    # autograd adds up in place what it owns: not what the plain loss makes in fp32, which is the transpose of another.
    tables = 3 if shape.compute_bytes == FP32_BYTES and shape.chunk_tokens is None else 2
    found = {
        **_held(config, shape, done=blocks),
        **_gathered(config, shape, 0 if is_last else blocks),
        "embedding's gradients": (tables if config.tie else 1) * table + shape.num_tokens * config.width * FP32_BYTES,
        "head's gradient": 0 if config.tie else _head_gradient(config, shape),
        "in flight": _reduced(block_shapes(config), shape) if is_last else 0,
    }
    if is_last:
        return found
    whole_blocks = blocks * count_shard(block_shapes(config), 1)
    whole_root = count_shard(root_shapes(config), 1) if shape.accumulation > 2 else 0
    return found | {"gradients": 0, "whole gradients": FP32_BYTES * (whole_blocks + whole_root)}


def _root_reduction(config: ModelConfig, shape: StepShape, *, is_sent: bool) -> Bytes:
    """FSDP2 at the end: the same with the root's gradients. Its weights are freed by the last micro-batch alone."""
    shapes = root_shapes(config)
    gradients = 0 if is_sent or shape.adds_up_whole else FP32_BYTES * count_shard(shapes, 1)
    return {
        **_held(config, shape, done=config.num_layers, is_root_done=is_sent),
        **(_gathered(config, shape, 0) if shape.reduces_each else {}),
        "embedding's gradients": gradients,
        "in flight": _reduced(shapes, shape),
        **(_arrived(shapes, shape) if is_sent else {}),
    }


def _update(config: ModelConfig, shape: StepShape) -> Bytes:
    largest = max(count_shard([each], shape.shards) for each in block_shapes(config) + root_shapes(config))
    norm = FP64_BYTES * largest if shape.on_cpu else 0
    return _held(config, shape, done=config.num_layers, is_root_done=True) | {"norm": norm}
