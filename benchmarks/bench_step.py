"""Time our training step against a bare loop of the same model, in one process.

    python benchmarks/bench_step.py                                        # a minute and a half on 2 CPU cores
    python benchmarks/bench_step.py --optim muon
    python benchmarks/bench_step.py --preset gpt2-small --sequences 64 --vocab-size 50257      # on a GPU

Both run in turn, in blocks of steps after a warm-up. The bare loop runs twice in each round; its ratio to itself
(the A/A control) tells how far the machine can be trusted. Last line: JSON. Expect the 95 % interval of
ours / bare below 1.05, and that of bare / bare around 1. For several processes use bench_parallel.py.
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
    """Options of the benchmark."""

    preset: str = "quickstart"
    """Preset whose model, batch and precision are timed."""
    sequences: int = 32
    """Sequences per step. A micro-batch is at most the preset's."""
    vocab_size: int = 256
    """Size of the model's vocabulary. The text is read as bytes, whatever the size."""
    optim: Literal["adamw", "muon"] = "adamw"
    """Optimizer of both; muon is torch.optim.Muon in the bare loop."""
    loss: Literal["plain", "chunked"] = "plain"
    """Cross-entropy of our step; that of the bare loop is always plain."""
    rounds: int = 12
    """Rounds of bare, ours, bare."""
    block: int = 5
    """Steps that are timed together."""


def measure(options: Options, config: Config, group: ProcessGroup) -> dict[str, object]:
    """Return the conditions and the ratios of our step to the bare one."""
    with opened_run(config, group) as (run, ours):
        bare = bare_step(run.config, run.processes.parallel_plan, group)
        result = compare(ours, bare, rounds=options.rounds, block=options.block, group=group)
    print(f"bare {result['bare_step_ms']:.2f} ms, ours {result['ours_step_ms']:.2f} ms per step")
    return conditions(config, group) | result


def main(args: list[str] | None = None) -> None:
    with one_line_errors("bench_step"):
        options = tyro.cli(Options, args=args, description=__doc__)
        with (
            tempfile.TemporaryDirectory() as folder,
            open_process_group(ParallelConfig.init_timeout_seconds, Path(folder)) as group,
        ):
            if group.world > 1:
                raise InputError(f"{group.world} processes given, one needed; use benchmarks/bench_parallel.py")
            config = configured(
                Path(folder),
                preset=options.preset,
                sequences=options.sequences,
                vocab_size=options.vocab_size,
                optim=options.optim,
            )
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, loss=options.loss))
            print(json.dumps(measure(options, config, group)))


if __name__ == "__main__":
    main()
