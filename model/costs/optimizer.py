"""Count the memory of the optimizer: its state on a rank, and what Muon's update needs for a moment.

Letters are those of model/gpt.py.
"""

import math

from model.config import ModelConfig
from model.costs.activations import FP32_BYTES, StepShape, block_shapes, root_shapes

BF16_BYTES = 2

Shapes = list[tuple[int, ...]]


def count_optimizer(config: ModelConfig, shape: StepShape) -> int:
    """Return the bytes of AdamW's two moments of each element; with Muon, of one momentum for those of matrices."""
    matrices, others = matrices_and_others(config)
    replicas = shape.replicas if shape.is_muon else 1
    own_matrices, own_others = (count_slice(shapes, shape.shards, replicas) for shapes in (matrices, others))
    return FP32_BYTES * ((1 if shape.is_muon else 2) * own_matrices + 2 * own_others)


def matrices_and_others(config: ModelConfig) -> tuple[Shapes, Shapes]:
    """Return the shapes of the blocks' matrices, and those of all other parameters."""
    in_blocks = config.num_layers * block_shapes(config)
    return [s for s in in_blocks if len(s) == 2], [s for s in in_blocks if len(s) < 2] + root_shapes(config)


def count_slice(shapes: Shapes, shards: int, replicas: int) -> int:
    """Return the elements of the first rank's slices (train/parallel/state_slices.py)."""
    return sum(math.ceil(math.ceil(rows / shards) / replicas) * math.prod(rest) for rows, *rest in shapes)


def count_muon_update(config: ModelConfig, shape: StepShape) -> int:
    """Return the bytes beside the state: while matrices are orthogonalised, or while AdamW's slices are handed round.

    At the end of the former, all results for the own shards are there, with what an owner works on and sends.
    """
    D, F, world = config.width, config.resolved_mlp_width, shape.shards * shape.replicas
    matrices, others = matrices_and_others(config)
    own, held = count_slice(matrices, shape.shards, shape.replicas), count_slice(matrices, shape.shards, 1)
    num_together = 1 if shape.on_cpu else math.ceil(config.num_layers * config.num_mlp_matrices / world)
    working = num_together * (D * F + 2 * D * D)
    if world > 1:
        working = max(working, 3 * math.ceil(count_slice(matrices, 1, 1) / world) // 2)
    if shape.on_cpu:
        gloos_copy = held if shape.replicas > 1 else 0
        orthogonalised = FP32_BYTES * (held + working + gloos_copy)
    else:
        orthogonalised = BF16_BYTES * (own + held + working)
    shared = (1 + shape.replicas) * count_slice(others, shape.shards, shape.replicas) if shape.replicas > 1 else 0
    return max(orthogonalised, FP32_BYTES * shared)
