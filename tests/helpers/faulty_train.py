"""train/main.py as the soak starts it: the engine as it is, which stands still where the soak wants to strike.

    torchrun --nproc_per_node=2 tests/helpers/faulty_train.py [what train/main.py takes]

Functions of the engine are called as ever; before or after the call a visit to their place is counted. SOAK_CONTROL
is a folder whose `holds.json` lists, for each of torchrun's starts N (0, then its in-place restarts), the place, the
visit and the rank that makes `reached_N` and, if it is to stay, waits there for `released_N`. The processes leave more
marks there: `pid_N_RANK`; `listening_N_RANK` while the engine hears signals; `claimed_N` once status.json counted the
attempt.
"""

import faulthandler
import functools
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from train.processes import parent_watch

LONGEST_STAY_SECONDS = 120.0  # the soak is gone then
CONTROL = Path(os.environ["SOAK_CONTROL"])
RANK, START = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])

HOLDS: list[dict[str, Any]] = json.loads((CONTROL / "holds.json").read_text())

visits: Counter[str] = Counter()


def mark(name: str, content: str = "") -> None:
    """Make a file that is there only with its content."""
    beside = CONTROL / f".{name}.{os.getpid()}"
    beside.write_text(content)
    beside.rename(CONTROL / name)


def visit(place: str) -> None:
    """This process is at `place`: tell the soak, and wait for it, if this is the visit it asked for."""
    visits[place] += 1
    hold = HOLDS[START] if len(HOLDS) > START else None
    if hold is None or (hold["place"], hold["visit"], hold["holder"]) != (place, visits[place], RANK):
        return
    mark(f"reached_{START}")
    end = time.monotonic() + LONGEST_STAY_SECONDS
    while hold["stays"] and not (CONTROL / f"released_{START}").exists() and time.monotonic() < end:
        time.sleep(0.005)


def visit_before(owner: Any, name: str, place: str) -> None:
    wrap(owner, name, before=lambda *args, **kwargs: visit(place))


def visit_after(owner: Any, name: str, place: str) -> None:
    wrap(owner, name, after=lambda: visit(place))


def wrap(
    owner: Any, name: str, *, before: Callable[..., object] | None = None, after: Callable[[], object] | None = None
) -> None:
    """Call `before`, with its arguments, and `after` around the function or method of that name."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        result = function(*args, **kwargs)
        if after is not None:
            after()
        return result

    setattr(owner, name, wrapped)


def visit_deletion(path: Any, **kwargs: Any) -> None:
    """A checkpoint that is no longer kept has its new name and all of its files."""
    if Path(path).name.endswith(".deleting") and Path(path).exists():
        visit("deleting")


def wrap_engine() -> None:
    import torch.distributed.checkpoint as dcp

    from train import loop, main
    from train.evals import validation
    from train.processes import stop_requests
    from train.run import checkpoint_files, checkpoints, directory, resume

    visit_before(main, "open_process_group", "process group")
    visit_before(directory, "provenance", "claim")  # the lock is held, status.json still the last attempt's
    visit_before(resume, "find_start", "find start")
    visit_before(resume, "read_tensors", "load")
    visit_before(loop, "warm_up", "warm-up")
    visit_before(loop, "take_step", "step")
    visit_before(loop.optim, "update", "update")  # gradients are reduced, the weights not yet changed
    visit_before(validation.ValidationSet, "batch", "validation")
    visit_before(checkpoints.CheckpointWriter, "_write", "save")
    visit_after(dcp.FileSystemWriter, "write_data", "writing")  # this rank's tensors are there, .metadata is not
    visit_after(checkpoint_files, "write_atomically", "commit")  # all is written, the rename comes next
    visit_before(checkpoints, "fsync_directory", "committed")  # renamed
    visit_before(checkpoints.CheckpointWriter, "_purge", "purge")
    wrap(checkpoints.shutil, "rmtree", before=visit_deletion)
    visit_before(directory.RunDirectory, "end", "leaving")

    wrap(directory.RunDirectory, "_claim", after=lambda: mark(f"claimed_{START}"))
    wrap(stop_requests.StopRequests, "__enter__", after=lambda: mark(f"listening_{START}_{RANK}"))
    wrap(stop_requests.StopRequests, "__exit__", before=lambda *args: (CONTROL / f"listening_{START}_{RANK}").unlink())


def main() -> None:
    faulthandler.register(signal.SIGUSR2)  # the soak asks so where processes hang
    parent_watch.remember()  # as train.main begins: in the next place the launcher may be struck
    mark(f"pid_{START}_{RANK}", str(os.getpid()))
    visit("start")
    wrap_engine()
    from train.main import main as train

    train()


if __name__ == "__main__":
    main()
