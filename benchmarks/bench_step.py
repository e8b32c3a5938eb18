"""Our training step against a bare loop of the same model, in one process.

    python benchmarks/bench_step.py                                        # a minute and a half on 2 CPU cores
    python benchmarks/bench_step.py --preset gpt2-small --sequences 64 --vocab-size 50257      # on a GPU

The two run in turn, in blocks of steps after a warm-up, and the bare loop runs twice in each round: its ratio to
itself (the A/A control) tells how far the machine can be trusted. Last line: JSON. Expect the 95 % interval of
ours / bare below 1.05, and that of bare / bare around 1. Several processes: bench_parallel.py.
"""

import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from benchmarks.steps import bare_step, compare, conditions, configured, opened_run
from common.errors import InputError, one_line_errors
from train.config import Config, ParallelConfig
from train.processes.group import ProcessGroup, open_process_group


@dataclass(frozen=True)
class Options:
    """Our training step against a bare loop of the same model, in one process."""

    preset: str = "quickstart"
    """Model, batch and precision to time."""
    sequences: int = 32
    """Sequences per step (a micro-batch is at most the preset's)."""
    vocab_size: int = 256
    """The model's vocabulary. The tokens that are read are bytes, whatever it is."""
    loss: Literal["plain", "chunked"] = "plain"
    """Our side's cross-entropy; the bare loop's is always plain."""
    rounds: int = 12
    """Rounds of: bare, ours, bare."""
    block: int = 5
    """Steps timed together."""


def measure(options: Options, config: Config, group: ProcessGroup) -> dict[str, object]:
    with opened_run(config, group) as (run, ours):
        bare = bare_step(run.config, run.processes.parallel_plan, group)
        found = compare(ours, bare, rounds=options.rounds, block=options.block, group=group)
    print(f"bare {found['bare_step_ms']:.2f} ms, ours {found['ours_step_ms']:.2f} ms per step")
    return conditions(config, group) | found


def main(args: list[str] | None = None) -> None:
    with one_line_errors("bench_step"):
        options = tyro.cli(Options, args=args, description=__doc__)
        with (
            tempfile.TemporaryDirectory() as own,
            open_process_group(ParallelConfig.init_timeout_seconds, Path(own)) as group,
        ):
            if group.world > 1:
                raise InputError(f"{group.world} processes: this times one; benchmarks/bench_parallel.py times several")
            config = configured(
                Path(own), preset=options.preset, sequences=options.sequences, vocab_size=options.vocab_size
            )
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, loss=options.loss))
            print(json.dumps(measure(options, config, group)))


if __name__ == "__main__":
    main()
