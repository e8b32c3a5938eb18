"""Which process am I among how many? torchrun says it, srun with a task for each process, or submitit; else: alone.

Needs no torch and no Python newer than 3.9: launch/requeue.py reads it on nodes that have nothing else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from common.errors import InputError

# Below those that the kernel gives to any program that asks: 32768 and up (ip_local_port_range in ip(7)).
FIRST_PORT, NUM_PORTS = 12000, 18000


@dataclass(frozen=True)
class RankInfo:
    """One process of `world`, and of the `local_world` that share its host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    host: str = "localhost"
    """Of rank 0, where all meet; with its port, from MASTER_ADDR and MASTER_PORT if they are set."""
    port: int = FIRST_PORT

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world and 0 <= self.local_rank < self.local_world <= self.world):
            raise InputError(
                f"rank {self.rank} of {self.world}, {self.local_rank} of {self.local_world} on its host: that cannot "
                "be; unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, or set them all"
            )


def take_rank(environ: MutableMapping[str, str] = os.environ, *, is_plan: bool = False) -> RankInfo:
    """This process's place; of several, also in the environment as torchrun leaves it, where torch looks for it."""
    place = find_rank(environ, is_plan=is_plan)
    if place.world > 1:
        environ.update(
            RANK=str(place.rank),
            WORLD_SIZE=str(place.world),
            LOCAL_RANK=str(place.local_rank),
            LOCAL_WORLD_SIZE=str(place.local_world),
            MASTER_ADDR=place.host,
            MASTER_PORT=str(place.port),
        )
    return place


def find_rank(environ: Mapping[str, str], *, is_plan: bool = False) -> RankInfo:
    """InputError if two launchers contradict each other, or the variables themselves.

    is_plan: nothing will be trained, so WORLD_SIZE=8 alone may stand for eight processes.
    """
    try:
        place = _of_slurm_step(environ)
        if "RANK" in environ or "WORLD_SIZE" in environ:
            its = _of_torchrun({"RANK": "0", **environ} if is_plan else environ)
            is_torchruns = "TORCHELASTIC_RUN_ID" in environ
            if place.world > 1 and not is_torchruns and (its.rank, its.world) != (place.rank, place.world):
                raise InputError(
                    f"srun started rank {place.rank} of {place.world}, but RANK={its.rank} and WORLD_SIZE={its.world} "
                    "are set; unset RANK, WORLD_SIZE and LOCAL_RANK"
                )
            return its
        return place if place.world > 1 else _of_submitit(environ)
    except (KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot tell this process's rank from the environment: {error!r}") from error


def _of_torchrun(environ: Mapping[str, str]) -> RankInfo:
    rank, world = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    return RankInfo(
        rank=rank,
        world=world,
        local_rank=int(environ.get("LOCAL_RANK", rank)),
        local_world=int(environ.get("LOCAL_WORLD_SIZE", world)),
        host=environ.get("MASTER_ADDR", RankInfo.host),
        port=int(environ.get("MASTER_PORT", RankInfo.port)),
    )


def _of_slurm_step(environ: Mapping[str, str]) -> RankInfo:
    """A task of srun. Not asked of SLURM_NTASKS, which stands in the batch script's own environment, too."""
    if "SLURM_STEP_NUM_TASKS" not in environ:
        return RankInfo()
    return RankInfo(
        rank=int(environ["SLURM_PROCID"]),
        world=int(environ["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        local_world=tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])],
        host=environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
        port=int(environ.get("MASTER_PORT") or port_of(int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"]))),
    )


def _of_submitit(environ: Mapping[str, str]) -> RankInfo:
    """A task of submitit's local executor, all on this host."""
    world = int(environ.get("SUBMITIT_LOCAL_NTASKS", 1))
    if world == 1:
        return RankInfo()
    rank = int(environ["SUBMITIT_LOCAL_GLOBALID"])
    port = int(environ.get("MASTER_PORT") or port_of(int(environ["SUBMITIT_LOCAL_JOB_ID"]), 0))
    return RankInfo(rank, world, rank, world, environ.get("MASTER_ADDR", RankInfo.host), port)


def port_of(job: int, start: int) -> int:
    """A port for one start of a job, another one than its neighbours have and than the start before."""
    return FIRST_PORT + (job * 13 + start) % NUM_PORTS


def tasks_per_node(text: str) -> list[int]:
    """Slurm's "4(x2),3": [4, 4, 3]."""
    counts = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    return counts


def first_host(nodes: str) -> str:
    """The first of Slurm's "r[1-2]n[07-12],login": r1n07."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", re.match(r"(?:\[[^]]*\]|[^,[])+", nodes)[0])  # type: ignore[index]


def slurm_job(environ: Mapping[str, str]) -> str | None:
    """What Slurm's commands call this job, None outside of one. An array's task has its own name."""
    if "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")
