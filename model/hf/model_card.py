"""Write the README.md of an exported model: its shape, data, command and results, from its run directory."""

import shlex
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.reading import NATURAL, Form, is_there, parse_json, read_own_json, read_regular
from common.redaction import redacted_words
from data_prep.manifest import Manifest, read_manifest
from model.checkpoint import TrainedModel

CONFIG_FORM: Form = {"config": {"data": {"dir": str}}, "data": str}
PROVENANCE_FORM: Form = {
    **{"command": str, "torch": str, "dtype": str, "world": NATURAL},
    **dict.fromkeys(("commit", "changes"), (str, None)),
}
NUM_FILES_LISTED = 20  # data files that the card names
FRONT_MATTER = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", ""]
DOCUMENT_START_NOTE = (
    "A document begins with token {eot_id}, `tokenizer.bos_token_id`: put it before a prompt. This tokenizer treats "
    "the text `<|endoftext|>` as ordinary text."
)


def model_card(trained: TrainedModel, name: str, description: list[str]) -> str:
    """Return the text of the model card; `description` has lines about the shape and the tokenizer."""
    config, run_dir = trained.model.config, trained.checkpoint.resolve().parents[1]
    run = _read_record(run_dir / "config.json", CONFIG_FORM)
    vocabularies = 1 if config.tie else 2
    num_parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    num_parameters -= vocabularies * (config.padded_vocab_size - config.vocab_size) * config.width
    origin = f"A GPT-2 of {num_parameters:,} parameters: step {trained.step} of the run `{run_dir.name}` of GPT Ladder."
    if trained.is_averaged:
        origin += " Its weights are an exponential mean over the last steps, as in the results below."
    note = [] if config.eot_id is None else ["", DOCUMENT_START_NOTE.format(eot_id=config.eot_id)]
    sections = {
        f"# {name}": [origin, "", *(f"  {line}" for line in description), *note],
        "## Data": _data_lines(run),
        "## Command": _command_lines(run, run_dir / "provenance.json"),
        "## Results": _result_lines(run_dir / "metrics.jsonl", trained.step),
    }
    text = "\n".join([*FRONT_MATTER, *(line for title, lines in sections.items() for line in (title, "", *lines, ""))])
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # a path may hold bytes that are no UTF-8


def _data_lines(run: dict[str, Any]) -> list[str]:
    """Return the data's fingerprint, and the manifest's sizes and sources if the data is there and unchanged."""
    fingerprint = run.get("data")
    manifest = _manifest(Path(run["config"]["data"]["dir"]), fingerprint) if "config" in run else None
    lines = [f"Fingerprint `{fingerprint}`."]
    if manifest is None:
        return [*lines, "The data directory was missing or had changed when this card was written."]
    source = dict(manifest.source)
    files = source.pop("files", [])
    lines += ["", *(f"- {split}: {info.tokens:,} tokens" for split, info in manifest.splits.items())]
    lines += [f"- {key}: {value}" for key, value in source.items() if isinstance(value, str)]
    lines += [f"- `{file['name']}`, sha256 `{file['sha256']}`" for file in files[:NUM_FILES_LISTED]]
    return lines + ([f"- and {len(files) - NUM_FILES_LISTED:,} more files"] if len(files) > NUM_FILES_LISTED else [])


def _manifest(data_dir: Path, fingerprint: str | None) -> Manifest | None:
    """Return the manifest of the data, or None if it is missing, damaged or of other data."""
    try:
        manifest = read_manifest(data_dir)
    except InputError:  # The model can be exported without its data.
        return None
    return manifest if manifest.fingerprint == fingerprint else None


def _command_lines(run: dict[str, Any], path: Path) -> list[str]:
    provenance = _read_record(path, PROVENANCE_FORM)
    if not provenance:
        return ["Not recorded."]
    try:
        program, *arguments = redacted_words(shlex.split(provenance["command"]))
    except ValueError as error:
        raise InputError(f"{path}: damaged (its command: {error}); the model card needs it") from error
    changes = " with uncommitted changes" if provenance["changes"] else ""
    origin = run.get("config", {}).get("from_checkpoint")
    return [
        *([] if origin is None else [f"Fine-tuned from the weights of `{Path(origin).name}`.", ""]),
        "    " + shlex.join([Path(program).name, *arguments]),
        "",
        f"Commit {provenance['commit']}{changes}, torch {provenance['torch']}, {provenance['dtype']}, "
        f"processes: {provenance['world']}.",
    ]


def _result_lines(path: Path, step: int | None) -> list[str]:
    """Return the last validation and the last HellaSwag score at or before the exported step."""
    content = read_regular(path) if is_there(path) else b""
    try:
        complete_lines = content.decode("utf-8").split("\n")[:-1]
        return _results([row for row in map(parse_json, complete_lines) if row["step"] <= step])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error!r}); the model card needs it") from error


def _results(rows: list[dict[str, Any]]) -> list[str]:
    validations = [row for row in rows if "val_loss" in row]
    scores = [_score_line(row) for row in rows if "hellaswag_acc" in row][-1:]
    if not validations:
        return ["Not validated.", *scores]
    last = validations[-1]
    return [
        "| step | tokens | validation loss | bits per byte |",
        "|---|---|---|---|",
        f"| {last['step']:,} | {last['tokens']:,} | {_measured(last, 'val_loss')} | {last['val_bits_per_byte']:.4f} |",
        *scores,
    ]


def _score_line(row: dict[str, Any]) -> str:
    """Return one sentence about a HellaSwag score."""
    accuracies = ", ".join(f"{name} {_measured(row, f'hellaswag_{name}')}" for name in ("acc", "acc_norm"))
    note = " It is not comparable with published scores: the items are not the whole validation set."
    return (
        f"\nHellaSwag, {row['hellaswag_items']:,} items in the completion style, at step {row['step']:,}: "
        f"{accuracies} (by the mean loss per token).{'' if row['hellaswag_pinned'] else note}"
    )


def _measured(row: dict[str, Any], name: str) -> str:
    """Return a metric with its standard error if it has one; nan if it has no number."""
    value, error = row[name], row[f"{name}_stderr"]
    return "nan" if value is None else f"{value:.4f}" + ("" if error is None else f" +- {error:.4f}")


def _read_record(path: Path, form: Form) -> dict[str, Any]:
    """Return the content of a JSON file of the run; empty if the checkpoint was copied without its run."""
    return read_own_json(path, form, remedy="move it away to export without it") or {}
