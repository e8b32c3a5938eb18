"""README.md of an exported model: what it is, and what its run directory says of data, command and results."""

import json
import shlex
from pathlib import Path
from typing import Any

from common.errors import InputError, reading_from
from data_prep.manifest import FILE_NAME, Manifest, read_manifest
from model.checkpoint import TrainedModel

NUM_FILES_NAMED = 20  # of the data's
FRONT_MATTER = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", ""]
OF_DOCUMENTS = (
    "A document begins with token {eot_id}, `tokenizer.bos_token_id`: give it before a prompt. Text that reads "
    "`<|endoftext|>` is ordinary text to this tokenizer."
)


def model_card(trained: TrainedModel, name: str, described: list[str]) -> str:
    """The whole file; `described` are lines on shape and tokenizer."""
    config, run_dir = trained.model.config, trained.checkpoint.resolve().parents[1]
    run = _record(run_dir / "config.json")
    vocabularies = 1 if config.tie else 2
    num_parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    num_parameters -= vocabularies * (config.padded_vocab_size - config.vocab_size) * config.width
    about = f"A GPT-2 of {num_parameters:,} parameters: step {trained.step} of the run `{run_dir.name}` of GPT Ladder."
    of_documents = [] if config.eot_id is None else ["", OF_DOCUMENTS.format(eot_id=config.eot_id)]
    sections = {
        f"# {name}": [about, "", *(f"  {line}" for line in described), *of_documents],
        "## Data": _data_lines(run),
        "## Command": _command_lines(run, _record(run_dir / "provenance.json")),
        "## Results": _result_lines(run_dir / "metrics.jsonl", trained.step),
    }
    return "\n".join([*FRONT_MATTER, *(line for title, lines in sections.items() for line in (title, "", *lines, ""))])


def _data_lines(run: dict[str, Any]) -> list[str]:
    """The fingerprint, and what the manifest says, where the data is still there and still the same."""
    fingerprint = run.get("data")
    manifest = _manifest(Path(run["config"]["data"]["dir"]), fingerprint) if "config" in run else None
    lines = [f"Fingerprint `{fingerprint}`."]
    if manifest is None:
        return [*lines, "Its data directory was not there, or not the same, when this was written."]
    source = dict(manifest.source)
    files = source.pop("files", [])
    lines += ["", *(f"- {split}: {info.tokens:,} tokens" for split, info in manifest.splits.items())]
    lines += [f"- {key}: {value}" for key, value in source.items() if isinstance(value, str)]
    lines += [f"- `{file['name']}`, sha256 `{file['sha256']}`" for file in files[:NUM_FILES_NAMED]]
    return lines + ([f"- and {len(files) - NUM_FILES_NAMED:,} more files"] if len(files) > NUM_FILES_NAMED else [])


def _manifest(data_dir: Path, fingerprint: str | None) -> Manifest | None:
    if not (data_dir / FILE_NAME).is_file():
        return None
    try:
        manifest = read_manifest(data_dir)
    except InputError:  # damaged since, which is nothing that this model could not do without
        return None
    return manifest if manifest.fingerprint == fingerprint else None


def _command_lines(run: dict[str, Any], provenance: dict[str, Any]) -> list[str]:
    if "command" not in provenance:
        return ["Not recorded."]
    program, *arguments = shlex.split(provenance["command"])
    changed = " with changes that were not committed" if provenance["changes"] else ""
    origin = run.get("config", {}).get("from_checkpoint")
    return [
        *([] if origin is None else [f"Fine-tuned from the weights of `{Path(origin).name}`.", ""]),
        "    " + shlex.join([Path(program).name, *arguments]),
        "",
        f"Commit {provenance['commit']}{changed}, torch {provenance['torch']}, {provenance['dtype']}, "
        f"processes: {provenance['world']}.",
    ]


def _result_lines(path: Path, step: int | None) -> list[str]:
    """The last validation and the last HellaSwag score up to the step that is exported."""
    with reading_from(path):
        content = path.read_bytes() if path.is_file() else b""
    try:
        whole_lines = content.decode("utf-8").split("\n")[:-1]
        known = [row for row in map(json.loads, whole_lines) if row["step"] <= step]
        rows = [row for row in known if "val_loss" in row]
        scored = [_score_line(row) for row in known if "hellaswag_acc" in row][-1:]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); the model card is made of it") from error
    if not rows:
        return ["Not validated.", *scored]
    last = rows[-1]
    error_of_mean = "" if last["val_loss_stderr"] is None else f" +- {last['val_loss_stderr']:.4f}"
    return [
        "| step | tokens | validation loss | bits per byte |",
        "|---|---|---|---|",
        f"| {last['step']:,} | {last['tokens']:,} | {last['val_loss']:.4f}{error_of_mean} "
        f"| {last['val_bits_per_byte']:.4f} |",
        *scored,
    ]


def _score_line(row: dict[str, Any]) -> str:
    shares = (
        f"{name} nan"
        if row[f"hellaswag_{name}"] is None
        else f"{name} {row[f'hellaswag_{name}']:.4f}"
        + ("" if row[f"hellaswag_{name}_stderr"] is None else f" +- {row[f'hellaswag_{name}_stderr']:.4f}")
        for name in ("acc", "acc_norm")
    )
    return (
        f"\nHellaSwag, {row['hellaswag_items']:,} items in the completion style, at step {row['step']:,}: "
        f"{', '.join(shares)} (by the mean loss per token)."
        + ("" if row["hellaswag_pinned"] else " Not the whole validation set, so it compares with nobody's score.")
    )


def _record(path: Path) -> dict[str, Any]:
    """A run's own file; empty where a checkpoint was copied here without its run."""
    with reading_from(path):
        if not path.is_file():
            return {}
        content = path.read_bytes()
    try:
        found: dict[str, Any] = json.loads(content)
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); the model card is made of it") from error
    return found
