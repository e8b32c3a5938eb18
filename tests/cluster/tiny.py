"""The run that all jobs here train, and the one that nothing happened to."""

from pathlib import Path

from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import curve, losses, rows, tiny_flags
from train.config import Config, parse
from train.main import run
from train.presets import PRESETS
from train.processes.group import ProcessGroup

STEPS = 50


def flags(data: Path, run_dir: Path, *more: str) -> list[str]:
    """Flags after gpt2_small.sh: steps of a tenth of a second, so that one can be struck in a run of a few seconds.

    The learning rate is constant after its warm-up: runs of different lengths begin alike.
    """
    return [
        *tiny_flags(data, run_dir)[1:],
        *("--train.dtype", "fp32", "--train.no-compile", "--optim.schedule", "constant"),
        *("--train.batch-tokens", "1536", "--train.steps", str(STEPS)),
        *("--sample.every", "None", "--track.wandb", "disabled", *more),
    ]


def train_plainly(world: int, data: Path, run_dir: Path, *more: str) -> Path:
    """The same run in `world` processes of this machine, without Slurm and without an end before its last step."""
    config = parse(["gpt2-small", *flags(data, run_dir, *more)], PRESETS)
    run_on_ranks(world, _run, config)
    return run_dir


def _run(group: ProcessGroup, config: Config) -> None:
    run(config, group)


def assert_same_curve(run_dir: Path, plain: Path) -> None:
    """Bit for bit, as far as this run goes: losses, norms, rates and validations, without those of its last step."""
    ours, whole = curve(run_dir), curve(plain)
    assert ours == whole[: len(ours)]
    last = ours[-1][0]
    validated, expected = (
        [(row["step"], row["val_loss"]) for row in rows(folder) if "val_loss" in row and row["step"] < last]
        for folder in (run_dir, plain)
    )
    assert validated == expected


def assert_close_losses(run_dir: Path, plain: Path) -> None:
    """As close as the order of addition lets another number of processes come (DESIGN section 4)."""
    gap = (losses(run_dir) - losses(plain)).abs()
    assert len(gap) == STEPS
    assert gap[0] <= 2e-6 and gap.max() <= 1e-5, gap
