"""Evaluate a trained model: validation loss, perplexity, bits per byte, and HellaSwag.

    python train/validate.py runs/NAME                                     # on the run's own validation tokens
    python train/validate.py runs/NAME --step 500 --hellaswag data/hellaswag
    torchrun --local-addr=127.0.0.1 --nproc_per_node=8 train/validate.py runs/NAME --hellaswag data/hellaswag
    python train/validate.py FOLDER --data data/mine --out results         # a Hugging Face folder of a GPT-2

The numbers are the training loop's, up to the rounding of another layout or of compilation. In bf16, FSDP2 also rounds
the norms' weights. Every process holds the whole model, and they share the work. The command prints a table with
standard errors, and the whole report as JSON on the last line. Results are kept in RUN/evaluations (or --out) and not
computed again. HellaSwag is scored in the completion style (see train/evals/hellaswag.py); train/harness.py has the
style of lm-evaluation-harness.

1,000 items of HellaSwag take half a minute of a CPU core with a model of 4 layers x 128 and its own byte pairs.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.processes import parent_watch

parent_watch.remember()

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import tyro

from common.errors import InputError, one_line_errors, reading_from
from common.reading import require_place
from data_prep.manifest import open_split, read_manifest
from data_prep.tokenizer import gives_same_ids, load_tokenizer, name_of
from model.checkpoint import find_checkpoint
from model.costs.gpu_peaks import DType
from model.hf.folder import is_hugging_face
from train.evals.hellaswag import STYLE, HellaSwag, Score, ending_losses, open_hellaswag, score
from train.evals.results import read_result, write_result
from train.evals.subject import Subject, load_subject
from train.evals.validation import Scoring, Validation, ValidationSet, validate
from train.guards.data_check import check_data
from train.processes.group import ProcessGroup, open_process_group
from train.processes.stop_requests import StopRequests

TIMEOUT_SECONDS = 1800.0
LARGEST_EXPONENT = 700  # e^709 is the largest that a float holds


@dataclass(frozen=True)
class Options:
    """Validation loss, perplexity and bits per byte of a trained model, and its HellaSwag score."""

    path: Annotated[str, tyro.conf.Positional]
    """RUN directory, RUN@STEP, the path of one checkpoint, or a Hugging Face folder of a GPT-2."""
    step: int | None = None
    """Step of the checkpoint to load from the run; None: the newest."""
    data: Path | None = None
    """Data directory to validate on; None: the run's own, or no validation with --hellaswag."""
    split: str = "val"
    """Split of the data to validate on."""
    tokens: int | Literal["all"] | None = None
    """Tokens to validate on, from the start of the split; None: as many as the run does, else 10,485,760."""
    hellaswag: Path | None = None
    """Also score HellaSwag: the directory of data_prep/hellaswag.py, or a file in the original form."""
    items: int | None = None
    """Number of HellaSwag items to score, from the first on; None: all."""
    micro_batch: int | None = None
    """Sequences in one forward pass; None: as many as in the run, else 8."""
    dtype: DType | None = None
    """Precision of the matrix products; None: the run's, else fp32."""
    compile: bool = False
    """Compile the model block by block with torch.compile, as in training."""
    out: Path | None = None
    """Directory that keeps the results; None: RUN/evaluations, and nowhere for a Hugging Face folder."""
    verify: bool = True
    """First hold the split to the hashes and the vocabulary of its manifest."""


class StoppedError(Exception):
    """A signal came or the launcher died; raised on all ranks together."""


def check(options: Options) -> None:
    """Raise InputError for options that are out of range or do not go together."""
    for flag in ("tokens", "items", "micro_batch"):
        value = getattr(options, flag)
        if isinstance(value, int) and value < 1:
            raise InputError(f"--{flag.replace('_', '-')} {value} must be at least 1")
    if options.items is not None and options.hellaswag is None:
        raise InputError("--items counts HellaSwag's items; give --hellaswag too")
    if options.hellaswag is not None and options.data is None and (options.tokens, options.split) != (None, "val"):
        raise InputError("--tokens and --split choose validation tokens; with --hellaswag give --data too")


def choose_checkpoint(options: Options) -> Path | None:
    """Return the checkpoint to evaluate, or None for a Hugging Face folder."""
    is_folder = is_hugging_face(Path(options.path))
    if options.step is not None:
        if is_folder or "@" in options.path or not Path(options.path, "checkpoints").is_dir():
            raise InputError(f"--step {options.step} needs a run directory; {options.path} is no run directory")
        return find_checkpoint(f"{options.path}@{options.step}")
    return None if is_folder else find_checkpoint(options.path)


def open_validation(options: Options, subject: Subject) -> tuple[ValidationSet, dict[str, Any]] | None:
    """Return the validation tokens and the part of the report that describes them; None: no validation."""
    if options.data is None and options.hellaswag is not None:
        return None
    directory = options.data or subject.settings.data
    if directory is None:
        raise InputError(f"{options.path}: names no data; give --data or --hellaswag")
    with reading_from(directory):
        is_there = directory.is_dir()
    if options.data is None and not is_there:
        raise InputError(f"{directory}: the data of this run is not here; give --data or --hellaswag")
    manifest, tokenizer = read_manifest(directory), load_tokenizer(directory)
    if options.data is None and manifest.fingerprint != subject.settings.fingerprint:
        raise InputError(f"{directory}: the run was trained on other data; give --data {directory} to use it anyway")
    models_tokenizer = subject.trained.tokenizer
    if not gives_same_ids(tokenizer, models_tokenizer):
        raise InputError(
            f"--data {directory}: its tokenizer is {name_of(tokenizer)}, the model's is {name_of(models_tokenizer)}; "
            "prepare the data with the model's"
        )
    tokens = subject.settings.tokens if options.tokens is None else options.tokens
    data = ValidationSet(
        open_split(directory, options.split),
        seq_len=subject.trained.model.config.context_len,
        micro_batch=subject.micro_batch,
        num_tokens=None if tokens == "all" else tokens,
        byte_lengths=models_tokenizer.byte_lengths(),
    )
    source = {"data": manifest.fingerprint, "split": options.split, "tokens": data.num_tokens}
    return data, {"directory": str(directory), **source}


def open_questions(options: Options, subject: Subject) -> HellaSwag | None:
    """Return HellaSwag's questions in the model's tokens, or None without --hellaswag."""
    if options.hellaswag is None:
        return None
    context_len = subject.trained.model.config.context_len
    return open_hellaswag(
        options.hellaswag,
        subject.trained.tokenizer,
        context_len=context_len,
        batch_tokens=subject.micro_batch * context_len,
        fixed_shapes=options.compile,
        most=options.items,
    )


def evaluate(options: Options, group: ProcessGroup, stop_requests: StopRequests) -> dict[str, Any]:
    """Return the report of all evaluations. Raise InputError on all ranks before any scoring. Collective."""
    if (out := options.out) is not None:
        group.on_main(lambda: require_place(out))
    checkpoint = group.on_main(lambda: choose_checkpoint(options))  # by one rank: a run may be writing the next
    subject = group.on_all(
        lambda: load_subject(
            checkpoint or options.path,
            is_checkpoint=checkpoint is not None,
            dtype=options.dtype,
            micro_batch=options.micro_batch,
            compiled=options.compile,
            out=options.out,
            device=group.device,
        )
    )
    if len(set(group.gather(subject.key["weights"]))) > 1:
        raise InputError(f"{options.path}: the processes read different weights there; is it one directory for all?")
    trained = subject.trained
    validation = group.on_all(lambda: open_validation(options, subject))
    hellaswag = group.on_all(lambda: open_questions(options, subject))
    if validation is not None and options.verify:
        hold_to_manifest(Path(validation[1]["directory"]), options.split, group, stop_requests)
    at_step = "" if trained.step is None else f" at step {trained.step:,}"
    at_step += ", the mean of its weights" if trained.is_averaged else ""
    log(group, f"{options.path}{at_step}, {subject.key['dtype']}, processes: {group.world}, {group.device.type}")
    scoring = Scoring(group, stop_requests, progress_of(group))
    report = {"model": str(trained.checkpoint), "step": trained.step, "averaged": trained.is_averaged, **subject.key}
    report |= {"validation": None, "hellaswag": None}
    if validation is not None:
        report["validation"] = report_validation(subject, *validation, scoring)
    if hellaswag is not None:
        report["hellaswag"] = report_hellaswag(subject, hellaswag, scoring)
    return report


def hold_to_manifest(directory: Path, split: str, group: ProcessGroup, stop_requests: StopRequests) -> None:
    """Raise InputError on all ranks unless a split is what its manifest says. Collective."""
    manifest = group.on_all(lambda: read_manifest(directory))
    reason = check_data(directory, manifest, [split], group=group, stop_requests=stop_requests, flag="--no-verify")
    if reason is not None:
        raise StoppedError


def report_validation(
    subject: Subject, data: ValidationSet, source: dict[str, Any], scoring: Scoring
) -> dict[str, Any]:
    """Return the validation results, new or kept, after printing them."""
    group = scoring.group
    key = subject.key | {name: source[name] for name in ("data", "split", "tokens")}
    path = subject.path_of("validation", key)
    result = kept = group.on_main(lambda: read_result(path, key, Validation))
    if result is None:
        result = validate(subject.loss_model, data, scoring)
    if result is None:
        raise StoppedError
    perplexity = math.exp(result.loss) if not result.loss > LARGEST_EXPONENT else math.inf
    perplexity_stderr = None if result.stderr is None else perplexity * result.stderr  # d exp(x) = exp(x) dx
    rows = {
        "loss": (result.loss, result.stderr),
        "perplexity": (perplexity, perplexity_stderr),
        "bits per byte": (result.bits_per_byte, result.bits_per_byte_stderr),
    }
    log(group, f"validation  {source['directory']}, {source['split']}{'' if kept is None else f'; from {path}'}")
    log(group, table_of(rows, tokens=result.tokens))
    if kept is None:  # after the table, since the directory may belong to somebody else
        group.on_main(lambda: write_result(path, key, asdict(result)))
    return source | asdict(result) | {"perplexity": perplexity, "perplexity_stderr": perplexity_stderr}


def report_hellaswag(subject: Subject, data: HellaSwag, scoring: Scoring) -> dict[str, Any]:
    """Return the HellaSwag score, new or kept, after printing it."""
    group = scoring.group
    questions = {"questions": data.fingerprint()}
    key = subject.key | questions
    path = subject.path_of("hellaswag", key)
    result = kept = group.on_main(lambda: read_result(path, key, Score))
    if result is None:
        losses_Q4 = ending_losses(subject.loss_model, data, scoring)
        if losses_Q4 is None:
            raise StoppedError
        result = score(data.questions, losses_Q4)
    rows = {"acc": (result.acc, result.acc_stderr), "acc_norm": (result.acc_norm, result.acc_norm_stderr)}
    log(group, f"hellaswag   {STYLE}{'' if kept is None else f'; from {path}'}")
    log(group, "\n".join(f"  note: {remark}" for remark in data.remarks) or "  the whole pinned set")
    log(group, table_of(rows, items=result.items))
    values = asdict(result) | {"style": STYLE, "remarks": list(data.remarks)}
    if kept is None:
        group.on_main(lambda: write_result(path, key, values))
    return questions | values


def table_of(rows: dict[str, tuple[float, float | None]], **counts: int) -> str:
    """Return a line for each number with its standard error, and one for each count."""
    errors = {name: "" if stderr is None else f" +- {stderr:.4f}" for name, (_, stderr) in rows.items()}
    lines = [f"  {name:<16}{value:>12.4f}{errors[name]}" for name, (value, _) in rows.items()]
    return "\n".join([*lines, *(f"  {name:<16}{count:>12,}" for name, count in counts.items())])


def log(group: ProcessGroup, text: str) -> None:
    if group.is_main:
        print(text, flush=True)


def progress_of(group: ProcessGroup) -> Callable[[str], None]:
    """Return a function that shows the progress at a terminal, on one line that it overwrites."""
    is_shown = group.is_main and sys.stderr.isatty()
    return lambda text: print(f"  {text}", end="\r", file=sys.stderr, flush=True) if is_shown else None


def null_where_not_finite(value: Any) -> Any:
    """Return the report with None for infinity and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: null_where_not_finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors("validate"):
        options = tyro.cli(Options, args=args, description=__doc__)
        check(options)
        reasons: list[str | None] = []
        with open_process_group(TIMEOUT_SECONDS, Path(tempfile.gettempdir()), program="validate") as group:
            with StopRequests(None, is_main=group.is_main) as stop_requests:
                try:
                    log(group, json.dumps(null_where_not_finite(evaluate(options, group, stop_requests))))
                except StoppedError:
                    reasons = [reason for reason in group.gather(stop_requests.reason) if reason]
            group.barrier()  # launchers kill the rest when the first process exits
        if reasons:
            if group.is_main:
                print(
                    f"validate: stopped ({reasons[0]}); the same command starts again what was not finished",
                    file=sys.stderr,
                )
            sys.exit(1)


if __name__ == "__main__":
    main()
