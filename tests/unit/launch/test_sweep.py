"""Sweeps: their runs, what happens to runs that diverge, the table and the picture; gradient descent by hand."""

import json
import math
import re
import shlex
import statistics
import sys
from pathlib import Path

import pytest
import tyro

from common.tables import put_into
from data_prep.manifest import read_manifest
from launch import sweep, sweeps
from launch.sweeps import CPU_PRESET, DEFAULT_PRESETS, RUNGS, SWEEPS, build_sweep, descend, descent_table
from tests.helpers.runs import ROOT, called, rows, tiny_flags
from tests.unit.launch.conftest import Interrupt
from train.command_line import parse
from train.presets import PRESETS

PRESET = "shakespeare-char-cpu"
COMMANDS = [
    line.strip().split("#")[0]
    for name in ("README.md", "docs/experiments.md", "docs/ladder.md", "docs/recipe.md", "launch/sweep.py")
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    if "python launch/sweep.py" in line
]


def test_gradient_descent_gives_the_published_numbers() -> None:
    published = {10: [24.17, 15.47, 11.40], 100: [24.17, 24.17, 4.15], 1000: [24.17, 8725.10]}
    for rate, losses in published.items():
        assert [round(loss, 2) for loss in descend(rate)][: len(losses)] == losses
        assert f"| {rate:g} | 24.17 | " in called(sweep.main, "descent").stdout


@pytest.mark.parametrize("name", SWEEPS)
def test_every_run_of_a_sweep_can_be_trained(name: str) -> None:
    # The kinds of the ladder do not have the switches of tinystories.
    for preset, *flags in (
        ["stories-cpu", "--train.steps", "100"],
        ["gpt2-small" if name == "ladder" else "tinystories"],
    ):
        whole = parse([preset, *flags], PRESETS)
        entries = build_sweep(name, whole, data_tokens=10**6).entries
        assert len({entry.name for entry in entries}) == len(entries) >= (1 if name == "epochs" else 5)
        for entry in entries:
            train = parse([preset, *flags, *entry.flags], PRESETS).train
            missing_tokens = whole.train.steps * whole.train.batch_tokens - train.steps * train.batch_tokens
            assert name == "budget" or 0 <= missing_tokens < train.batch_tokens, "the same tokens"


def test_published_sizes_are_swept_and_the_rate_grows_with_the_root_of_the_batch() -> None:
    story = parse(["tinystories"], PRESETS)
    assert {3e-4, 1e-2} <= {entry.x for entry in build_sweep("lr", story).entries}
    sizes = {entry.x for entry in build_sweep("batch", story).entries}
    assert min(sizes) == 1 and max(sizes) == 512 and story.sequences_per_step in sizes
    largest = parse(["tinystories", *build_sweep("batch", story, world=8).entries[-1].flags], PRESETS)
    assert largest.train.micro_batch == 64, "512 sequences of 8 processes"

    entries = build_sweep("batch", parse(["stories-cpu"], PRESETS)).entries
    rates = {(entry.x, entry.series): parse(["stories-cpu", *entry.flags], PRESETS).optim.lr_peak for entry in entries}
    assert rates[64, "rate by square root"] == 4e-3 and rates[1, "rate by square root"] == 5e-4
    assert {rate for (_, series), rate in rates.items() if series == "fixed rate"} == {2e-3}


def test_command_lines_that_are_shown_parse() -> None:
    assert len(COMMANDS) >= 20
    for line in COMMANDS:
        name, *words = shlex.split(line)[2:]
        options, flags = tyro.cli(sweep.SweepOptions, args=words, return_unknown_args=True)
        if name == "recipe":
            assert parse([CPU_PRESET, *flags], PRESETS).validate.tokens is not None
        elif name != "descent":
            config = parse([options.preset or DEFAULT_PRESETS.get(name, CPU_PRESET), *flags], PRESETS)
            assert build_sweep(name, config).entries
        assert (options.minutes is not None) == (name == "budget")
        page = {"ladder": "docs/ladder.md", "epochs": "docs/ladder.md"}.get(name, "docs/experiments.md")
        page = "docs/recipe.md" if name == "recipe" else page
        assert options.into in (None, Path(page))


def cells_in(table: str) -> list[list[str]]:
    """Return the cells of a Markdown table, without its rule."""
    lines = table.splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in (lines[0], *lines[2:])]


def test_every_table_of_the_pages_was_made() -> None:
    tables: dict[str, str] = {}
    for page in ("experiments", "ladder"):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        tables |= dict(re.findall(r"<!-- sweep (\w+) -->\n(.*?)<!-- end -->", text, re.DOTALL))
    assert list(tables) == ["descent", "lr", "batch", "ablate", "budget", "ladder", "epochs"]
    assert tables.pop("descent") == descent_table()
    header, *epochs = cells_in(tables.pop("epochs"))
    assert header[:3] == ["epoch", "step", "val loss"] and [row[0] for row in epochs[:2]] == ["0.0", "1.0"]
    assert epochs[-1][1] == f"{PRESETS['phase1'].train.steps:,}" and all(row[4] for row in epochs[1:])
    for name, table in tables.items():
        plan = build_sweep(name, PRESETS[DEFAULT_PRESETS.get(name, CPU_PRESET)])
        shown = re.findall(r"^\| (\S+) ", table, re.MULTILINE)
        names = [entry.name for entry in plan.entries]
        assert shown[0] == "run" and (sorted(shown[1:]) == sorted(names) if plan.is_ranked else shown[1:] == names)


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    for words, line in (
        ([], "which sweep? descent, lr, batch, ablate, budget, ladder, epochs, recipe; given: none"),
        (["lrs"], "which sweep? descent, lr, batch, ablate, budget, ladder, epochs, recipe; given: lrs"),
        (["lr", "--minutes", "1"], "--minutes M is for budget, and budget needs it"),
        (["budget"], "--minutes M is for budget, and budget needs it"),
        (["budget", "--minutes", "-1"], "--minutes -1 must be a finite number above 0"),
        (["budget", "--minutes", "1", "--train.steps", "9"], "--train.steps: the sweep budget sets it for each run"),
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


def tiny(data: Path, run_dir: Path, *without: str) -> list[str]:
    """Return the words after the sweep's name for small runs, `without` the flags that the sweep sets."""
    words = [*tiny_flags(data, run_dir)[1:], "--sample.every", "None"]
    pairs = zip(words[::2], words[1::2], strict=True)
    left = [word for pair in pairs if pair[0] not in ("--optim.lr-peak", *without) for word in pair]
    return ["--preset", PRESET, *left]


def test_a_missing_matplotlib_is_refused_before_anything_is_trained(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = called(sweep.main, "lr", *tiny(tiny_data, tmp_path / "sweep"))
    assert (done.returncode, done.stderr) == (2, "sweep: the picture needs matplotlib: pip install -e '.[plots]'\n")
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_trains_what_is_not_done_and_shows_all_runs(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt_after: Interrupt
) -> None:
    trained = interrupt_after(2)
    monkeypatch.setattr(sweeps, "LEARNING_RATES", (1e-3, 1e-2, 30.0))
    base, page = tmp_path / "sweep", tmp_path / "page.md"
    words = ["lr", *tiny(tiny_data, base), "--train.steps", "20", "--optim.clip-norm", "None"]
    page.write_text("before\n<!-- sweep lr -->\nold\n<!-- end -->\nafter\n")
    assert called(sweep.main, *words).returncode == 130
    done = called(sweep.main, *words, "--into", str(page))
    assert done.returncode == 0, done.stderr
    assert trained == ["lr=0.001", "lr=0.01", "interrupt", "lr=30"], "each run once"
    again = called(sweep.main, *words)
    assert again.stdout == done.stdout and len(trained) == 4, "a run that diverged is not tried again"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for folder in (base, tmp_path / "new"):
        dry = called(sweep.main, *words, "--dry-run", "--run-dir", str(folder), "--into", str(page))
        assert dry.returncode == 0 and dry.stdout.count("would train") == (0 if folder.exists() else 3), dry.stderr
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}, "a dry run writes nothing"
    other = called(sweep.main, *words, "--model.width", "64", "--into", str(page))
    assert other.returncode == 2 and "is another run: --model.width 64 (was 32)" in other.stderr

    table = (base / "sweep.md").read_text()
    cells = cells_in(table)
    assert [row[0] for row in cells] == ["run", "lr=0.001", "lr=0.01", "lr=30"]
    last = [row for row in rows(base / "lr=0.01") if "val_loss" in row][-1]
    assert cells[2][1:3] == ["20", f"{last['val_loss']:.4f}"]
    assert cells[3][2] == "-" and cells[3][6] == "diverged" and int(cells[3][1]) < 20
    assert (base / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert page.read_text() == f"before\n<!-- sweep lr -->\n{table}<!-- end -->\nafter\n"


def test_the_ladder_shows_each_kind_from_the_first_loss_to_a_sample(
    tiny_data: Path, tmp_path: Path, interrupt_after: Interrupt
) -> None:
    interrupt_after(None)
    base = tmp_path / "sweep"
    done = called(sweep.main, "ladder", *tiny(tiny_data, base, "--sample.every"), "--train.steps", "20")
    assert done.returncode == 0, done.stderr
    header, *kinds = cells_in((base / "sweep.md").read_text())
    assert header == ["run", "parameters", "first loss", "val loss", "+-", "seconds", "", "sample"]
    assert [row[0] for row in kinds] == list(RUNGS)
    vocab_size = read_manifest(tiny_data).vocab_size
    assert kinds[0][1] == f"{vocab_size**2:,}"
    for row in kinds:
        assert float(row[2]) == pytest.approx(math.log(vocab_size), abs=0.02) and float(row[3]) < float(row[2])
        sample = rows(base / row[0], "samples.jsonl")[-1]["samples"][0]["text"]
        assert row[7] and " ".join(sample.split("\n")[0].split())[:20] in row[7] and len(row[7]) <= 62


def test_epochs_are_counted_by_the_data(tiny_data: Path, tmp_path: Path, interrupt_after: Interrupt) -> None:
    interrupt_after(None)
    set_by_sweep = ("--sample.every", "--validate.every", "--save.every")
    done = called(sweep.main, "epochs", *tiny(tiny_data, tmp_path, *set_by_sweep), "--train.steps", "100")
    assert done.returncode == 0, done.stderr
    header, *shown = cells_in((tmp_path / "sweep.md").read_text())
    assert header == ["epoch", "step", "val loss", "+-", "sample"]
    steps_per_epoch = read_manifest(tiny_data).splits["train"].tokens // 384
    assert [int(row[1]) for row in shown] == [*range(0, 100, steps_per_epoch), 100]
    assert [row[0] for row in shown[:3]] == ["0.0", "1.0", "2.0"] and all(row[4] for row in shown[1:])


def test_a_budget_gives_all_entries_the_same_time(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt_after: Interrupt
) -> None:
    """Interrupted after the timing of two entries and a first run: the steps stay what they were."""
    trained = interrupt_after(3)
    budget_entries = sweeps.budget_entries
    monkeypatch.setattr(sweeps, "budget_entries", lambda config: budget_entries(config)[:2])
    set_by_sweep = ("--validate.every", "--save.every", "--track.every", "--optim.warmup-steps")
    words = ["budget", "--minutes", "0.01", *tiny(tiny_data, tmp_path, *set_by_sweep)]
    assert called(sweep.main, *words).returncode == 130
    done = called(sweep.main, *words)
    assert done.returncode == 0, done.stderr
    assert trained == ["gpt2", "modern", "gpt2", "interrupt", "modern"], "each is timed once and trained once"
    header, *shown = cells_in((tmp_path / "sweep.md").read_text())
    assert header[2:6] == ["steps", "tokens", "seconds", "val loss"] and header[7] == "against the first"
    losses = {row[0]: float(row[5]) for row in shown}
    assert list(losses.values()) == sorted(losses.values()) and len(losses) == 2, "the best first"
    for name, _, steps, *_, change, _ in shown:
        step_seconds = [row["step_seconds"] for row in rows(tmp_path / "timing" / name) if "loss" in row]
        configured = json.loads((tmp_path / name / "config.json").read_text())["config"]["train"]["steps"]
        assert int(steps) == int(0.6 / statistics.median(step_seconds)) == configured
        expected = 100 * (math.exp(losses[name] - losses["gpt2"]) - 1)
        assert float(change.rstrip("%")) == pytest.approx(expected, abs=0.06)
