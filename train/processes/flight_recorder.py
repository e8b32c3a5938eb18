"""torch's own record of the last collectives of a rank: switched on, and written down when the run hangs.

gloo's and NCCL's are two. gloo's is JSON for people. NCCL's is also written as `torchfrtrace` reads it, which finds the
first collective that the ranks do not agree on: `torchfrtrace RUN/hang/attempt_1 --prefix nccl_trace_rank_`. (It fails
on gloo's, which does not name the ranks of its groups; torch 2.13.)
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

NUM_ENTRIES = "2000"  # torch's own default where it has one
NCCL_PREFIX = "nccl_trace_rank_"


def turn_on(run_dir: Path) -> None:
    """For the process groups that are made after this; what the environment says already stays.

    NCCL writes its own into `run_dir` when a collective times out: the back-up where the watchdog could not strike.
    """
    settings = {
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): NUM_ENTRIES,
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"): str(run_dir.absolute() / NCCL_PREFIX),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
    }
    for names, value in settings.items():  # the first is today's name
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value


def num_collectives(rank_file: Path) -> int:
    """How many collectives this rank has called so far; what is known of the last ones goes beside `rank_file`."""
    c10d: Any = torch._C._distributed_c10d
    recorders = {"gloo": "_dump_fr_trace_json", "nccl": "_dump_nccl_trace_json"}  # what this build of torch has of them
    count = 0
    for name, dump in recorders.items():
        if not hasattr(c10d, dump):
            continue
        text = getattr(c10d, dump)()
        entries: list[dict[str, Any]] = json.loads(text).get("entries", [])
        if entries:
            rank_file.with_suffix(f".{name}.json").write_bytes(text)
            count += 1 + max(entry["record_id"] for entry in entries)
    return count


def write_for_torchfrtrace(folder: Path, rank: int) -> None:
    """NCCL's record with the stack of each call, in torch's format. Nothing without NCCL."""
    c10d: Any = torch._C._distributed_c10d
    if hasattr(c10d, "_dump_nccl_trace"):
        (folder / f"{NCCL_PREFIX}{rank}").write_bytes(c10d._dump_nccl_trace())
