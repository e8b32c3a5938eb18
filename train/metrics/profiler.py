"""`--trace 10:15`: a profile of those steps for chrome://tracing or Perfetto, their costliest kernels, their memory.

Writes below RUN/traces, for each chosen rank R:

    steps_10_15_rankR.json.gz         every operation and kernel, each step under its name
    steps_10_15_rankR.txt             the kernels that took longest; rank 0's are printed too
    steps_10_15_rankR_memory.pickle   on CUDA: every allocation, for https://pytorch.org/memory_viz

The traced steps run slower; trust their proportions, not the rows of metrics.jsonl that they are part of.
"""

from collections.abc import Callable, Iterable
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
    say: Callable[[str], None],
) -> "Trace | None":
    """Return this rank's trace; None where there is none, so that nothing is paid for it.

    `first`: the step that this attempt begins at; `say` is for people, and should print on rank 0 only.
    """
    if steps is None or rank not in ranks:
        return None
    if first > steps.start:
        say(f"warning: --trace {steps.start}:{steps.stop} has no effect: this attempt begins at step {first}")
        return None
    return Trace(steps, first=first, run_dir=run_dir, rank=rank, device=device, say=say)


class Trace:
    """Give it every step; it starts, stops and writes by itself. A file it cannot write is a warning, never an error.

    What lies between two steps counts as one of the profiler's own, so that a validation before or after the traced
    steps stays out.
    """

    def __init__(
        self, steps: range, *, first: int, run_dir: Path, rank: int, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self._steps = steps
        self._end = steps.start  # of what is traced so far
        self._folder = run_dir / FOLDER
        self._rank = rank
        self._is_cuda = device.type == "cuda"
        self._say = say
        self._step_mark: record_function | None = None
        before = 2 * (steps.start - first) + 1  # the steps before the traced ones, and what lies between
        warmup = min(before, 2)  # CUPTI takes seconds to load, and its first kernels are slow
        # Neither shapes nor stacks: they slow every operation down, and the proportions are what is asked for.
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_cuda else [])],
            schedule=schedule(wait=before - warmup, warmup=warmup, active=2 * len(steps) - 1, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
            acc_events=True,  # torch warns of what it clears between two traces, and there is one
        )
        self._profiler.record_steps = False  # its numbers are not ours
        self._profiler.start()

    def before_step(self, step: int) -> None:
        """Call with the number of steps done so far, before a step is begun."""
        if self._is_cuda and step == self._steps.start:
            torch.cuda.synchronize()  # kernels of the steps before stay out
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS, stacks="python")
        self._profiler.step()
        if step in self._steps:
            self._step_mark = record_function(f"step {step}")
            self._step_mark.__enter__()

    def after_step(self, step: int) -> None:
        """Call with the same number once the step is enqueued."""
        if self._step_mark is not None:
            self._step_mark.__exit__(None, None, None)
            self._step_mark = None
            self._end = step + 1
        self._profiler.step()

    def close(self) -> None:
        """Write what there is: the run is at its end or was stopped. Not after an error, whose device may be lost."""
        if self._end < self._steps.stop:
            sequence, done = f"{self._steps.start}:{self._steps.stop}", self._end - self._steps.start
            self._say(f"warning: --trace {sequence}: the run ended after {done} of these steps")
        self._profiler.stop()

    def _write(self, profiler: profile) -> None:
        """Write the files of as many steps as were traced."""
        first, last = self._steps.start, self._end - 1
        path = self._folder / f"steps_{first}_{self._end}_rank{self._rank}.json.gz"
        table = top_kernels(profiler, is_cuda=self._is_cuda)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path.with_name(path.name.replace(".json.gz", ".txt")).write_text(table + "\n", encoding="utf-8")
            profiler.export_chrome_trace(str(path))
            if self._is_cuda:
                torch.cuda.memory._dump_snapshot(str(path).replace(".json.gz", "_memory.pickle"))
            self._say(f"trace of steps {first} to {last}: {path}\n{table}")
        except OSError as error:  # a full disk is no reason to lose the run
            self._say(f"warning: no trace of steps {first} to {last}: {error}")
        if self._is_cuda:
            torch.cuda.memory._record_memory_history(enabled=None)


def top_kernels(profiler: profile, *, is_cuda: bool) -> str:
    """Return torch's table of the kernels (on the CPU: operators) that took longest by themselves, without annotations,
    whose own time is Python's."""
    kind, sort_by = (DeviceType.CUDA, "self_device_time_total") if is_cuda else (DeviceType.CPU, "self_cpu_time_total")
    averages = profiler.key_averages()
    averages[:] = [each for each in averages if each.device_type == kind and not each.is_user_annotation]
    table: str = averages.table(sort_by=sort_by, row_limit=TOP_KERNELS, max_name_column_width=NAME_WIDTH)
    return table.strip()
