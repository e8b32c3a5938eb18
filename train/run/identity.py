"""What makes a run the run it is: the settings and data that it began with, as its newest checkpoint records them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import InputError
from common.reading import misfit, read_own_json
from model.checkpoint import list_checkpoints, sealed_state
from model.config import with_current_names
from train.config import Config
from train.processes.group import ProcessGroup

CONFIG_FILE = "config.json"
# Flags that identify a run, --model and --optim with all below them. All others (processes, micro-batch, compilation,
# intervals) may change on the way.
IDENTITY = (
    *("--seed", "--from-checkpoint", "--model", "--train.seq-len", "--train.steps", "--train.batch-tokens"),
    *("--train.batch-stages", "--train.dtype", "--train.fp8", "--optim"),
)
FORM = {"config": {"model": dict, "train": dict, "optim": dict}, "data": str}
# What set-up measured (parallel/auto_micro_batch.py), beside the attention's kernel (parallel/attention.py); runs of
# before it was sealed have none in their checkpoints.
MEASURED = {"micro_batch": range(1, 2**31), "conditions": dict}


@dataclass(frozen=True)
class RecordedRun:
    """The settings and data fingerprint with which a run began, and what its set-up measured."""

    config: dict[str, Any]
    data: str
    measured: dict[str, Any]


def recorded_run(run_dir: Path) -> tuple[RecordedRun | None, list[str]]:
    """Return what the newest checkpoint with a sound state.json records of its run, and what config.json lacks of it.

    config.json, which anybody may edit, counts only if no checkpoint can tell. Return None if there is no record, and
    raise InputError if it and every checkpoint's are damaged.
    """
    checkpoints = list_checkpoints(run_dir)
    path, fault, recorded = run_dir / CONFIG_FILE, "missing", None
    try:
        content = read_own_json(path, FORM, remedy="checkpoints tell the settings, too")
        if content is not None:
            recorded = _recorded(content)
    except InputError as error:
        fault = str(error)
    for checkpoint in reversed(checkpoints):
        state = sealed_state(checkpoint)
        if state is None or misfit(state, FORM) is not None:
            continue
        begun = _recorded(state)
        if recorded is None:
            return begun, [f"{path}: {fault.removeprefix(f'{path}: ')}; written again from {checkpoint.name}"]
        if differing(recorded.config, begun.config) or recorded.data != begun.data:
            return begun, [f"{path}: differs from what {checkpoint.name} was trained with; written again from there"]
        return RecordedRun(begun.config, begun.data, recorded.measured), []  # of what did not fit, it is forgotten
    if recorded is None and checkpoints:
        raise InputError(
            f"{path}: {fault.removeprefix(f'{path}: ')}; and no checkpoint in {run_dir} tells what run this is: put "
            "the file back, choose another --run-dir, or start afresh with --no-resume"
        )
    return recorded, []


def _recorded(content: dict[str, Any]) -> RecordedRun:
    config = content["config"] | {"model": with_current_names(content["config"]["model"])}
    measurements: Any = content.get("found")
    measured = {} if misfit(measurements, MEASURED) else {name: measurements[name] for name in MEASURED}
    if misfit(measurements, {"attention": dict}) is None:
        measured["attention"] = measurements["attention"]
    return RecordedRun(config, content["data"], measured)


def refuse_another_run(run_dir: Path, recorded: RecordedRun, config: Config, fingerprint: str) -> None:
    """Raise InputError, naming each difference, if these settings or data are not those of the recorded run."""
    differences = differing(recorded.config, config.to_json())
    if recorded.data != fingerprint:
        was = recorded.data[:12]
        differences.append(f"--data.dir holds other tokens (fingerprint {fingerprint[:12]}, was {was})")
    if differences:
        raise InputError(
            f"{run_dir}: is another run: {'; '.join(differences)}; "
            "choose another --run-dir, or give the values it began with"
        )


def refuse_disagreement(config: Config, fingerprint: str, group: ProcessGroup) -> None:
    """Raise InputError on all ranks if settings, data or torch differ between ranks. Collective."""
    settings = flat(config.to_json()) | {"data fingerprint": fingerprint, "torch version": torch.__version__}
    first = group.on_main(lambda: settings)

    def refuse() -> None:
        differences = [
            f"{name} {settings.get(name)} (rank 0: {value})"
            for name, value in first.items()
            if settings.get(name) != value
        ]
        if differences:
            raise InputError(f"was started differently: {'; '.join(differences)}")

    group.on_all(refuse)


def flat(values: dict[str, Any], prefix: str = "--") -> dict[str, Any]:
    """Return nested settings by the names of their flags."""
    settings: dict[str, Any] = {}
    for name, value in values.items():
        flag = prefix + name.replace("_", "-")
        value = list(value) if isinstance(value, tuple) else value  # as JSON gives it back
        settings |= flat(value, flag + ".") if isinstance(value, dict) else {flag: value}
    return settings


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the flag, new value and old value of each identity field that differs between two configurations.

    A field that a recorded configuration lacks, because the field is newer, has its default.
    """
    defaults = flat(Config().to_json())
    was, now = defaults | flat(old), defaults | flat(new)
    flags = [flag for prefix in IDENTITY for flag in sorted(was | now) if f"{flag}.".startswith(f"{prefix}.")]
    return [f"{flag} {now.get(flag)} (was {was.get(flag)})" for flag in flags if was.get(flag) != now.get(flag)]
