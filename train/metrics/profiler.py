"""The profile of some steps (`--trace 10:15`), for chrome://tracing or Perfetto.

It writes into RUN/traces, for each chosen rank R:

    steps_10_15_rankR.json.gz         every operation and kernel, each step under its name
    steps_10_15_rankR.txt             the kernels that took longest; rank 0's are printed too
    steps_10_15_rankR_memory.pickle   on CUDA: every allocation, for https://pytorch.org/memory_viz

The traced steps run slower: trust their proportions, not their rows in metrics.jsonl.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

FOLDER = "traces"
TOP_KERNELS = 15
NAME_WIDTH = 60  # a CUDA kernel's name with its template arguments can have thousands of characters
MEMORY_EVENTS = 200_000  # the newest are kept; a step of GPT-2 small allocates some thousand times


def open_trace(
    steps: range | None,
    *,
    first: int,
    ranks: Iterable[int],
    rank: int,
    run_dir: Path,
    device: torch.device,
    log: Callable[[str], None],
) -> "Trace | None":
    """Return this rank's trace, or None if it has none.

    `first` is the step at which this attempt begins. `log` should print on rank 0 only.
    """
    if steps is None or rank not in ranks:
        return None
    if first > steps.start:
        log(f"warning: --trace {steps.start}:{steps.stop} has no effect: this attempt begins at step {first}")
        return None
    return Trace(steps, first=first, run_dir=run_dir, rank=rank, device=device, log=log)


class Trace:
    """A profile that is told of every step, and starts, stops and writes by itself.

    A file that cannot be written is a warning, never an error. The time between two steps counts as a step of the
    profiler, so that a validation before or after the traced steps stays out.
    """

    def __init__(
        self, steps: range, *, first: int, run_dir: Path, rank: int, device: torch.device, log: Callable[[str], None]
    ) -> None:
        self._steps = steps
        self._end = steps.start  # after the last traced step
        self._folder = run_dir / FOLDER
        self._rank = rank
        self._is_cuda = device.type == "cuda"
        self._log = log
        self._step_mark: record_function | None = None
        before = 2 * (steps.start - first) + 1  # profiler steps before the traced ones
        warmup = min(before, 2)  # CUPTI takes seconds to load, and its first kernels are slow
        # Shapes and stacks stay off: they slow every operation down and so distort the proportions.
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_cuda else [])],
            schedule=schedule(wait=before - warmup, warmup=warmup, active=2 * len(steps) - 1, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
            acc_events=True,  # otherwise torch 2.11 warns that it clears events between traces
        )
        self._profiler.record_steps = False  # its step numbers are not the run's
        self._profiler.start()

    def before_step(self, step: int) -> None:
        """Begin a step; `step` is the number of steps done so far."""
        if self._is_cuda and step == self._steps.start:
            torch.cuda.synchronize()  # keeps the kernels of earlier steps out
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS, stacks="python")
        self._profiler.step()
        if step in self._steps:
            self._step_mark = record_function(f"step {step}")
            self._step_mark.__enter__()

    def after_step(self, step: int) -> None:
        """End the step with the same number, once it is enqueued."""
        if self._step_mark is not None:
            self._step_mark.__exit__(None, None, None)
            self._step_mark = None
            self._end = step + 1
        self._profiler.step()

    def close(self) -> None:
        """Write the steps traced so far. Do not call after an error, since the device may be lost."""
        if self._end < self._steps.stop:
            flag, done = f"{self._steps.start}:{self._steps.stop}", self._end - self._steps.start
            self._log(f"warning: --trace {flag}: the run ended after {done} of these steps")
        self._profiler.stop()

    def _write(self, profiler: profile) -> None:
        """Write the files of the traced steps."""
        first, last = self._steps.start, self._end - 1
        path = self._folder / f"steps_{first}_{self._end}_rank{self._rank}.json.gz"
        whole = path.with_name(f".{path.name}")  # the name's ending decides the format
        table = top_kernels(profiler, is_cuda=self._is_cuda)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path.with_name(path.name.replace(".json.gz", ".txt")).write_text(table + "\n", encoding="utf-8")
            profiler.export_chrome_trace(str(whole))
            whole.replace(path)
            if self._is_cuda:
                torch.cuda.memory._dump_snapshot(str(path).replace(".json.gz", "_memory.pickle"))
            self._log(f"trace of steps {first} to {last}: {path}\n{table}")
        except OSError as error:  # a full disk is no reason to lose the run
            self._log(f"warning: no trace of steps {first} to {last}: {error}")
            with suppress(OSError):
                whole.unlink()
        if self._is_cuda:
            torch.cuda.memory._record_memory_history(enabled=None)


def top_kernels(profiler: profile, *, is_cuda: bool) -> str:
    """Return torch's table of the kernels (on the CPU: operators) that took longest by themselves.

    Annotations are left out, since their own time is Python's.
    """
    kind, sort_by = (DeviceType.CUDA, "self_device_time_total") if is_cuda else (DeviceType.CPU, "self_cpu_time_total")
    averages = profiler.key_averages()
    averages[:] = [each for each in averages if each.device_type == kind and not each.is_user_annotation]
    table: str = averages.table(sort_by=sort_by, row_limit=TOP_KERNELS, max_name_column_width=NAME_WIDTH)
    return table.strip()
