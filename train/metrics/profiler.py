"""`--trace 10:15`: a profile of those steps for chrome://tracing or Perfetto, their costliest kernels, their memory.

Writes below RUN/traces, for each chosen rank R:

    steps_10_15_rankR.json.gz         every operation and kernel, each step under its name
    steps_10_15_rankR.txt             the kernels that took longest; rank 0's are printed too
    steps_10_15_rankR_memory.pickle   on CUDA: every allocation, for https://pytorch.org/memory_viz

The traced steps run slower; trust their proportions, not the rows of metrics.jsonl that they are part of.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

FOLDER = "traces"
TOP_KERNELS = 15
NAME_WIDTH = 60  # a CUDA kernel's name with its template arguments can have thousands of characters
MEMORY_EVENTS = 200_000  # the newest are kept; a step of GPT-2 small allocates some thousand times


def open_trace(
    steps: range | None,
    *,
    ranks: Iterable[int],
    rank: int,
    run_dir: Path,
    device: torch.device,
    say: Callable[[str], None],
) -> "Trace | None":
    """This rank's trace; None where there is none, so that nothing is paid for it."""
    if steps is None or rank not in ranks:
        return None
    return Trace(steps, run_dir=run_dir, rank=rank, device=device, say=say)


class Trace:
    """Give it every step; it starts, stops and writes by itself. A file it cannot write is a warning, never an error.

    `say` is for people, and should print on rank 0 only.
    """

    def __init__(
        self, steps: range, *, run_dir: Path, rank: int, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self._steps = steps
        self._folder = run_dir / FOLDER
        self._rank = rank
        self._is_cuda = device.type == "cuda"
        self._say = say
        self._profiler: profile | None = None
        self._step_mark: record_function | None = None
        self._first: int | None = None  # step seen by this attempt
        self._done = 0  # steps traced

    def before_step(self, step: int) -> None:
        """Call with the number of steps done so far, before a step is begun."""
        if self._first is None:
            self._first = step
            if step > self._steps.start:
                self._say(f"warning: --trace {self._text} has no effect: this attempt begins at step {step}")
        if self._first > self._steps.start:
            return
        # CUPTI takes seconds to load, and its first kernels are slow: a step early, where there is one.
        if step == self._steps.start - 1 or (step == self._steps.start and self._profiler is None):
            self._prepare()
        if step == self._steps.start:
            self._start()
        if step in self._steps:
            self._step_mark = record_function(f"step {step}")
            self._step_mark.__enter__()

    def after_step(self, step: int) -> None:
        """Call with the same number once the step is enqueued."""
        if self._step_mark is None:
            return
        self._step_mark.__exit__(None, None, None)
        self._step_mark = None
        self._done += 1
        if step + 1 == self._steps.stop:
            self._finish()

    def close(self) -> None:
        """The run is at its end or was stopped: write what there is. Not after an error, whose device may be lost."""
        if self._done < len(self._steps) and self._first is not None and self._first <= self._steps.start:
            self._say(f"warning: --trace {self._text}: the run ended after {self._done} of these steps")
        if self._done:
            self._finish()

    @property
    def _text(self) -> str:
        return f"{self._steps.start}:{self._steps.stop}"

    def _prepare(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._is_cuda:
            activities.append(ProfilerActivity.CUDA)
        # Neither shapes nor stacks: they slow every operation down, and the proportions are what is asked for.
        self._profiler = profile(activities=activities, profile_memory=True)
        self._profiler.prepare_trace()

    def _start(self) -> None:
        assert self._profiler is not None
        if self._is_cuda:
            torch.cuda.synchronize()  # kernels of the steps before stay out
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS, stacks="python")
        self._profiler.start_trace()

    def _finish(self) -> None:
        """Stop, and write the files of as many steps as were traced. Nothing is left to do afterwards."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        if self._is_cuda:
            torch.cuda.synchronize()
        profiler.stop_trace()
        end = self._steps.start + self._done
        name = f"steps_{self._steps.start}_{end}_rank{self._rank}"
        table = top_kernels(profiler.key_averages(), is_cuda=self._is_cuda)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write_whole(self._folder / f"{name}.txt", lambda path: path.write_text(table + "\n", encoding="utf-8"))
            _write_whole(self._folder / f"{name}.json.gz", lambda path: profiler.export_chrome_trace(str(path)))
            if self._is_cuda:
                _write_whole(
                    self._folder / f"{name}_memory.pickle",
                    lambda path: torch.cuda.memory._dump_snapshot(str(path)),
                )
            self._say(f"trace of steps {self._steps.start} to {end - 1}: {self._folder / name}.json.gz\n{table}")
        except OSError as error:  # a full disk is no reason to lose the run
            self._say(f"warning: no trace of steps {self._steps.start} to {end - 1}: {error}")
        if self._is_cuda:
            torch.cuda.memory._record_memory_history(enabled=None)


def top_kernels(averages: Iterable[Any], *, is_cuda: bool) -> str:
    """The kernels (on the CPU: operators) that took longest by themselves: name, calls, ms, share of all of them.

    What a name's time includes of its children is not counted, nor are annotations, whose own time is Python's.
    """
    wanted = DeviceType.CUDA if is_cuda else DeviceType.CPU
    found = []
    for average in averages:
        if average.device_type == wanted and not average.is_user_annotation:
            microseconds = average.self_device_time_total if is_cuda else average.self_cpu_time_total
            if microseconds > 0:
                found.append((microseconds / 1e3, average.count, average.key))
    found.sort(reverse=True)
    total = sum(milliseconds for milliseconds, _, _ in found)
    of = "GPU kernels" if is_cuda else "CPU operators, all threads"
    lines = [f"{f'{of}, {total:.1f} ms in all':{NAME_WIDTH}}  {'calls':>7}  {'ms':>10}  {'share':>6}"]
    for milliseconds, calls, name in found[:TOP_KERNELS]:
        lines.append(f"{name[:NAME_WIDTH]:{NAME_WIDTH}}  {calls:>7}  {milliseconds:10.2f}  {milliseconds / total:6.1%}")
    return "\n".join(lines)


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """A file that is whole once it has its name. The suffix is kept: by it the profiler compresses."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
