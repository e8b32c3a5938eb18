"""Rank and world size of this process, from the environment that torchrun, srun or submitit leaves; else one process.

This module needs no torch and runs on Python 3.9: launch/requeue.py uses it on nodes that have nothing else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from common.errors import RankError

LOOPBACK = "127.0.0.1"  # by number: a host may be unable to resolve names, its own included
# Below the ports that the kernel gives to any program: 32768 and up (ip_local_port_range in ip(7)).
FIRST_PORT, NUM_PORTS = 12000, 18000


@dataclass(frozen=True)
class RankInfo:
    """One process: its rank of `world`, and its local rank of the `local_world` that share its host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    host: str = LOOPBACK  # where all ranks meet: MASTER_ADDR, or LOOPBACK if all ranks are on one host
    port: int = FIRST_PORT  # likewise MASTER_PORT


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

    Raise RankError if two launchers contradict each other, or a variable is missing, no number or impossible.
    """
    rank_info = _of_slurm_step(environ)
    if "RANK" in environ or "WORLD_SIZE" in environ:
        torch_rank = _of_torchrun({"RANK": "0", **environ} if is_plan else environ)
        is_same = (torch_rank.rank, torch_rank.world) == (rank_info.rank, rank_info.world)
        if rank_info.world > 1 and "TORCHELASTIC_RUN_ID" not in environ and not is_same:
            raise RankError(
                f"srun started rank {rank_info.rank} of {rank_info.world}, but RANK={torch_rank.rank} and "
                f"WORLD_SIZE={torch_rank.world} are set; unset RANK, WORLD_SIZE and LOCAL_RANK"
            )
        return torch_rank
    return rank_info if rank_info.world > 1 else _of_submitit(environ)


def _of_torchrun(environ: Mapping[str, str]) -> RankInfo:
    rank, world = _rank_of(environ, "RANK", "WORLD_SIZE")
    local_rank, local_world = rank, world
    if "LOCAL_RANK" in environ or "LOCAL_WORLD_SIZE" in environ:
        local_rank, local_world = _rank_of(environ, "LOCAL_RANK", "LOCAL_WORLD_SIZE", defaults=(rank, world))
    _require(local_world <= world, environ, "LOCAL_WORLD_SIZE", f"more than WORLD_SIZE={world}")
    # torchrun knows how many processes share this host. Ranks that a person started may be anywhere.
    is_one_host = local_world == world and "TORCHELASTIC_RUN_ID" in environ
    host = LOOPBACK if is_one_host else environ.get("MASTER_ADDR") or LOOPBACK
    return RankInfo(rank, world, local_rank, local_world, host, _port(environ, FIRST_PORT))


def _of_slurm_step(environ: Mapping[str, str]) -> RankInfo:
    """Return the rank of a task of srun. SLURM_NTASKS would not do: the batch script has it, too."""
    if "SLURM_STEP_NUM_TASKS" not in environ:
        return RankInfo()
    rank, world = _rank_of(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    node, counts = number_in(environ, "SLURM_NODEID"), tasks_per_node(_text(environ, "SLURM_STEP_TASKS_PER_NODE"))
    _require(node < len(counts), environ, "SLURM_NODEID", f"SLURM_STEP_TASKS_PER_NODE has {len(counts)} nodes")
    _require(sum(counts) == world, environ, "SLURM_STEP_NUM_TASKS", f"SLURM_STEP_TASKS_PER_NODE has {sum(counts)}")
    local_rank = number_in(environ, "SLURM_LOCALID")
    _require(local_rank < counts[node], environ, "SLURM_LOCALID", f"node {node} has {counts[node]} tasks")
    host = LOOPBACK
    if counts[node] < world:
        host = environ.get("MASTER_ADDR") or first_host(_text(environ, "SLURM_STEP_NODELIST"))
    port = port_of(number_in(environ, "SLURM_JOB_ID"), number_in(environ, "SLURM_STEP_ID"))
    return RankInfo(rank, world, local_rank, counts[node], host, _port(environ, port))


def _of_submitit(environ: Mapping[str, str]) -> RankInfo:
    """Return the rank of a task of submitit's local executor, whose tasks all run on this host."""
    if environ.get("SUBMITIT_LOCAL_NTASKS", "1") == "1":
        return RankInfo()
    rank, world = _rank_of(environ, "SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS")
    port = port_of(number_in(environ, "SUBMITIT_LOCAL_JOB_ID"), 0)
    return RankInfo(rank, world, rank, world, LOOPBACK, _port(environ, port))


def _rank_of(
    environ: Mapping[str, str], rank_name: str, world_name: str, defaults: tuple[int | None, int | None] = (None, None)
) -> tuple[int, int]:
    rank, world = number_in(environ, rank_name, defaults[0]), number_in(environ, world_name, defaults[1])
    _require(rank < world, environ, rank_name, f"{world_name}={world} allows 0 to {world - 1}")
    return rank, world


def _port(environ: Mapping[str, str], default: int) -> int:
    port = number_in(environ, "MASTER_PORT", default)
    _require(0 < port < 2**16, environ, "MASTER_PORT", "ports are 1 to 65535")
    return port


def number_in(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return the whole number in a variable; raise RankError if it is no number, or not set and has no default."""
    if name not in environ and default is not None:
        return default
    text = _text(environ, name)
    _require(re.fullmatch("[0-9]{1,18}", text) is not None, environ, name, "not a whole number")
    return int(text)


def _text(environ: Mapping[str, str], name: str) -> str:
    if name not in environ:
        raise RankError(
            f"{name} is not set, though a launcher's other variables are; start with torchrun or srun, or unset them"
        )
    return environ[name]


def _require(condition: bool, environ: Mapping[str, str], name: str, fault: str) -> None:
    if not condition:
        raise RankError(
            f"{name}={environ.get(name, '')!r}: {fault}; start with torchrun or srun, or unset what is left of another"
        )


def port_of(job: int, start: int) -> int:
    """Return a port for one start of a job, unlike the ports of neighbouring jobs and of the start before."""
    return FIRST_PORT + (job * 13 + start) % NUM_PORTS


def tasks_per_node(text: str) -> list[int]:
    """Return the tasks of each node: [4, 4, 3] for Slurm's "4(x2),3". Raise RankError for any other text."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,6})\))?", part)
        if match is None:
            raise RankError(f"SLURM_STEP_TASKS_PER_NODE={text!r}: not in Slurm's form, like 4(x2),3; start with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """Return the first host of a list: r1n07 for Slurm's "r[1-2]n[07-12],login". Raise RankError if there is none."""
    match = re.match(r"(?:\[\w[^]]*\]|[^],[])+", nodes)
    if match is None:
        raise RankError(f"SLURM_STEP_NODELIST={nodes!r} names no host; start with srun, or set MASTER_ADDR")
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", match[0])


def slurm_job(environ: Mapping[str, str]) -> str | None:
    """Return the job id that Slurm's commands use, such as 9 or, for a task of an array, 9_3; None outside a job."""
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID") or None


def is_automatic_restart(environ: Mapping[str, str]) -> bool:
    """Return whether Slurm started this job again by itself."""
    return environ.get("SLURM_RESTART_COUNT", "0") != "0"
