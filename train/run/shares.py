"""Divides a checkpoint's tensors over the ranks that hold them, for writing and for reading."""

from typing import TypeVar

from torch import Tensor
from torch.distributed.tensor import DTensor

from train.parallel.apply import local
from train.processes.group import ProcessGroup

Ranks = list[int]
Value = TypeVar("Value")


def divide(tensors: dict[str, Tensor], group: ProcessGroup) -> dict[str, Ranks]:
    """Return which ranks write or read each tensor: the largest first, by the ranks with the least so far.

    One rank takes a tensor that all hold alike. The ranks of one replica take a sharded tensor, each its own shard. All
    ranks divide alike, without communication. DCP would divide what is written as evenly by itself, but only after each
    rank had copied everything into host memory.
    """
    loads = [0.0] * group.world
    division = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        ranks = min(holders_of(tensor, group), key=lambda ranks: sum(loads[rank] for rank in ranks))
        for rank in ranks:
            loads[rank] += tensor.nbytes / len(ranks)
        division[name] = ranks
    return division


def holders_of(tensor: Tensor, group: ProcessGroup) -> list[Ranks]:
    """Return every set of ranks that together hold a whole copy of the tensor."""
    if not isinstance(tensor, DTensor):
        return [[rank] for rank in range(group.world)]
    ranks = tensor.device_mesh.mesh
    return ranks.tolist() if is_replicated(tensor) else [ranks.flatten().tolist()]


def is_replicated(tensor: Tensor) -> bool:
    """Return whether a tensor is spread over the rows of a table of ranks, each row holding it all."""
    return isinstance(tensor, DTensor) and tensor.placements[0].is_replicate()


def share_of(values: dict[str, Value], division: dict[str, Ranks], rank: int) -> dict[str, Value]:
    """Return the values, by the names of their tensors, that fall to `rank`."""
    return {name: values[name] for name, ranks in division.items() if rank in ranks}


def hand_out(tensors: dict[str, Tensor], division: dict[str, Ranks], group: ProcessGroup) -> None:
    """Give every rank the tensors that others have read for it. Collective, on the tensors' own device.

    A tensor that all hold alike goes to all ranks, a shard to the ranks that hold the same shard of other replicas.
    """
    for name, readers in division.items():
        tensor = tensors[name]
        if not isinstance(tensor, DTensor):
            group.broadcast_(tensor, readers[0])
        elif is_replicated(tensor) and local(tensor).numel():
            shard = tensor.device_mesh.get_local_rank(1)
            group.broadcast_(local(tensor), readers[shard], among=tensor.device_mesh.get_group(0))
