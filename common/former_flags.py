"""Flags that were renamed. The old name is refused with the new one, and never gets another meaning."""

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
    """Raise InputError that names the new flag if `args` holds a renamed one."""
    names = [arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")]
    renamed = [f"{name} is now called {FORMER_FLAGS[name]}" for name in names if name in FORMER_FLAGS]
    if renamed:
        raise InputError("; ".join(renamed))
