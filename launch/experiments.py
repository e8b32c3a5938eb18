"""What each sweep trains: grids as data. launch/sweep.py runs them, launch/findings.py shows what they found."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.errors import InputError
from train.config import Config

LR = (3e-4, 6e-4, 1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 3e-2, 1e-1)  # the published seven, and two past the edge
BATCH = (1, 8, 32, 64, 128, 256, 512)  # sequences
CPU_BATCH = (1, 4, 16, 64)
CPU_PRESET = "stories-cpu"
NAMES = ("lr", "batch", "ablate", "budget", "ladder", "epochs")
PRESETS_SWEPT = {"ladder": "shakespeare-char-cpu", "epochs": "phase1"}  # by default; the others: CPU_PRESET
# Flags that a sweep sets for each run by what was given.
READ = {
    "batch": ("--optim.lr-peak", "--train.steps", "--train.batch-tokens", "--train.micro-batch"),
    "budget": ("--optim.lr-peak", "--train.batch-tokens", "--train.micro-batch", "--model.num-layers"),
}
# The published ablations' model, and what each takes out of it; their differences are of perplexity.
MODERN = ("--model.norm", "rmsnorm", "--model.position-embedding", "rope", "--model.mlp", "swiglu", "--model.no-bias")
BASELINE = (*MODERN, "--model.no-tie")
ABLATIONS = {
    "baseline": ("", ""),
    "no-norm": ("--model.norm none", "diverges"),
    "post-norm": ("--model.norm-place post", "+46 %"),
    "no-positions": ("--model.position-embedding none", "+3 %"),
    "silu": ("--model.mlp silu", "+0.7 %"),
}
# The better of 1e-2 and 4e-3 for each, on Tiny Shakespeare: the more layers, the smaller the rate.
RUNGS = {"bigram": 1e-2, "head": 1e-2, "heads": 1e-2, "block": 1e-2, "gpt": 4e-3}
SAMPLED_TOKENS = 120  # of what a table shows the beginning of
TIMED_STEPS = 12


@dataclass(frozen=True)
class Entry:
    """One run of a sweep."""

    name: str
    """Of its folder."""
    flags: tuple[str, ...]
    x: float = 0.0
    """Where it stands in the picture."""
    series: str = "loss"
    """Which line it is a point of."""
    published: str = ""
    """What the published account found, as the table's last column has ours."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep trains, and what is shown of it."""

    lesson: str
    entries: tuple[Entry, ...]
    columns: tuple[str, ...] = ("run", "steps", "val loss", "+-", "perplexity", "seconds", "")
    """Of its table, by their names in launch/findings.py."""
    x_label: str | None = None
    """None: the picture has the runs' curves."""
    is_ranked: bool = False
    """The best comes first."""
    has_epochs: bool = False
    """One run, and a row of the table for each validation."""


def sweep_named(name: str, config: Config, *, world: int = 1, data_tokens: int = 0) -> Sweep:
    """`config`: of the preset with the flags that all runs have. `data_tokens`: of the training split."""
    plain = Sweep("", ())
    if name == "lr":
        return replace(
            plain, lesson="Final loss against the learning rate", entries=lr_entries(), x_label="peak learning rate"
        )
    if name == "batch":
        return replace(
            plain,
            lesson="The same tokens in batches of different size",
            entries=batch_entries(config, world=world),
            x_label="sequences per step",
        )
    if name == "ablate":
        return replace(
            plain,
            lesson="A part left out or exchanged at a time",
            entries=ablate_entries(),
            columns=(*plain.columns, "against the first", "published"),
        )
    if name == "budget":
        return Sweep(
            "The same time for every entry",
            budget_entries(config),
            columns=("run", "parameters", "steps", "tokens", "seconds", "val loss", "+-", "against the first", ""),
            is_ranked=True,
        )
    if name == "ladder":
        return Sweep(
            "From a bigram to a GPT",
            ladder_entries(config),
            columns=("run", "parameters", "first loss", "val loss", "+-", "seconds", "", "sample"),
        )
    assert name == "epochs"
    return Sweep("Epoch by epoch", epoch_entries(config, data_tokens), has_epochs=True)


def lr_entries() -> tuple[Entry, ...]:
    return tuple(Entry(f"lr={lr:g}", ("--optim.lr-peak", f"{lr:g}"), x=lr) for lr in LR)


def batch_entries(config: Config, *, world: int) -> tuple[Entry, ...]:
    """The same number of tokens, within a step, in batches of so many sequences; the rate as it is, or by the square
    root of the batch (Malladi et al. 2022, for Adam)."""
    train, at_batch = config.train, config.sequences_per_step
    largest = train.micro_batch if isinstance(train.micro_batch, int) else 1
    found = []
    for series, exponent in (("fixed rate", 0.0), ("rate by square root", 0.5)):
        for sequences in CPU_BATCH if config.preset == CPU_PRESET else BATCH:
            rate = config.optim.lr_peak * (sequences / at_batch) ** exponent
            words = (
                *("--train.batch-tokens", str(sequences * train.seq_len)),
                *("--train.micro-batch", str(max(1, min(sequences // world, largest)))),
                *("--optim.lr-peak", f"{rate:.4g}"),
                *length_flags(train.steps * train.batch_tokens // (sequences * train.seq_len)),
            )
            if exponent == 0.0 or sequences != at_batch:  # there both are one
                found.append(Entry(f"batch={sequences},{series.replace(' ', '-')}", words, x=sequences, series=series))
    return tuple(found)


def ablate_entries() -> tuple[Entry, ...]:
    return tuple(
        Entry(name, (*BASELINE, *flags.split()), published=published) for name, (flags, published) in ABLATIONS.items()
    )


def ladder_entries(config: Config) -> tuple[Entry, ...]:
    """A sample of each at the end; the last validation is there anyway."""
    sampled = ("--sample.every", str(config.train.steps), "--sample.tokens", str(SAMPLED_TOKENS))
    return tuple(
        Entry(kind, ("--model.kind", kind, "--optim.lr-peak", f"{rate:g}", *sampled)) for kind, rate in RUNGS.items()
    )


def epoch_entries(config: Config, data_tokens: int) -> tuple[Entry, ...]:
    """One run that is validated and sampled after each epoch, to the step."""
    every = str(max(1, data_tokens // config.train.batch_tokens))
    return (Entry("run", ("--validate.every", every, "--sample.every", every, "--save.every", every)),)


def budget_entries(config: Config) -> tuple[Entry, ...]:
    """What may be had for the same time: other parts, another size, another batch, another rate."""
    model = config.model
    quarter = max(1, config.sequences_per_step // 4) * config.train.seq_len
    given = {
        "gpt2": (),
        "modern": MODERN,
        "modern,own-head": (*MODERN, "--model.no-tie"),
        "modern,qk-norm": (*MODERN, "--model.qk-norm"),
        "modern,value-residual": (*MODERN, "--model.value-residual"),
        "modern,half-the-layers": (*MODERN, "--model.num-layers", str(max(1, model.num_layers // 2))),
        "modern,twice-the-layers": (*MODERN, "--model.num-layers", str(2 * model.num_layers)),
        "modern,quarter-batch": (*MODERN, "--train.batch-tokens", str(quarter), *smaller_micro_batch(config, 4)),
        "modern,twice-the-rate": (*MODERN, "--optim.lr-peak", f"{2 * config.optim.lr_peak:g}"),
    }
    return tuple(Entry(name, flags) for name, flags in given.items())


def smaller_micro_batch(config: Config, times: int) -> tuple[str, ...]:
    size = config.train.micro_batch
    return ("--train.micro-batch", str(max(1, size // times))) if isinstance(size, int) else ()


def length_flags(steps: int) -> tuple[str, ...]:
    """A run of so many steps: a tenth of them warm-up, one validation and one checkpoint at the end, 50 rows."""
    flags = {
        "--train.steps": steps,
        "--optim.warmup-steps": max(1, steps // 10),
        "--validate.every": steps,
        "--save.every": steps,
        "--track.every": max(1, steps // 50),
    }
    return tuple(str(word) for pair in flags.items() for word in pair)


def timing_flags() -> tuple[str, ...]:
    """A run that only tells how long a step takes."""
    return (*length_flags(TIMED_STEPS), "--track.every", "1", "--validate.every", "None")


def refuse_flags_of(plan: Sweep, name: str, flags: Sequence[str]) -> None:
    """InputError for a flag that the sweep sets itself, unless that is what it starts from."""
    own = {flag for entry in plan.entries for flag in entry.flags if flag.startswith("--")} - set(READ.get(name, ()))
    own |= {flag for flag in length_flags(1) if flag.startswith("--")} if name == "budget" else set()
    given = {flag.partition("=")[0].replace("_", "-") for flag in flags if flag.startswith("--")}
    if own & given:
        raise InputError(f"{' '.join(sorted(own & given))}: the sweep {name} sets it for each run")
