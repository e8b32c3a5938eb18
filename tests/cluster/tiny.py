"""The run that all jobs here train, and the same run without Slurm and without interruptions."""

from pathlib import Path

from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import curve, losses, rows, tiny_flags
from train.command_line import parse
from train.config import Config
from train.main import run
from train.presets import PRESETS
from train.processes.group import ProcessGroup

STEPS = 50


def flags(data: Path, run_dir: Path, *more: str) -> list[str]:
    """Return the flags after gpt2_small.sh.

    Steps take a tenth of a second, so that a run of a few seconds can be hit in the middle. The learning rate is
    constant after its warm-up, so that runs of different lengths begin alike.
    """
    return [
        *tiny_flags(data, run_dir)[1:],
        *("--train.dtype", "fp32", "--train.no-compile", "--optim.schedule", "constant"),
        *("--train.batch-tokens", "1536", "--train.steps", str(STEPS)),
        *("--sample.every", "None", "--track.wandb", "disabled", *more),
    ]


def train_plainly(world: int, data: Path, run_dir: Path, *more: str) -> Path:
    """Train the same run in `world` processes of this machine, without Slurm, to its last step."""
    config = parse(["gpt2-small", *flags(data, run_dir, *more)], PRESETS)
    run_on_ranks(world, _run, config)
    return run_dir


def _run(group: ProcessGroup, config: Config) -> None:
    run(config, group)


def assert_same_curve(run_dir: Path, plain: Path) -> None:
    """Assert that losses, norms, rates and validations are bitwise equal as far as this run goes.

    Validations of its last step are left out.
    """
    ours, whole = curve(run_dir), curve(plain)
    assert ours == whole[: len(ours)]
    last = ours[-1][0]
    validated, expected = (
        [(row["step"], row["val_loss"]) for row in rows(folder) if "val_loss" in row and row["step"] < last]
        for folder in (run_dir, plain)
    )
    assert validated == expected


def assert_close_losses(run_dir: Path, plain: Path) -> None:
    """Assert that losses are as close as the order of addition allows with another number of processes."""
    gap = (losses(run_dir) - losses(plain)).abs()
    assert len(gap) == STEPS
    assert gap[0] <= 2e-6 and gap.max() <= 1e-5, gap
