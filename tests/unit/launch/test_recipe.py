"""The sweep `recipe`: its trials, the share of tokens that a rung needs, and the whole at a tiny size."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest

from launch import recipe, sweep
from launch.recipe import LADDER, Length, Recipe, Setting, Trial, needed_share, row_of, seconds_per_share
from tests.helpers.runs import ROOT, called, rows
from tests.unit.launch.conftest import Interrupt
from tests.unit.launch.test_sweep import cells_in, tiny
from train.command_line import parse
from train.presets import PRESETS

SET_BY_SWEEP = ("--validate.every", "--save.every", "--track.every", "--optim.warmup-steps", "--train.micro-batch")


def plan() -> Recipe:
    return Recipe(parse(["stories-cpu", "--train.steps", "600"], PRESETS), num_seeds=2, train=lambda entries: [])


@pytest.mark.parametrize("rung", range(len(LADDER)))
@pytest.mark.parametrize("schedule", recipe.SCHEDULES)
def test_every_trial_can_be_trained_and_reads_its_tokens(rung: int, schedule: str) -> None:
    for sequences in recipe.BATCHES:
        entry = plan().entry(Trial(rung, Setting(0.01, sequences, schedule), 245_760, seed=5))
        config = parse(["stories-cpu", *entry.flags], PRESETS)
        assert config.train.steps * config.train.batch_tokens == 245_760 and config.seed == 5
        assert config.train.batch_tokens == sequences * 128
        assert config.optim.name == recipe.optimizer_of(rung)
        assert config.optim.schedule == ("cosine" if schedule == "cosine" else "wsd")
        assert (config.optim.head_lr is not None) == (not config.model.tie)


def test_each_rung_adds_to_the_one_before() -> None:
    trials = [plan().entry(Trial(rung, Setting(0.01, 4, "cosine"), 10_000, seed=1)) for rung in range(len(LADDER))]
    configs = [parse(["stories-cpu", *entry.flags], PRESETS) for entry in trials]
    for before, after in itertools.pairwise(configs):
        changed = set(before.model.switched()) - set(after.model.switched())
        assert not changed, "a rung takes nothing away"
        assert (before.model, before.optim) != (after.model, after.optim)
    assert [config.optim.name for config in configs][:3] == ["adamw", "adamw", "muon"]


def test_both_ends_have_grids_of_one_size() -> None:
    plain, fast = (plan().grid(rung, 10_000) for rung in (0, len(LADDER) - 1))
    assert len(plain) == len(fast) == 5 * 3 * 2


def test_the_share_is_linear_in_the_logarithm_of_the_tokens() -> None:
    points = [Length(0.1, 4.0, 1.0), Length(0.2, 3.8, 2.0), Length(0.4, 3.7, 4.0)]
    assert needed_share(points, 3.9) == pytest.approx(0.1 * 2**0.5)
    assert needed_share(points, 3.75) == pytest.approx(0.2 * 2**0.5)
    assert needed_share(points, 4.5) == 0.1, "nothing is assumed below the shortest"
    assert needed_share(points, 3.6) == math.inf
    assert needed_share([points[0], Length(0.2, math.inf, 2.0), points[2]], 3.7) == pytest.approx(0.4)


def test_rows_have_spread_time_and_bounds() -> None:
    plain = [[Length(0.4, 4.2, 40.0), Length(1.0, 3.9, 100.0)], [Length(0.4, 4.2, 40.0), Length(1.0, 3.8, 100.0)]]
    fast = [[Length(0.1, 4.0, 20.0), Length(0.2, 3.7, 40.0)], [Length(0.1, 3.9, 20.0), Length(0.2, 3.7, 40.0)]]
    cells = row_of(LADDER[2], fast, 3.85, plain)
    first, second = needed_share(fast[0], 3.85), needed_share(fast[1], 3.85)
    assert cells[1:4] == [
        f"{(first + second) / 2:.1%}",
        f"{second:.1%} to {first:.1%}",
        f"{(first + second):.1%}",
    ], "a token takes twice the time"
    assert cells[4:6] == ["3.7000", "0.0000"]
    assert row_of(LADDER[2], fast, 3.0, plain)[1:4] == ["over 20%", "-", "-"]
    assert row_of(LADDER[2], fast, 4.1, plain)[1] == "at most 10.0%"


def test_the_whole_sweep_at_a_tiny_size(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt_after: Interrupt
) -> None:
    """Real runs of a few steps, interrupted once: tuned, trained from two seeds, reported on the second half."""
    monkeypatch.setattr(recipe, "RATES", {"adamw": (1e-3, 1e-2), "muon": (0.01,)})
    monkeypatch.setattr(recipe, "BATCHES", (4,))
    monkeypatch.setattr(recipe, "KEPT_SETTINGS", 1)
    monkeypatch.setattr(recipe, "LADDER", (LADDER[0], LADDER[2]))
    monkeypatch.setattr(recipe, "LENGTHS", {"adamw": (1.0,), "muon": (0.2, 0.4)})
    monkeypatch.setattr(sweep, "LADDER", recipe.LADDER)
    words = [
        "recipe",
        "--seeds",
        "2",
        *tiny(tiny_data, tmp_path, *SET_BY_SWEEP),
        "--train.steps",
        "20",
        "--validate.tokens",
        "900",
    ]
    trained = interrupt_after(3)
    assert called(sweep.main, *words).returncode == 130
    done = called(sweep.main, *words)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "sweep.md").read_text()
    settings, table = text.split("\n\n")
    header, *shown = cells_in(table)
    assert header[:2] == ["change", "tokens needed"] and [row[0] for row in shown] == [LADDER[0].name, LADDER[2].name]
    assert "over 2 seeds" in settings and "rate 0.01, 4 sequences" in settings.split("Muon")[1]
    names = [name for name in trained if name != "interrupt"]
    assert len(names) == len(set(names)) == len(list(tmp_path.glob("rung=*"))), "each is trained once"
    assert {name.rpartition("seed=")[2] for name in names} == {"1337", "1338"}
    (evaluation,) = (tmp_path / names[-1] / "evaluations").glob("validation_*.json")
    on_both = json.loads(evaluation.read_text())["result"]
    last = rows(tmp_path / names[-1])[-1]
    assert on_both["tokens"] > 900 and on_both["loss"] != pytest.approx(last["val_loss"], abs=1e-6)


def test_too_little_validation_is_one_line(tiny_data: Path, tmp_path: Path) -> None:
    done = called(sweep.main, "recipe", *tiny(tiny_data, tmp_path, *SET_BY_SWEEP), "--validate.tokens", "1500")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--validate.tokens 1500" in done.stderr and "at most half" in done.stderr


def test_flags_that_the_sweep_sets_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    done = called(
        sweep.main,
        "recipe",
        *tiny(tiny_data, tmp_path, *SET_BY_SWEEP),
        "--validate.tokens",
        "900",
        "--optim.name",
        "muon",
    )
    assert done.returncode == 2 and "--optim.name" in done.stderr and "sets it for each run" in done.stderr


def test_a_seed_that_diverged_is_no_measurement() -> None:
    plain = [[Length(1.0, 3.9, 100.0)]] * 3
    fast = [[Length(0.1, 4.0, 20.0), Length(0.2, loss, 40.0)] for loss in (3.7, 3.7, math.inf)]
    cells = row_of(LADDER[2], fast, 3.85, plain)
    assert cells[1:4] == ["over 20%", "-", "-"] and cells[5] == "-"
    assert row_of(LADDER[2], [[Length(0.1, math.inf, math.nan)]] * 2, 3.85, plain)[1] == "over 10%"
    assert seconds_per_share([[Length(0.1, 4.0, 20.0), Length(0.2, math.inf, math.nan)]]) == pytest.approx(200)
    at_the_bound = row_of(
        LADDER[2], [[Length(0.1, loss, 20.0), Length(0.2, 3.7, 40.0)] for loss in (3.8, 3.9)], 3.85, plain
    )
    assert at_the_bound[1].startswith("at most "), "one seed is known only to need no more"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--train.batch-stages", "5:4096"), "recipe: its runs have one batch size each"),
        (("--gpus-per-node", "2"), "recipe: a batch may be of 4 sequences, so each run has one process"),
        (("--seeds", "0"), "--seeds 0 must be at least 1"),
    ],
)
def test_what_the_ladder_cannot_be_is_one_line(
    tiny_data: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    done = called(sweep.main, "recipe", *tiny(tiny_data, tmp_path, *SET_BY_SWEEP), "--validate.tokens", "900", *flags)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_the_table_of_the_page_was_made() -> None:
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- sweep recipe -->\n(.*?)<!-- end -->", text, re.DOTALL)
    _, *shown = cells_in(table.split("\n\n")[1])
    assert [row[0] for row in shown] == [rung.name for rung in LADDER]
