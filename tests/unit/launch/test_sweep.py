"""Sweeps: their runs, what becomes of those that diverge, the table and the picture; and the first lesson's numbers."""

import dataclasses
import itertools
import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import tyro

from common.tables import put_into
from data_prep.manifest import read_manifest
from launch import experiments, submit, sweep
from launch.experiments import ABLATIONS, CPU_PRESET, NAMES, PRESETS_SWEPT, RUNGS, sweep_named
from launch.grid import Point
from launch.lessons import descend, descent
from launch.options import Options
from launch.requeue import NEEDS_A_PERSON
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import ROOT, called, rows, status, tiny_config, tiny_flags
from train import main as trainer
from train.config import parse
from train.guards.nonfinite import DivergedError
from train.main import run
from train.presets import PRESETS
from train.processes.group import ProcessGroup


@pytest.mark.parametrize(
    ("rate", "published"), [(10, (24.17, 15.47, 11.40)), (100, (24.17, 24.17, 4.15)), (1000, (24.17, 8725.10))]
)
def test_gradient_descent_gives_the_published_table(rate: float, published: Sequence[float]) -> None:
    assert [round(loss, 2) for loss in descend(rate)][: len(published)] == list(published)
    assert f"| {rate:g} | 24.17 | " in called(sweep.main, "descent").stdout


@pytest.mark.parametrize("name", NAMES)
def test_every_run_of_a_sweep_is_one_that_can_be_trained(name: str) -> None:
    modern = ["tinystories"] if name != "ladder" else []  # whose switches the rungs do not have
    for preset, *flags in (["stories-cpu", "--train.steps", "100"], *([each] for each in (*modern, "gpt2-small"))):
        whole = parse([preset, *flags], PRESETS)
        entries = sweep_named(name, whole, data_tokens=10**6).entries
        configs = [parse([preset, *flags, *entry.flags], PRESETS) for entry in entries]
        assert len({entry.name for entry in entries}) == len(entries) >= (1 if name == "epochs" else 5)
        for config in configs:
            gap = whole.train.steps * whole.train.batch_tokens - config.train.steps * config.train.batch_tokens
            assert name == "budget" or 0 <= gap < config.train.batch_tokens, "the same tokens"


def test_the_published_sizes_are_swept() -> None:
    story = parse(["tinystories"], PRESETS)
    assert {3e-4, 1e-2} <= {entry.x for entry in sweep_named("lr", story).entries}
    sizes = {entry.x for entry in sweep_named("batch", story).entries}
    assert min(sizes) == 1 and max(sizes) == 512 and story.sequences_per_step in sizes
    largest = parse(["tinystories", *sweep_named("batch", story, world=8).entries[-1].flags], PRESETS)
    assert largest.train.micro_batch == 64, "512 sequences of 8 processes"


def test_the_rate_grows_with_the_root_of_the_batch() -> None:
    entries = sweep_named("batch", parse(["stories-cpu"], PRESETS)).entries
    rates = {(entry.x, entry.series): parse(["stories-cpu", *entry.flags], PRESETS).optim.lr_peak for entry in entries}
    assert rates[64, "rate by square root"] == 4e-3 and rates[1, "rate by square root"] == 5e-4
    assert {rate for (_, series), rate in rates.items() if series == "fixed rate"} == {2e-3}


def tiny(data: Path) -> list[str]:
    """Flags of a small run, without what sweeps set."""
    given = tiny_flags(data, Path("unused"))[1:]
    pairs = zip(given[::2], given[1::2], strict=True)
    left = [word for pair in pairs if pair[0] not in ("--run-dir", "--optim.lr-peak") for word in pair]
    return [*left, "--sample.every", "None"]


def diverges_somewhere(group: ProcessGroup, data: Path, folder: Path) -> str:
    config = tiny_config(data, folder / "run", diverged_above=3.3)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr_peak=30.0, clip_norm=None))
    try:
        run(config, group)
    except DivergedError as error:
        return str(error)
    return "learned"


def test_a_run_that_diverges_ends_as_failed_on_every_rank(tiny_data: Path, tmp_path: Path) -> None:
    said = run_on_ranks(2, diverges_somewhere, tiny_data, tmp_path)
    assert said[0] == said[1] and "is above --train.diverged-above 3.3, as in the row before" in said[0]
    above = [row["loss"] > 3.3 for row in rows(tmp_path / "run") if "loss" in row]
    assert above[-2:] == [True, True] or above[-3:-1] == [True, True]  # one more step is under way when it is read
    assert not any(first and second for first, second in itertools.pairwise(above[:-2]))
    ended = status(tmp_path / "run")
    assert ended["state"] == "failed" and ended["step"] % 10 == 0, "what diverged is not saved"
    assert ended["reason"].startswith("DivergedError") and ended["reason"].startswith(NEEDS_A_PERSON)


def test_one_row_above_is_a_bad_batch(tiny_data: Path, tmp_path: Path) -> None:
    """The first row is ln V of 33 characters, 3.5; the rows after it are below."""
    config = tiny_config(tiny_data, tmp_path / "run", steps=4, diverged_above=3.49)
    run(config, ProcessGroup(0, 1, torch.device("cpu")))
    found = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert found[0] > 3.49 > found[1] and status(tmp_path / "run")["state"] == "done"


def test_a_sweep_trains_what_is_not_done_and_draws_the_rest(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process instead of several. Killed after its second run, then given again."""
    trained: list[str] = []

    def train_here(options: Options, base: Path, code: Path, points: Sequence[Point]) -> None:
        for point in points:
            trained.append(point.run_dir.name)
            assert called(trainer.main, *point.args).returncode in (0, 2)
            if len(trained) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(submit, "train_here", train_here)
    monkeypatch.setattr(experiments, "LR", (1e-3, 1e-2, 30.0))
    words = ["lr", "--preset", "shakespeare-char-cpu", "--run-dir", str(tmp_path / "sweep")]
    words += [*tiny(tiny_data), "--train.steps", "20", "--optim.clip-norm", "None"]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- sweep lr -->\nold\n<!-- end -->\nafter\n")
    assert called(sweep.main, *words).returncode == 130
    done = called(sweep.main, *words, "--into", str(page))
    assert done.returncode == 0, done.stderr
    assert trained == ["lr=0.001", "lr=0.01", "lr=30"], "each once"
    again = called(sweep.main, *words)
    assert again.stdout == done.stdout and len(trained) == 3, "what diverged is not tried again"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for folder in (tmp_path / "sweep", tmp_path / "new"):
        dry = called(sweep.main, *words, "--dry-run", "--run-dir", str(folder), "--into", str(page))
        assert dry.returncode == 0 and dry.stdout.count("would train") == (0 if folder.exists() else 3), dry.stderr
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}, "a dry run writes nothing"
    other = called(sweep.main, *words, "--model.width", "64", "--into", str(page))
    assert other.returncode == 2 and "is another run: --model.width 64 (was 32)" in other.stderr

    header, _, *table = (tmp_path / "sweep" / "sweep.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *table)]
    assert [row[0] for row in cells] == ["run", "lr=0.001", "lr=0.01", "lr=30"]
    last = [row for row in rows(tmp_path / "sweep" / "lr=0.01") if "val_loss" in row][-1]
    assert cells[2][2] == f"{last['val_loss']:.4f}" and cells[2][1] == "20"
    assert cells[3][2] == "-" and cells[3][6] == "diverged" and int(cells[3][1]) < 20
    assert (tmp_path / "sweep" / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    table_text = (tmp_path / "sweep" / "sweep.md").read_text()
    assert page.read_text() == f"before\n<!-- sweep lr -->\n{table_text}<!-- end -->\nafter\n"


COMMANDS = [
    line.strip().split("#")[0]
    for name in ("README.md", "docs/experiments.md", "docs/ladder.md", "launch/sweep.py")
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    if "python launch/sweep.py" in line
]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_lines_that_are_shown_parse(line: str) -> None:
    name, *words = shlex.split(line)[2:]
    options, flags = tyro.cli(sweep.SweepOptions, args=words, return_unknown_args=True)
    if name != "descent":
        config = parse([options.preset or PRESETS_SWEPT.get(name, CPU_PRESET), *flags], PRESETS)
        assert sweep_named(name, config).entries
    assert (options.minutes is not None) == (name == "budget")
    page = "docs/ladder.md" if name in PRESETS_SWEPT else "docs/experiments.md"
    assert options.into in (None, Path(page))


def test_every_table_of_the_document_was_made() -> None:
    made = []
    for page in ("experiments", "ladder"):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        made += re.findall(r"<!-- sweep (\w+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert [name for name, _ in made] == ["descent", "lr", "batch", "ablate", "budget", "ladder", "epochs"]
    tables = dict(made)
    assert tables.pop("descent") == descent()
    header, *epochs = cells_in(tables.pop("epochs"))
    assert header[:3] == ["epoch", "step", "val loss"] and [row[0] for row in epochs[:2]] == ["0.0", "1.0"]
    assert epochs[-1][1] == f"{PRESETS['phase1'].train.steps:,}" and all(row[4] for row in epochs[1:])
    for name, table in tables.items():
        plan = sweep_named(name, PRESETS[PRESETS_SWEPT.get(name, CPU_PRESET)])
        shown = re.findall(r"^\| (\S+) ", table, re.MULTILINE)
        names = [entry.name for entry in plan.entries]
        assert shown[0] == "run" and (sorted(shown[1:]) == sorted(names) if plan.is_ranked else shown[1:] == names)


@pytest.mark.long(reason="five runs; the ladder's and the budget's are in `make test`")
def test_an_ablation_is_held_against_the_first_run(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_here(options: Options, base: Path, code: Path, points: Sequence[Point]) -> None:
        for point in points:
            assert called(trainer.main, *point.args).returncode in (0, 2)

    monkeypatch.setattr(submit, "train_here", train_here)
    words = ["ablate", "--preset", "shakespeare-char-cpu", "--run-dir", str(tmp_path / "sweep")]
    done = called(sweep.main, *words, *tiny(tiny_data), "--train.steps", "10")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "sweep" / "sweep.md").read_text().splitlines()
    cells = {row[0]: row for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in table)}
    assert list(cells)[2:] == list(ABLATIONS) and cells["run"][-2:] == ["against the first", "published"]
    first, post = (float(cells[name][2]) for name in ("baseline", "post-norm"))
    assert cells["baseline"][-2:] == ["+0.0%", "-"]
    assert float(cells["post-norm"][-2].rstrip("%")) == pytest.approx(100 * (math.exp(post - first) - 1), abs=0.06)
    assert cells["post-norm"][-1] == "+46 %" and (tmp_path / "sweep" / "sweep.png").exists()


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    for words, line in (
        ([], "which sweep? descent, lr, batch, ablate, budget, ladder, epochs; given: none"),
        (["lrs"], "which sweep? descent, lr, batch, ablate, budget, ladder, epochs; given: lrs"),
        (["lr", "--minutes", "1"], "--minutes M is for budget, and budget needs it"),
        (["budget"], "--minutes M is for budget, and budget needs it"),
        (["budget", "--minutes", "-1"], "--minutes -1 must be a finite number above 0"),
        (["budget", "--minutes", "1", "--train.steps", "9"], "--train.steps: the sweep budget sets it for each run"),
        (["ladder", "--model.kind", "head"], "--model.kind: the sweep ladder sets it for each run"),
        (["lr", "--optim.lr-peak", "1"], "--optim.lr-peak: the sweep lr sets it for each run"),
        (["ablate", "--model.mlp=gelu"], "--model.mlp: the sweep ablate sets it for each run"),
        (["descent", "--nodes", "2"], "descent takes no flag but --into; given: --nodes 2"),
        (["lr", "--into", str(tmp_path / "gone.md")], f"{tmp_path}/gone.md: --into needs one <!-- sweep lr -->"),
        (["lr", "--preset", "small"], "--preset small: there are gpt2-small, "),
        (["lr", "--data.dir", str(tmp_path)], f"{tmp_path}: no manifest.json"),
    ):
        done = called(sweep.main, *words)
        assert done.returncode == 2 and done.stderr.startswith(f"sweep: {line}") and done.stderr.count("\n") == 1
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(ValueError, match="--into needs one <!-- sweep lr --> with an <!-- end --> after it"):
        put_into(tmp_path / "page.md", "sweep lr", "table")


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_trained(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = ["lr", "--preset", "shakespeare-char-cpu", "--run-dir", str(tmp_path / "sweep"), *tiny(tiny_data)]
    done = called(sweep.main, *words)
    assert (done.returncode, done.stderr) == (2, "sweep: the picture needs matplotlib: pip install -e '.[plots]'\n")
    assert not (tmp_path / "sweep").exists()


def train_in_this_process(options: Options, base: Path, code: Path, points: Sequence[Point]) -> None:
    for point in points:
        assert called(trainer.main, *point.args).returncode == 0


def cells_of(folder: Path) -> list[list[str]]:
    return cells_in((folder / "sweep.md").read_text())


def cells_in(table: str) -> list[list[str]]:
    lines = table.splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in (lines[0], *lines[2:])]


def test_the_ladder_shows_each_rung_from_the_first_loss_to_a_sample(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "train_here", train_in_this_process)
    words = ["ladder", "--run-dir", str(tmp_path / "sweep"), *tiny(tiny_data), "--train.steps", "20"]
    words = [word for word in words if word not in ("--sample.every", "None")]
    done = called(sweep.main, *words)
    assert done.returncode == 0, done.stderr
    header, *rungs = cells_of(tmp_path / "sweep")
    assert header == ["run", "parameters", "first loss", "val loss", "+-", "seconds", "", "sample"]
    assert [row[0] for row in rungs] == list(RUNGS)
    vocab_size = read_manifest(tiny_data).vocab_size
    assert rungs[0][1] == f"{vocab_size**2:,}"
    for row in rungs:
        assert float(row[2]) == pytest.approx(math.log(vocab_size), abs=0.02) and float(row[3]) < float(row[2])
        said = rows(tmp_path / "sweep" / row[0], "samples.jsonl")[-1]["samples"][0]["text"]
        assert row[7] and " ".join(said.split("\n")[0].split())[:20] in row[7] and len(row[7]) <= 62


def test_epochs_are_counted_by_the_data(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "train_here", train_in_this_process)
    words = ["epochs", "--preset", "shakespeare-char-cpu", "--run-dir", str(tmp_path / "sweep"), *tiny(tiny_data)]
    left = [word for word in words if word not in ("--sample.every", "None", "--validate.every", "25", "--save.every")]
    left = [word for index, word in enumerate(left) if not (word == "10" and left[index - 1] == "1000")]
    done = called(sweep.main, *left, "--train.steps", "100", "--optim.warmup-steps", "5")
    assert done.returncode == 0, done.stderr
    header, *shown = cells_of(tmp_path / "sweep")
    assert header == ["epoch", "step", "val loss", "+-", "sample"]
    per_epoch = read_manifest(tiny_data).splits["train"].tokens // 384
    steps = [int(row[1]) for row in shown]
    assert steps == [*range(0, 100, per_epoch), 100]
    assert [row[0] for row in shown[:3]] == ["0.0", "1.0", "2.0"] and all(row[4] for row in shown[1:])


def test_a_budget_is_the_same_time_for_all(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three entries. Killed after the timing and a first run, then given again: the steps stay what they were."""
    trained: list[str] = []

    def train_some(options: Options, base: Path, code: Path, points: Sequence[Point]) -> None:
        for point in points:
            if len(trained) == 4:
                trained.append("killed")
                raise KeyboardInterrupt
            trained.append(point.run_dir.name)
            assert called(trainer.main, *point.args).returncode == 0

    monkeypatch.setattr(submit, "train_here", train_some)
    budget_entries = experiments.budget_entries
    monkeypatch.setattr(experiments, "budget_entries", lambda config: budget_entries(config)[:3])
    given = dict(zip(*[iter(tiny(tiny_data))] * 2, strict=True))
    for flag in ("--validate.every", "--save.every", "--track.every", "--optim.warmup-steps"):
        given.pop(flag)
    words = ["budget", "--minutes", "0.01", "--preset", "shakespeare-char-cpu", "--run-dir", str(tmp_path / "sweep")]
    words += [word for pair in given.items() for word in pair]
    assert called(sweep.main, *words).returncode == 130
    first = parse_steps_of(tmp_path / "sweep" / trained[-2])
    done = called(sweep.main, *words)
    assert done.returncode == 0, done.stderr
    assert len(trained) == len(set(trained[:3])) * 2 + 1, "each is timed once and trained once"
    assert parse_steps_of(tmp_path / "sweep" / trained[-2]) > 0 and first > 0
    header, *shown = cells_of(tmp_path / "sweep")
    assert header[:5] == ["run", "parameters", "steps", "tokens", "seconds"]
    losses = [float(row[5]) for row in shown]
    assert losses == sorted(losses) and len(shown) == 3, "the best first"
    for row in shown:
        timing = [r["step_seconds"] for r in rows(tmp_path / "sweep" / "timing" / row[0]) if "loss" in r]
        assert int(row[2]) == int(0.6 / statistics.median(timing)) == parse_steps_of(tmp_path / "sweep" / row[0])


def parse_steps_of(run_dir: Path) -> int:
    steps: int = json.loads((run_dir / "config.json").read_text())["config"]["train"]["steps"]
    return steps
