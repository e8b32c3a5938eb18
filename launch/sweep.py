"""Experiments of many runs, each sweep by one command: a table and a picture at the end.

    python launch/sweep.py descent                            # gradient descent by hand, and how its rate goes wrong
    python launch/sweep.py lr --run-dir runs/lr               # nine learning rates, past the edge of stability
    python launch/sweep.py batch --run-dir runs/batch         # the same tokens in small and large batches
    python launch/sweep.py ablate --run-dir runs/ablate       # a part left out or exchanged at a time
    python launch/sweep.py lr --cluster slurm --gpus-per-node 8 --account A --preset gpt2-small --train.steps 2000

Without a GPU each run is a process of one core, `--max-parallel` of them at a time, and takes about a minute on 2 MB
of TinyStories; docs/experiments.md has the commands that prepare these. More flags are train/main.py's, for every run.
Each point is a run directory of its own: the same command again trains what is not done. A run that diverges is stopped
early, and stays so. RUN_DIR/sweep.md has the table, RUN_DIR/sweep.png the picture; --into FILE.md puts the table where
that file has `<!-- sweep NAME -->` before it and `<!-- end -->` after it.
"""

import importlib.util
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from data_prep.atomic import write_atomically
from data_prep.errors import InputError, one_line_errors
from data_prep.manifest import read_manifest
from launch.grid import Point
from launch.lessons import descent
from launch.options import Options
from launch.runs import Look, look
from launch.submit import train_points
from train.config import Config, parse
from train.curves import Row, plot, read_rows, read_runs
from train.presets import PRESETS
from train.sinks import METRICS_FILE

ABSENT = "-"
DIVERGED = "diverged"


@dataclass(frozen=True)
class Entry:
    """One run of a sweep."""

    name: str
    """Of its folder."""
    flags: tuple[str, ...]
    x: float
    """Where it stands in the picture."""
    series: str = "loss"
    """Which line it is a point of."""
    published: str = ""
    """What the published account found, as the table's last column has ours."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep trains, and how it is drawn."""

    lesson: str
    x_label: str | None
    """None: the picture has the runs' curves."""
    entries: tuple[Entry, ...]


LR = (3e-4, 6e-4, 1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 3e-2, 1e-1)
BATCH = (1, 4, 16, 64)  # windows
NAMES = ("lr", "batch", "ablate")
# Flags that a sweep sets for each run by what was given.
READ = {"batch": ("--optim.lr-peak", "--train.steps", "--train.batch-tokens")}
# The published ablations' model, and what each takes out of it; their differences are of perplexity.
BASELINE = "--model.norm rmsnorm --model.positions rope --model.mlp swiglu --model.no-bias --model.no-tie"
ABLATIONS = {
    "baseline": ("", ""),
    "no-norm": ("--model.norm none", "diverges"),
    "post-norm": ("--model.norm-place post", "+46 %"),
    "no-positions": ("--model.positions none", "+3 %"),
    "silu": ("--model.mlp silu", "+0.7 %"),
}


def lr_entries() -> tuple[Entry, ...]:
    return tuple(Entry(f"lr={lr:g}", ("--optim.lr-peak", f"{lr:g}"), x=lr) for lr in LR)


def batch_entries(*, seq_len: int, tokens: int, lr: float, at_batch: int, world: int) -> tuple[Entry, ...]:
    """The same number of tokens, within a step, in batches of so many windows; the rate as it is, or by the square root
    of the batch (Malladi et al. 2022, for Adam)."""
    found = []
    for series, exponent in (("fixed rate", 0.0), ("rate by square root", 0.5)):
        for windows in BATCH:
            rate = lr * (windows / at_batch) ** exponent
            steps = tokens // (windows * seq_len)
            flags = {
                "--train.batch-tokens": windows * seq_len,
                "--train.micro-batch": max(1, min(windows // world, 16)),
                "--train.steps": steps,
                "--optim.warmup-steps": max(1, steps // 10),
                "--optim.lr-peak": f"{rate:.4g}",
                "--validate.every": steps,
                "--save.every": steps,
                "--track.every": max(1, steps // 50),
            }
            words = tuple(str(word) for pair in flags.items() for word in pair)
            if exponent == 0.0 or windows != at_batch:  # there both are one
                found.append(Entry(f"batch={windows},{series.replace(' ', '-')}", words, x=windows, series=series))
    return tuple(found)


def ablate_entries() -> tuple[Entry, ...]:
    return tuple(
        Entry(name, (*BASELINE.split(), *flags.split()), x=x, published=published)
        for x, (name, (flags, published)) in enumerate(ABLATIONS.items())
    )


def sweep_named(name: str, config: Config, *, world: int = 1) -> Sweep:
    """`config`: of the preset with the flags that all runs have."""
    if name == "lr":
        return Sweep("Final loss against the learning rate", "peak learning rate", lr_entries())
    if name == "ablate":
        return Sweep("A part left out or exchanged at a time", None, ablate_entries())
    tokens = config.train.steps * config.train.batch_tokens
    entries = batch_entries(
        seq_len=config.train.seq_len,
        tokens=tokens,
        lr=config.optim.lr_peak,
        at_batch=config.windows_per_step,
        world=world,
    )
    return Sweep("The same tokens in batches of different size", "windows per step", entries)


@dataclass(frozen=True)
class SweepOptions:
    """Experiments of many runs. More flags are train/main.py's, for every run."""

    run_dir: Path | None = None
    """Folder of the runs; None: runs/sweep-NAME."""
    preset: str = "stories-cpu"
    """What is swept."""
    into: Path | None = None
    """A Markdown file whose table of this sweep is replaced."""
    how: Annotated[Options, tyro.conf.arg(name="")] = field(
        default_factory=lambda: Options(cluster="local", gpus_per_node=1, wait=True)
    )


def main(args: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if args is None else args)
    with one_line_errors("sweep"):
        name = words.pop(0) if words and not words[0].startswith("-") else ""
        if name not in ("descent", *NAMES) and "--help" not in words:
            raise InputError(f"which sweep? {', '.join(('descent', *NAMES))}; given: {name or 'none'}")
        options, flags = tyro.cli(
            SweepOptions, prog="launch/sweep.py", description=__doc__, args=words, return_unknown_args=True
        )
        if name == "descent":
            if flags or options.how != SweepOptions().how:
                raise InputError(f"descent takes no flag but --into; given: {' '.join(words)}")
            text = descent()
            if options.into is not None:
                put_into(options.into, name, text)
            print(text)
        else:
            sweep(name, options, flags)


def sweep(name: str, options: SweepOptions, flags: Sequence[str]) -> None:
    if options.preset not in PRESETS:
        raise InputError(f"--preset {options.preset}: there are {', '.join(PRESETS)}")
    base = (options.run_dir or Path("runs") / f"sweep-{name}").absolute()
    config = parse([options.preset, *flags], PRESETS)
    plan = sweep_named(name, config, world=options.how.nodes * options.how.gpus_per_node)
    refuse_flags_of(plan, name, flags)
    need_matplotlib()
    if options.into is not None:
        put_into(options.into, name, None)
    vocab_size = read_manifest(config.data.dir).vocab_size
    limit = ("--train.diverged-above", f"{math.log(vocab_size) + 1:.2f}")  # a nat worse than knowing nothing
    common = (options.preset, *limit, "--track.group", base.name, *flags)
    points = [
        Point((*common, *entry.flags, "--run-dir", str(base / entry.name)), base / entry.name) for entry in plan.entries
    ]
    settled = {run.run_dir for run in look([point.run_dir for point in points]) if outcome(run) == DIVERGED}
    train_points(points, base, options.how, settled=settled)
    if options.how.dry_run:
        return
    looks = look([point.run_dir for point in points])
    text = table(plan, looks)
    write_atomically(base / "sweep.md", text)
    draw(plan, looks, base / "sweep.png")
    print(f"{text}\n{base / 'sweep.png'}")
    unfinished = [str(run.run_dir) for run in looks if run.doing != "done" and outcome(run) != DIVERGED]
    if unfinished:
        raise InputError(f"not finished: {', '.join(unfinished)}; the same command goes on with them")
    if options.into is not None:
        put_into(options.into, name, text)


def refuse_flags_of(plan: Sweep, name: str, flags: Sequence[str]) -> None:
    """InputError for a flag that the sweep sets itself, unless that is what it starts from."""
    own = {flag for entry in plan.entries for flag in entry.flags if flag.startswith("--")} - set(READ.get(name, ()))
    given = {flag.partition("=")[0].replace("_", "-") for flag in flags if flag.startswith("--")}
    if own & given:
        raise InputError(f"{' '.join(sorted(own & given))}: the sweep {name} sets it for each run")


def final_rows(run: Look) -> tuple[Row | None, Row | None]:
    """The last training and the last validation row of a run that trained."""
    path = run.run_dir / METRICS_FILE  # empty, if it ended before its first step
    rows = read_rows(run.run_dir) if path.is_file() and path.stat().st_size > 0 else []
    trained, validated = [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]
    return (trained or [None])[-1], (validated or [None])[-1]  # type: ignore[list-item]


def outcome(run: Look) -> str:
    """A word for the table: how the run ended."""
    reason = str((run.status or {}).get("reason") or "")
    return DIVERGED if reason.startswith(("DivergedError", "NonFiniteError")) else run.doing


def table(plan: Sweep, looks: Sequence[Look]) -> str:
    """Markdown. An ablation's perplexity is held against the first run's; what was published stands beside."""
    is_ablation = any(entry.published for entry in plan.entries)
    first = final_rows(looks[0])[1] if looks[0].doing == "done" else None
    names = ("run", "steps", "val loss", "+-", "perplexity", "seconds", "")
    rows: list[tuple[str, ...]] = [(*names, "against the first", "published") if is_ablation else names]
    for entry, run in zip(plan.entries, looks, strict=True):
        trained, validated = final_rows(run)
        is_done = run.doing == "done" and validated is not None
        loss, error = (validated["val_loss"], validated["val_loss_stderr"]) if is_done and validated else (None, None)
        rows.append(
            (
                entry.name,
                f"{max(run.step, trained['step'] if trained else 0):,}",
                ABSENT if loss is None else f"{loss:.4f}",
                ABSENT if error is None else f"{error:.4f}",
                ABSENT if loss is None else f"{math.exp(loss):,.1f}",
                ABSENT if trained is None else f"{trained['seconds']:,.0f}",
                "" if run.doing == "done" else outcome(run),
            )
        )
        if is_ablation:
            gain = None if loss is None or first is None else math.exp(loss - first["val_loss"]) - 1
            rows[-1] += (ABSENT if gain is None else f"{gain:+.1%}", entry.published or ABSENT)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def draw(plan: Sweep, looks: Sequence[Look], out: Path) -> None:
    """Validation loss by x, a line for each series, runs that diverged as crosses at the top; or the runs' curves."""
    if plan.x_label is None:
        plot(read_runs([run.run_dir for run in looks if final_rows(run) != (None, None)]), "step", out)
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    pairs = list(zip(plan.entries, looks, strict=True))
    for series in dict.fromkeys(entry.series for entry in plan.entries):
        found = [(e.x, final_rows(run)[1]) for e, run in pairs if e.series == series and run.doing == "done"]
        drawn = [(x, row["val_loss"]) for x, row in found if row is not None]
        axes.plot([x for x, _ in drawn], [loss for _, loss in drawn], "o-", label=series)
    gone = [entry.x for entry, run in pairs if outcome(run) == DIVERGED]
    if gone:
        axes.plot(
            gone,
            [1.0] * len(gone),
            "x",
            color="black",
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            label=DIVERGED,
        )
    axes.set_xscale("log")
    axes.set_xlabel(plan.x_label)
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title(plan.lesson)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=120)


def need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the picture needs matplotlib: pip install -e '.[plots]'")


def put_into(path: Path, name: str, text: str | None) -> None:
    """Replace what stands between this sweep's two marks; None: only see whether they are there."""
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    marks = re.compile(rf"(<!-- sweep {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if len(marks.findall(content)) != 1:
        raise InputError(f"{path}: --into needs one <!-- sweep {name} --> with an <!-- end --> after it")
    if text is not None:
        write_atomically(path, marks.sub(lambda found: f"{found[1]}{text}{found[2]}", content))


if __name__ == "__main__":
    main()
