"""Rank and world size of this process, from the environment that torchrun, srun or submitit leaves; else one process.

This module needs no torch and runs on Python 3.9: launch/requeue.py uses it on nodes that have nothing else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from common.errors import InputError

# Below the ports that the kernel gives to any program: 32768 and up (ip_local_port_range in ip(7)).
FIRST_PORT, NUM_PORTS = 12000, 18000


@dataclass(frozen=True)
class RankInfo:
    """One process: its rank of `world`, and its local rank of the `local_world` that share its host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    host: str = "localhost"  # of rank 0, where all ranks meet: MASTER_ADDR if set
    port: int = FIRST_PORT  # likewise MASTER_PORT

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world and 0 <= self.local_rank < self.local_world <= self.world):
            raise InputError(
                f"rank {self.rank} of {self.world}, {self.local_rank} of {self.local_world} on its host: impossible; "
                "unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, or set them all"
            )


def take_rank(environ: MutableMapping[str, str] = os.environ, *, is_plan: bool = False) -> RankInfo:
    """Return this process's rank; with several processes, also set the variables in which torch looks for it."""
    rank_info = find_rank(environ, is_plan=is_plan)
    if rank_info.world > 1:
        environ.update(
            RANK=str(rank_info.rank),
            WORLD_SIZE=str(rank_info.world),
            LOCAL_RANK=str(rank_info.local_rank),
            LOCAL_WORLD_SIZE=str(rank_info.local_world),
            MASTER_ADDR=rank_info.host,
            MASTER_PORT=str(rank_info.port),
        )
    return rank_info


def find_rank(environ: Mapping[str, str], *, is_plan: bool = False) -> RankInfo:
    """Return this process's rank. `is_plan`: nothing will be trained, so WORLD_SIZE=8 alone means eight processes.

    Raise InputError if two launchers contradict each other, or the variables of one are incomplete or impossible.
    """
    try:
        rank_info = _of_slurm_step(environ)
        if "RANK" in environ or "WORLD_SIZE" in environ:
            torch_rank = _of_torchrun({"RANK": "0", **environ} if is_plan else environ)
            is_same = (torch_rank.rank, torch_rank.world) == (rank_info.rank, rank_info.world)
            if rank_info.world > 1 and "TORCHELASTIC_RUN_ID" not in environ and not is_same:
                raise InputError(
                    f"srun started rank {rank_info.rank} of {rank_info.world}, but RANK={torch_rank.rank} and "
                    f"WORLD_SIZE={torch_rank.world} are set; unset RANK, WORLD_SIZE and LOCAL_RANK"
                )
            return torch_rank
        return rank_info if rank_info.world > 1 else _of_submitit(environ)
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
    """Return the rank of a task of srun. SLURM_NTASKS would not do: the batch script has it, too."""
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
    """Return the rank of a task of submitit's local executor, whose tasks all run on this host."""
    world = int(environ.get("SUBMITIT_LOCAL_NTASKS", 1))
    if world == 1:
        return RankInfo()
    rank = int(environ["SUBMITIT_LOCAL_GLOBALID"])
    port = int(environ.get("MASTER_PORT") or port_of(int(environ["SUBMITIT_LOCAL_JOB_ID"]), 0))
    return RankInfo(rank, world, rank, world, environ.get("MASTER_ADDR", RankInfo.host), port)


def port_of(job: int, start: int) -> int:
    """Return a port for one start of a job, unlike the ports of neighbouring jobs and of the start before."""
    return FIRST_PORT + (job * 13 + start) % NUM_PORTS


def tasks_per_node(text: str) -> list[int]:
    """Return the tasks of each node: [4, 4, 3] for Slurm's "4(x2),3"."""
    counts = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    return counts


def first_host(nodes: str) -> str:
    """Return the first host of a list: r1n07 for Slurm's "r[1-2]n[07-12],login"."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", re.match(r"(?:\[[^]]*\]|[^,[])+", nodes)[0])  # type: ignore[index]


def slurm_job(environ: Mapping[str, str]) -> str | None:
    """Return the job id that Slurm's commands use, such as 9 or, for a task of an array, 9_3; None outside a job."""
    if "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def is_automatic_restart(environ: Mapping[str, str]) -> bool:
    """Return whether Slurm started this job again by itself."""
    return environ.get("SLURM_RESTART_COUNT", "0") != "0"
