"""Spreads the optimizer's state over all ranks, and brings whole matrices to owners that compute on them.

A parameter's rows are cut twice: over the shards of a replica, as FSDP2 cuts them, and each shard over the replicas.
So each rank keeps the state of its slice and no other rank has it, under DDP too (Rajbhandari et al. 2020, "ZeRO",
stage 1). A checkpoint sees these slices as one tensor, whatever the layout.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from train.parallel.apply import local
from train.parallel.plan import ParallelPlan
from train.processes.group import ProcessGroup

ROUNDS = 2  # in which matrices are exchanged: one round's messages overlap another round's computation

# torch 2.13 has renamed it, and warns of the former name.
all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor

Shape = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """The ranks as a table: rank = replica x shards + shard."""

    replicas: int
    shards: int

    @property
    def world(self) -> int:
        return self.replicas * self.shards

    def shard_rows(self, num_rows: int, shard: int) -> range:
        """Return the rows of a shard. The first shards are alike, later ones may be shorter or empty."""
        return _part(range(num_rows), self.shards, shard)

    def slice_rows(self, num_rows: int, rank: int) -> range:
        """Return the rows whose state `rank` keeps."""
        replica, shard = divmod(rank, self.shards)
        return _part(self.shard_rows(num_rows, shard), self.replicas, replica)


def _part(rows: range, parts: int, index: int) -> range:
    """Return a part as torch.chunk cuts it, and an empty one where torch.chunk returns fewer."""
    return rows[index * math.ceil(len(rows) / parts) :][: math.ceil(len(rows) / parts)]


class StateSlices:
    """This rank's slices of all parameters, in a world of several ranks. Collective to build."""

    def __init__(self, parameters: Sequence[Tensor], parallel_plan: ParallelPlan, group: ProcessGroup) -> None:
        self.grid = Grid(parallel_plan.replicas, parallel_plan.shards)
        self.rank = group.rank
        self.replica, self.shard = divmod(group.rank, self.grid.shards)
        self.shard_ranks: dist.ProcessGroup | None = None  # None: all ranks
        self.same_shard_ranks: dist.ProcessGroup | None = None
        first = parameters[0]
        if not isinstance(first, DTensor):
            self._mesh = init_device_mesh(group.device.type, (group.world,))
        elif first.device_mesh.ndim == 1:
            self._mesh = first.device_mesh
        else:
            self.same_shard_ranks, self.shard_ranks = first.device_mesh.get_all_groups()
            # Only to describe the slices: nothing is sent over this mesh.
            self._mesh = DeviceMesh(group.device.type, first.device_mesh.mesh.T, _init_backend=False)

    def zeros(self, parameter: Tensor) -> Tensor:
        """Return zeros for this rank's slice, as a part of one tensor of the parameter's shape."""
        own = torch.zeros_like(self.of(local(parameter.detach()), len(parameter)))
        placements = [Shard(0)] * self._mesh.ndim
        return DTensor.from_local(
            own, self._mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )

    def of(self, shard: Tensor, num_rows: int) -> Tensor:
        """Return this rank's slice, a view, of its shard of a parameter with `num_rows` rows, or of its gradient."""
        rows = self.grid.slice_rows(num_rows, self.rank)
        first = self.grid.shard_rows(num_rows, self.shard).start
        return shard[rows.start - first : rows.stop - first]

    def share(self, shards: Sequence[Tensor], num_rows: Sequence[int]) -> None:
        """Overwrite each shard's slices with those of the ranks that keep their state. Collective.

        One all-gather over the ranks with the same shard; each slice is sent as long as the longest.
        """
        if self.grid.replicas == 1:
            return
        sizes = [math.ceil(len(shard) / self.grid.replicas) * math.prod(shard.shape[1:]) for shard in shards]
        sent = shards[0].new_zeros(sum(sizes))
        for shard, rows, part in zip(shards, num_rows, sent.split(sizes), strict=True):
            own = self.of(shard, rows).reshape(-1)
            part[: len(own)] = own
        received = sent.new_empty(self.grid.replicas * len(sent))
        all_gather(received, sent, group=self.same_shard_ranks)
        for shard, parts in zip(shards, received.view(self.grid.replicas, -1).split(sizes, dim=1), strict=True):
            shard.view(-1).copy_(parts.reshape(-1)[: shard.numel()])


class MatrixOwners:
    """Give every matrix an owner among the ranks, which computes on the whole of it.

    Owners are balanced by `costs`. `run` moves slices to owners and the results back as shards, in few collectives:
    in each of ROUNDS rounds one all-to-all of all ranks, one of a replica's ranks if there are several shards, and one
    all-gather of the ranks with the same shard if there are several replicas.
    """

    def __init__(self, shapes: Sequence[Shape], costs: Sequence[float], grid: Grid) -> None:
        self.shapes = shapes
        self.grid = grid
        owned = assign(costs, grid.world)
        for indices in owned:
            indices.sort(key=lambda index: sorted(shapes[index]))  # alike ones in one round: they are one batch
        num_rounds = min(ROUNDS, max(map(len, owned)))
        self.rounds = [[_chunk(indices, num_rounds, number) for indices in owned] for number in range(num_rounds)]

    def slice_numel(self, index: int, rank: int) -> int:
        rows, columns = self.shapes[index]
        return len(self.grid.slice_rows(rows, rank)) * columns

    def shard_numel(self, index: int, shard: int) -> int:
        rows, columns = self.shapes[index]
        return len(self.grid.shard_rows(rows, shard)) * columns

    def of_replica(self, number: int, replica: int) -> list[int]:
        """Return the matrices of a round that are owned in a replica, in the order of their owners."""
        first = replica * self.grid.shards
        return [index for rank in range(first, first + self.grid.shards) for index in self.rounds[number][rank]]

    def gathered_numel(self, number: int, shard: int) -> int:
        """Return the elements that each rank with this shard sends to those with the same shard, padding included."""
        replicas = range(self.grid.replicas)
        return max(sum(self.shard_numel(index, shard) for index in self.of_replica(number, r)) for r in replicas)

    def run(
        self,
        slices: Sequence[Tensor],
        compute: Callable[[dict[int, Tensor]], dict[int, Tensor]],
        layout: StateSlices,
    ) -> list[Tensor]:
        """Return this rank's shard of `compute`'s result for each matrix, given its slice of each. Collective.

        `compute` maps whole matrices, by their index, to results of the same shapes and dtype.
        """
        dtype, device = slices[0].dtype, slices[0].device
        arriving = deque(self._send_slices(number, slices, layout) for number in range(len(self.rounds)))
        returning = []
        for number in range(len(self.rounds)):
            work, received = arriving.popleft()
            work.wait()
            wholes = self._assemble(number, received, layout.rank)
            del work, received
            results = compute(wholes)
            del wholes
            returning.append(self._send_results(number, results, torch.empty(0, dtype=dtype, device=device), layout))
            del results
        shards: dict[int, Tensor] = {}
        for number, (returned_work, gathered) in enumerate(returning):
            if returned_work is not None:
                returned_work.wait()
            shards |= self._unpack(number, gathered, layout.shard)
        return [shards[index] for index in range(len(self.shapes))]

    def _send_slices(self, number: int, slices: Sequence[Tensor], layout: StateSlices) -> tuple[dist.Work, Tensor]:
        """Send this rank's slice of every matrix of a round to the matrix's owner."""
        owned, ranks = self.rounds[number], range(self.grid.world)
        sent = torch.cat([slices[index].reshape(-1) for indices in owned for index in indices])
        sent_sizes = [sum(self.slice_numel(index, layout.rank) for index in owned[rank]) for rank in ranks]
        received_sizes = [sum(self.slice_numel(index, rank) for index in owned[layout.rank]) for rank in ranks]
        received = sent.new_empty(sum(received_sizes))
        work = dist.all_to_all_single(received, sent, received_sizes, sent_sizes, async_op=True)
        return work, received

    def _assemble(self, number: int, received: Tensor, rank: int) -> dict[int, Tensor]:
        """Return the whole matrices that `rank` owns, from every rank's slices."""
        grid, own = self.grid, self.rounds[number][rank]
        sizes = [self.slice_numel(index, sender) for sender in range(grid.world) for index in own]
        pieces = received.split(sizes)
        by_rows = [replica * grid.shards + shard for shard in range(grid.shards) for replica in range(grid.replicas)]
        return {
            index: torch.cat([pieces[sender * len(own) + place] for sender in by_rows]).view(self.shapes[index])
            for place, index in enumerate(own)
        }

    def _send_results(
        self, number: int, results: dict[int, Tensor], nothing: Tensor, layout: StateSlices
    ) -> tuple[dist.Work | None, Tensor]:
        """Send results to the ranks that hold their shards: first within the owner's replica, then to the others."""
        grid, owned, shards = self.grid, self.rounds[number], range(self.grid.shards)
        own = owned[layout.rank]
        pieces = [results[index][slice_of(grid.shard_rows(len(results[index]), s))] for s in shards for index in own]
        sent = torch.cat([nothing, *(piece.reshape(-1) for piece in pieces)])  # a rank may own none
        work: dist.Work | None = None
        if grid.shards > 1:
            first = layout.replica * grid.shards
            sent_sizes = [sum(self.shard_numel(index, shard) for index in own) for shard in shards]
            received_sizes = [sum(self.shard_numel(i, layout.shard) for i in owned[first + shard]) for shard in shards]
            received = sent.new_empty(sum(received_sizes))
            work = dist.all_to_all_single(
                received, sent, received_sizes, sent_sizes, group=layout.shard_ranks, async_op=True
            )
            sent = received
        if grid.replicas > 1:
            if work is not None:
                work.wait()
            padded = sent.new_zeros(self.gathered_numel(number, layout.shard))
            padded[: len(sent)] = sent
            sent = padded.new_empty(grid.replicas * len(padded))
            work = all_gather(sent, padded, group=layout.same_shard_ranks, async_op=True)
        return work, sent

    def _unpack(self, number: int, gathered: Tensor, shard: int) -> dict[int, Tensor]:
        """Return the shards of a round's results by index, as views of what every replica sent."""
        shards: dict[int, Tensor] = {}
        for replica, part in enumerate(gathered.view(self.grid.replicas, -1)):
            indices = self.of_replica(number, replica)
            sizes = [self.shard_numel(index, shard) for index in indices]
            pieces = part[: sum(sizes)].split(sizes)
            shards |= {i: piece.view(-1, self.shapes[i][1]) for i, piece in zip(indices, pieces, strict=True)}
        return shards


def slice_of(rows: range) -> slice:
    return slice(rows.start, rows.stop)


def assign(costs: Sequence[float], world: int) -> list[list[int]]:
    """Return the indices that each rank owns: the costliest first, by the rank with the least so far."""
    owned: list[list[int]] = [[] for _ in range(world)]
    loads = [0.0] * world
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        rank = min(range(world), key=loads.__getitem__)
        owned[rank].append(index)
        loads[rank] += costs[index]
    return owned


def _chunk(indices: list[int], parts: int, number: int) -> list[int]:
    size = math.ceil(len(indices) / parts)
    return indices[number * size : (number + 1) * size]
