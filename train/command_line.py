"""The command line of a run: a preset and flags become a Config, or one error that names every fault."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from common.errors import InputError
from common.flags import HIDDEN, mark_for_tyro
from common.former_flags import refuse_former_flags
from model.config import ModelConfig
from train.config import Config, resolve
from train.config_checks import faults_of


def parse(args: Sequence[str], presets: dict[str, Config]) -> Config:
    """Parse `[PRESET] [--section.field value ...]` into a resolved Config; report every fault in one InputError."""
    import tyro  # here, because a run that another program starts parses nothing

    name, flags = ("gpt2-small", list(args)) if not args or args[0].startswith("-") else (args[0], list(args[1:]))
    if name not in presets:
        raise InputError(f"no preset {name!r}{_suggestion(name, presets)}; there are {', '.join(presets)}")
    refuse_former_flags(flags)
    preset = presets[name]
    mark_for_tyro(Config, ModelConfig)
    config, unknown = tyro.cli(
        Config,
        prog=f"train/main.py {name}",
        description=f"{Config.__doc__} Presets, first on the line: {', '.join(presets)}.",
        args=flags,
        default=preset,
        return_unknown_args=True,
    )
    if unknown:
        known = _flags_of(Config)
        unknown = [arg for arg in unknown if arg.startswith("-")] or unknown  # without the flags' values
        raise InputError("; ".join(f"unknown {flag!r}{_suggestion(flag.split('=')[0], known)}" for flag in unknown))
    faults = faults_of(config)
    if config.train.tokens is not None and config.train.steps != preset.train.steps:
        faults.append("--train.steps and --train.tokens both set the length of the run; give one")
    if faults:
        raise InputError("\n  ".join([f"{len(faults)} faults:", *faults]) if len(faults) > 1 else faults[0])
    return resolve(config)


def _flags_of(kind: Any, prefix: str = "--") -> list[str]:
    flags = []
    for item in dataclasses.fields(kind):
        if HIDDEN in getattr(item.type, "__metadata__", ()):
            continue
        flag = prefix + item.name.replace("_", "-")
        if dataclasses.is_dataclass(item.type):
            flags += _flags_of(item.type, flag + ".")
        elif item.type is bool:
            flags += [flag, prefix + "no-" + item.name.replace("_", "-")]
        else:
            flags.append(flag)
    return flags


def _suggestion(word: str, known: Sequence[str] | dict[str, Config]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
