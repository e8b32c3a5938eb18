"""Flags and commands that were renamed: each is refused with its new name, never given another meaning."""

from collections.abc import Sequence

from common.errors import InputError

FORMER_FLAGS = {
    "--data.leave-out": "--data.skip-sequences",
    "--model.hidden-size": "--model.mlp-width",
    "--model.positions": "--model.position-embedding",
    "--model.rung": "--model.kind",
    "--parallel.accumulate": "--parallel.reduce-gradients step|micro_batch",
    "--window": "--sequence",
}


def refuse_former_flags(args: Sequence[str]) -> None:
    """Raise InputError if a flag is given under a name that it no longer has."""
    names = [arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")]
    renamed = [f"{name} is now called {FORMER_FLAGS[name]}" for name in names if name in FORMER_FLAGS]
    if renamed:
        raise InputError("; ".join(renamed))
