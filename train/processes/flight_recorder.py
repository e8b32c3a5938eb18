"""torch's own record of a rank's last collectives: switched on at the start, written to files when the run hangs.

gloo and NCCL each have a recorder. gloo's dump is JSON for people. NCCL's is also written in the format of
`torchfrtrace`, which finds the first collective on which the ranks disagree:
`torchfrtrace RUN/hang/attempt_1 --prefix nccl_trace_rank_`. (It fails on gloo's dump, which does not name the ranks of
its groups; torch 2.13.)
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

NUM_ENTRIES = "2000"  # torch's own default in versions that switch the recorder on by themselves
NCCL_PREFIX = "nccl_trace_rank_"


def turn_on(run_dir: Path, longest_seconds: float) -> None:
    """Record the collectives of all process groups made after this call; settings in the environment win.

    NCCL also dumps into `run_dir` when a collective times out. That is the back-up for a watchdog that could not act.
    So is NCCL's own heartbeat monitor, which ends a process whose NCCL thread hangs in the driver: after 480 s by
    default, before our watchdog names the culprit. It waits `longest_seconds`, since nothing changes that later on.
    """
    settings = {  # torch's current name of each variable, then its older one
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): NUM_ENTRIES,
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"): str(run_dir.absolute() / NCCL_PREFIX),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
        ("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC",): str(math.ceil(longest_seconds)),
    }
    for names, value in settings.items():
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value


def num_collectives(rank_file: Path) -> int:
    """Return how many collectives this rank has called; write the record of the last ones beside `rank_file`."""
    c10d: Any = torch._C._distributed_c10d
    count = 0
    for backend, dump in {"gloo": "_dump_fr_trace_json", "nccl": "_dump_nccl_trace_json"}.items():
        if not hasattr(c10d, dump):  # a build of torch without this backend
            continue
        text = getattr(c10d, dump)()
        entries: list[dict[str, Any]] = json.loads(text).get("entries", [])
        if entries:
            rank_file.with_suffix(f".{backend}.json").write_bytes(text)
            count += 1 + max(entry["record_id"] for entry in entries)
    return count


def write_for_torchfrtrace(folder: Path, rank: int) -> None:
    """Write NCCL's record, with the stack of each call, in torchfrtrace's format. Without NCCL, write nothing."""
    c10d: Any = torch._C._distributed_c10d
    if hasattr(c10d, "_dump_nccl_trace"):
        (folder / f"{NCCL_PREFIX}{rank}").write_bytes(c10d._dump_nccl_trace())
