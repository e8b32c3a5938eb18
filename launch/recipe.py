"""The sweep `recipe`: how few tokens each change to the plain recipe needs for the plain recipe's last loss.

Both ends of the ladder are tuned in the same way: a grid of rates, batches and schedules at 40 % of their tokens, then
the best four at all of them. The first half of the validation tokens decides; the second half is what is reported. Each
rung of the ladder adds one change to the one before and trains at several lengths, each with a schedule that ends
there, from several seeds. Between two lengths the loss is taken to be linear in the logarithm of the tokens.
"""

import contextlib
import io
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from common.errors import InputError
from common.tables import markdown
from launch.sweeps import DIVERGED, Entry, Result
from train.config import Config
from train.processes.group import ProcessGroup
from train.processes.stop_requests import StopRequests
from train.validate import Options as ValidateOptions
from train.validate import evaluate

COARSE = 0.4  # of the tokens, at which the whole grid is tried
KEPT_SETTINGS = 4
FAST_SHARE = 0.2  # of the plain recipe's tokens, for which the fast recipe is tuned
LENGTHS = {"adamw": (0.4, 0.7, 1.0), "muon": (0.1, 0.2, 0.4)}  # as parts of the plain recipe's tokens
BATCHES = (4, 8, 16)
RATES = {"adamw": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), "muon": (0.005, 0.01, 0.02, 0.04, 0.08)}
SCHEDULES = {  # part of the steps that is warm-up, and flags
    "cosine": (0.1, ()),
    "warm-down": (0.05, ("--optim.schedule", "wsd", "--optim.warmdown-fraction", "0.5")),
}
# Muon's other rates as parts of its own, chosen on the grid's text at 20 % of the tokens.
OTHER_RATES = {"--optim.embedding-lr": 5.0, "--optim.head-lr": 0.25, "--optim.vector-lr": 0.5}
ABSENT = "-"


@dataclass(frozen=True)
class Rung:
    """One change, added to those of all rungs before."""

    name: str
    flags: str
    published: str  # tokens needed for GPT-2 small's loss on FineWeb, as part of the plain recipe's 10.26e9


LADDER = (
    Rung("plain: AdamW, GPT-2", "", "100 %"),
    Rung("rotary positions", "--model.position-embedding rope", "49 %, with tuned rates"),
    Rung("Muon", "--optim.name muon", "32 %"),
    Rung("ReLU^2, zero projections", "--model.mlp relu2 --model.zero-init-projections", ABSENT),
    Rung("QK-norm", "--model.qk-norm", "26 %"),
    Rung("RMSNorm, no biases", "--model.norm rmsnorm --model.no-bias", ABSENT),
    Rung("own head", "--model.no-tie", ABSENT),
    Rung("norm of the embedding, zero head", "--model.embedding-norm --model.zero-init-head", "23 %"),
    Rung("value residual, shortcut", "--model.value-residual --model.embedding-shortcut", ABSENT),
    Rung("soft cap", "--model.logit-softcap 15 --model.softcap-form rsqrt", "16 %"),
    Rung("skips", "--model.skips", "15 %"),
    Rung("value embeddings", "--model.value-embeddings 2", "8 %, with windows"),
    Rung("mean of the weights", "--optim.average-fraction 0.2", ABSENT),
)


@dataclass(frozen=True)
class Setting:
    """Hold one point of the grid: what is tuned."""

    rate: float
    sequences: int
    schedule: str

    def __str__(self) -> str:
        return f"rate {self.rate:g}, {self.sequences} sequences, {self.schedule}"


@dataclass(frozen=True)
class Trial:
    """One run of the recipe's sweep."""

    rung: int
    setting: Setting
    tokens: int
    seed: int

    @property
    def name(self) -> str:
        setting = self.setting
        parts = f"rung={self.rung}", f"lr={setting.rate:g}", f"batch={setting.sequences}", setting.schedule
        return ",".join((*parts, f"tokens={self.tokens}", f"seed={self.seed}"))


@dataclass(frozen=True)
class Length:
    """A run as a point: its tokens as part of the plain recipe's, its loss, its seconds."""

    share: float
    loss: float
    seconds: float


Train = Callable[[Sequence[Entry]], list[Result]]


class Recipe:
    """The stages of the sweep. `train` trains the entries that are not done and returns their results, in order."""

    def __init__(self, config: Config, *, num_seeds: int, train: Train) -> None:
        self._config = config
        self.tokens = config.train.steps * config.train.batch_tokens
        self._seeds = range(config.seed, config.seed + num_seeds)
        self._train = train
        assert config.validate.tokens is not None
        self._validation_tokens = config.validate.tokens // config.train.seq_len * config.train.seq_len

    def tune(self, rung: int, tokens: int) -> Setting:
        """Return the best setting of a rung for a run of so many tokens, by the first half of the validation."""
        trials = self.grid(rung, tokens)
        for kept in (KEPT_SETTINGS, 1):
            losses = [first_half_loss(result) for result in self._results(trials)]
            if not math.isfinite(min(losses)):
                raise InputError(f"{LADDER[rung].name}: every run of its grid diverged")
            best = sorted(range(len(trials)), key=losses.__getitem__)[:kept]
            trials = [replace(trials[index], tokens=tokens) for index in best]
        return trials[0].setting

    def grid(self, rung: int, tokens: int) -> list[Trial]:
        """Return a trial of every setting at COARSE of the tokens."""
        settings = itertools.product(RATES[optimizer_of(rung)], BATCHES, SCHEDULES)
        return [Trial(rung, Setting(*values), round(COARSE * tokens), self._seeds[0]) for values in settings]

    def table(self) -> str:
        """Train everything; return the settings found and a row for each rung, in Markdown."""
        ends = {
            "adamw": self.tune(0, self.tokens),
            "muon": self.tune(len(LADDER) - 1, round(FAST_SHARE * self.tokens)),
        }
        measured = [self._measure(rung, ends[optimizer_of(rung)]) for rung in range(len(LADDER))]
        target = statistics.fmean(points[-1].loss for points in measured[0])
        if not math.isfinite(target):
            raise InputError(f"the plain recipe diverged from one of {len(self._seeds)} seeds at {ends['adamw']}")
        header = ["change", "tokens needed", "least to most", "time", "loss at 20 %", "+-", "published"]
        plain_row = [LADDER[0].name, "100 %", ABSENT, "100 %", ABSENT, ABSENT, LADDER[0].published]
        rows = [
            row_of(rung, points, target, measured[0]) for rung, points in zip(LADDER[1:], measured[1:], strict=True)
        ]
        plain, fast = ends["adamw"], ends["muon"]
        return (
            f"Plain recipe, tuned for {self.tokens:,} tokens: {plain}; last loss {target:.4f} over "
            f"{len(self._seeds)} seeds. With Muon, tuned for {FAST_SHARE:.0%} of them: {fast}.\n\n"
            f"{markdown([header, plain_row, *rows])}"
        )

    def _measure(self, rung: int, setting: Setting) -> list[list[Length]]:
        """Return each seed's results by length, the shortest first."""
        shares = LENGTHS[optimizer_of(rung)]
        trials = [Trial(rung, setting, round(share * self.tokens), seed) for seed in self._seeds for share in shares]
        points = [
            Length(share, second_half_loss(result, self._validation_tokens), seconds_of(result))
            for share, result in zip(itertools.cycle(shares), self._results(trials), strict=False)
        ]
        return [points[start : start + len(shares)] for start in range(0, len(points), len(shares))]

    def _results(self, trials: Sequence[Trial]) -> list[Result]:
        return self._train([self.entry(trial) for trial in trials])

    def entry(self, trial: Trial) -> Entry:
        """Return a trial's run."""
        setting, seq_len = trial.setting, self._config.train.seq_len
        steps = max(1, trial.tokens // (setting.sequences * seq_len))
        warmup_share, schedule = SCHEDULES[setting.schedule]
        flags = {
            "--train.batch-tokens": setting.sequences * seq_len,
            "--train.micro-batch": setting.sequences,
            "--train.steps": steps,
            "--validate.every": steps,
            "--save.every": steps,
            "--track.every": max(1, steps // 50),
            "--optim.warmup-steps": max(1, round(warmup_share * steps)),
            "--optim.lr-peak": f"{setting.rate:g}",
            "--seed": trial.seed,
        }
        if optimizer_of(trial.rung) == "muon":
            flags |= {flag: f"{part * setting.rate:g}" for flag, part in OTHER_RATES.items()}
            if not is_untied(trial.rung):  # then the embedding is the head
                flags["--optim.embedding-lr"] = flags.pop("--optim.head-lr")
        changes = " ".join(rung.flags for rung in LADDER[: trial.rung + 1]).split()
        words = [str(word) for pair in flags.items() for word in pair]
        return Entry(trial.name, (*words, *schedule, *changes))


def optimizer_of(rung: int) -> str:
    return "muon" if any("--optim.name muon" in each.flags for each in LADDER[: rung + 1]) else "adamw"


def is_untied(rung: int) -> bool:
    return any("--model.no-tie" in each.flags for each in LADDER[: rung + 1])


def first_half_loss(result: Result) -> float:
    """Return the run's own last validation loss, by which settings are chosen; infinity if it diverged."""
    if result.last is None and result.outcome != DIVERGED:
        raise InputError(f"not finished: {result.run.run_dir}; the same command goes on with it")
    return math.inf if result.last is None else float(result.last["val_loss"])


def second_half_loss(result: Result, num_tokens: int) -> float:
    """Return the loss on as many validation tokens again, which decided nothing; infinity if the run diverged.

    `num_tokens`: of the run's own validation, which are the first of these.
    """
    first = first_half_loss(result)
    if not math.isfinite(first):
        return first
    alone, options = (
        ProcessGroup(0, 1, torch.device("cpu")),
        ValidateOptions(str(result.run.run_dir), tokens=2 * num_tokens),
    )
    with contextlib.redirect_stdout(io.StringIO()), StopRequests(None, is_main=True) as stop_requests:
        validation = evaluate(options, alone, stop_requests)["validation"]
    return float((validation["tokens"] * validation["loss"] - num_tokens * first) / (validation["tokens"] - num_tokens))


def seconds_of(result: Result) -> float:
    """Return the seconds of training; NaN if the run diverged, since it then ended early."""
    return math.nan if result.last is None else float(result.training[-1]["seconds"])


def needed_share(points: Sequence[Length], target: float) -> float:
    """Return the part of the tokens at which the loss is `target`; infinity if the longest run does not reach it.

    Beyond the shortest run nothing is assumed: if that is good enough, its share is returned.
    """
    if points[0].loss <= target:
        return points[0].share
    for before, after in itertools.pairwise(points):
        if after.loss <= target and not math.isfinite(before.loss):
            return after.share
        if after.loss <= target:
            part = (before.loss - target) / (before.loss - after.loss)
            return math.exp(math.log(before.share) + part * math.log(after.share / before.share))
    return math.inf


def row_of(
    rung: Rung, seeds: Sequence[Sequence[Length]], target: float, plain: Sequence[Sequence[Length]]
) -> list[str]:
    """Return a rung's cells: tokens and time that it needs as parts of the plain recipe's, and its loss at 20 %."""
    needed = [needed_share(points, target) for points in seeds]
    mean = statistics.fmean(needed)
    speed = seconds_per_share(seeds) / seconds_per_share(plain)
    at_fifth = [point.loss for points in seeds for point in points if point.share == FAST_SHARE]
    shortest = seeds[0][0].share
    bound = "at most " if shortest in needed else ""
    return [
        rung.name,
        f"{bound}{mean:.1%}" if math.isfinite(mean) else f"over {seeds[0][-1].share:.0%}",
        f"{min(needed):.1%} to {max(needed):.1%}" if math.isfinite(max(needed)) else ABSENT,
        f"{bound}{mean * speed:.1%}" if math.isfinite(mean) else ABSENT,
        f"{statistics.fmean(at_fifth):.4f}" if at_fifth else ABSENT,
        f"{statistics.stdev(at_fifth):.4f}" if len(at_fifth) > 1 and math.isfinite(sum(at_fifth)) else ABSENT,
        rung.published,
    ]


def seconds_per_share(seeds: Sequence[Sequence[Length]]) -> float:
    """Return the median time for all of the plain recipe's tokens; NaN if every run diverged."""
    times = [point.seconds / point.share for points in seeds for point in points if math.isfinite(point.loss)]
    return statistics.median(times) if times else math.nan
