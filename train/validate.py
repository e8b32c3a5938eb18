"""What a trained model is worth: validation loss, perplexity, bits per byte, and HellaSwag.

    python train/validate.py runs/NAME                                     # on the run's own validation tokens
    python train/validate.py runs/NAME --step 500 --hellaswag data/hellaswag
    torchrun --nproc_per_node=8 train/validate.py runs/NAME --data data/other --tokens all --hellaswag data/hellaswag
    python train/validate.py FOLDER --data data/mine --out results         # a Hugging Face folder of GPT-2's

As its training loop does it, with the same numbers but for the rounding of another layout or of compilation (in bf16
FSDP2 rounds the norms' weights too): on all processes, each with the whole model. Prints a table with
standard errors, and all of it as JSON in the last line. Results are kept in RUN/evaluations (or --out), and not
evaluated again. HellaSwag is scored in the completion style, which train/evals/hellaswag.py describes;
train/harness.py has lm-evaluation-harness's.

1,000 items of HellaSwag take a model of 4 layers x 128, with byte pairs of its own, half a minute of a CPU core.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.processes import parent_watch

parent_watch.remember()

import functools
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import tyro

from common.errors import InputError, one_line_errors
from data_prep.manifest import open_split, read_manifest
from data_prep.tokenizer import gives_same_ids, load_tokenizer, name_of
from model.checkpoint import TrainedModel, find_checkpoint, load_checkpoint, load_model, read_state
from model.costs.gpu_peaks import DType
from model.hf.folder import is_hugging_face
from train.config import TrainConfig, ValidateConfig
from train.evals.hellaswag import STYLE, HellaSwag, Score, ending_losses, open_hellaswag, score
from train.evals.results import FOLDER, Key, file_name, fingerprint_of, read_result, write_result
from train.evals.validation import Validation, ValidationSet, validate
from train.losses import LossModel
from train.parallel.apply import compile_parts
from train.parallel.precision import COMPUTE_DTYPES, set_numerics
from train.processes.group import ProcessGroup, open_process_group
from train.processes.stop_requests import StopRequests

TIMEOUT_SECONDS = 1800.0
LARGEST_EXPONENT = 700  # e^709 is the largest that a float holds


@dataclass(frozen=True)
class Options:
    """Validation loss, perplexity and bits per byte of a trained model, and its HellaSwag score."""

    path: Annotated[str, tyro.conf.Positional]
    """RUN directory, RUN@STEP, the path of one checkpoint, or a Hugging Face folder of GPT-2's."""
    step: int | None = None
    """Of the run, the checkpoint of this step; None: the newest."""
    data: Path | None = None
    """Data directory to validate on; None: the run's own, or none at all with --hellaswag."""
    split: str = "val"
    """Of the data."""
    tokens: int | Literal["all"] | None = None
    """Tokens to validate on, from the start of the split; None: as many as the run does, else 10,485,760."""
    hellaswag: Path | None = None
    """Score HellaSwag, too: data_prep/hellaswag.py's directory, or a file in the original form."""
    items: int | None = None
    """The first so many of its items; None: all."""
    micro_batch: int | None = None
    """Sequences of one forward pass; None: the run's, else 8."""
    dtype: DType | None = None
    """Of the products; None: what the run trained in, else fp32."""
    compile: bool = False
    """torch.compile, block by block, as in training."""
    out: Path | None = None
    """The directory that keeps results; None: RUN/evaluations, and for a Hugging Face folder nowhere."""


@dataclass(frozen=True)
class Settings:
    """How the run that a model is of computes and validates, or what stands for that where there was none."""

    dtype: DType = "fp32"
    micro_batch: int = 8
    is_chunked: bool = True
    deterministic: bool = False
    tokens: int | None = ValidateConfig.tokens
    data: Path | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Subject:
    """The model, ready, and what its results are kept under."""

    trained: TrainedModel
    settings: Settings
    loss_model: LossModel
    out: Path | None
    key: dict[str, Any]

    def path_of(self, kind: str, key: Key) -> Path | None:
        """Return the file that keeps the result of such an evaluation; None: it is not kept."""
        return None if self.out is None else self.out / file_name(kind, self.trained.step, key)


def settings_of(checkpoint: Path) -> Settings:
    """From its state.json."""
    try:
        state = read_state(checkpoint)
        config = state["config"]
        train, tokens = config["train"], config["validate"]["tokens"]
        micro_batch = Settings.micro_batch if train["micro_batch"] == "auto" else train["micro_batch"]
        if (
            train["dtype"] not in COMPUTE_DTYPES
            or type(micro_batch) is not int
            or type(tokens) not in (int, type(None))
        ):
            raise TypeError(f"{train['dtype']!r}, {micro_batch!r}, {tokens!r}")
        return Settings(
            dtype=train["dtype"],
            micro_batch=micro_batch,
            is_chunked=train["loss"] == "chunked",
            deterministic=bool(train["deterministic"]),
            tokens=tokens,
            data=Path(config["data"]["dir"]),
            fingerprint=state["data"],
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{checkpoint}: its state.json has no configuration of this code ({error!r})") from error


def check(options: Options) -> None:
    for flag in ("tokens", "items", "micro_batch"):
        value = getattr(options, flag)
        if isinstance(value, int) and value < 1:
            raise InputError(f"--{flag.replace('_', '-')} {value} must be at least 1")
    if options.items is not None and options.hellaswag is None:
        raise InputError("--items counts HellaSwag's; give --hellaswag too")
    if options.hellaswag is not None and options.data is None and (options.tokens, options.split) != (None, "val"):
        raise InputError("--tokens and --split are of the data to validate on; with --hellaswag give --data too")


def find(options: Options) -> Path | None:
    """The checkpoint to evaluate; None: a Hugging Face folder."""
    is_folder = is_hugging_face(Path(options.path))
    if options.step is not None and (
        is_folder or "@" in options.path or not Path(options.path, "checkpoints").is_dir()
    ):
        raise InputError(f"--step {options.step}: {options.path} is no run directory, of which there may be more steps")
    if is_folder:
        return None
    return find_checkpoint(options.path if options.step is None else f"{options.path}@{options.step}")


def prepare(options: Options, checkpoint: Path | None, group: ProcessGroup) -> Subject:
    """Load the model. InputError for whatever is unusable; on each rank, without collectives."""
    settings = Settings() if checkpoint is None else settings_of(checkpoint)
    dtype = options.dtype or settings.dtype
    set_numerics(TrainConfig(dtype=dtype, deterministic=settings.deterministic), group.device)
    load = functools.partial(load_model if checkpoint is None else load_checkpoint, checkpoint or Path(options.path))
    trained = load(device=group.device, dtype=COMPUTE_DTYPES[dtype])
    loss_model = LossModel(trained.model, chunked=settings.is_chunked, compiled=options.compile)
    if options.compile:
        compile_parts(trained.model)
    out = options.out
    if out is None and checkpoint is not None:
        out = checkpoint.resolve().parents[1] / FOLDER
    key = {"weights": fingerprint_of(trained.model), "dtype": dtype}
    return Subject(trained, settings, loss_model, out, key)


def evaluate(options: Options, group: ProcessGroup, stop_requests: StopRequests) -> dict[str, Any]:
    """All that was asked for. Collective. InputError, on all ranks, before anything is scored if some of it is bad."""
    checkpoint = group.on_main(lambda: find(options))  # by one, while a run may be writing the next
    subject = group.on_all(lambda: prepare(options, checkpoint, group))
    if len(set(group.gather(subject.key["weights"]))) > 1:
        raise InputError(f"{options.path}: the processes read different weights there; is it one directory for all?")
    trained = subject.trained
    validation = group.on_all(lambda: open_validation(options, subject))
    hellaswag = group.on_all(lambda: open_items_for(options, subject))
    at_step = "" if trained.step is None else f" at step {trained.step:,}"
    say(group, f"{options.path}{at_step}, {subject.key['dtype']}, processes: {group.world}, {group.device.type}")
    report = {"model": str(trained.checkpoint), "step": trained.step, **subject.key}
    report |= {"validation": None, "hellaswag": None}
    if validation is not None:
        report["validation"] = validated(subject, *validation, group, stop_requests)
    if hellaswag is not None:
        report["hellaswag"] = answered(subject, hellaswag, group, stop_requests)
    return report


def say(group: ProcessGroup, text: str) -> None:
    if group.is_main:
        print(text, flush=True)


# --- Validation -------------------------------------------------------------------------------------------------------


def open_validation(options: Options, subject: Subject) -> tuple[ValidationSet, dict[str, Any]] | None:
    """What to validate on and what it is; None: nothing was asked for."""
    directory = options.data
    if directory is None and options.hellaswag is not None:
        return None
    if directory is None:
        directory = subject.settings.data
        if directory is None:
            raise InputError(f"{options.path}: says of no data; give --data or --hellaswag")
        if not directory.is_dir():
            raise InputError(f"{directory}: the data of this run is not here; give --data or --hellaswag")
    manifest, tokenizer = read_manifest(directory), load_tokenizer(directory)
    if options.data is None and manifest.fingerprint != subject.settings.fingerprint:
        raise InputError(
            f"{directory}: other data than this run was trained on; --data {directory} takes it all the same"
        )
    ours = subject.trained.tokenizer
    if not gives_same_ids(tokenizer, ours):
        raise InputError(
            f"--data {directory}: its tokenizer is {name_of(tokenizer)}, the model's is {name_of(ours)}; "
            "prepare the data with the model's"
        )
    given = options.tokens if options.tokens is not None else subject.settings.tokens
    data = ValidationSet(
        open_split(directory, options.split),
        seq_len=subject.trained.model.config.context_len,
        micro_batch=options.micro_batch or subject.settings.micro_batch,
        num_tokens=None if given == "all" else given,
        byte_lengths=ours.byte_lengths(),
    )
    about = {"data": manifest.fingerprint, "split": options.split, "tokens": data.num_tokens}
    return data, {"directory": str(directory), **about}


def validated(
    subject: Subject, data: ValidationSet, about: Mapping[str, Any], group: ProcessGroup, stop_requests: StopRequests
) -> dict[str, Any]:
    """Return the report on the validation tokens, whose result is kept, or was."""
    key = subject.key | {name: about[name] for name in ("data", "split", "tokens")}
    path = subject.path_of("validation", key)
    result = kept = group.on_main(lambda: read_result(path, key, Validation))
    if result is None:
        result = validate(
            subject.loss_model, data, group=group, stop_requests=stop_requests, heartbeat=progress_of(group)
        )
    if result is None:
        raise StoppedError
    values = asdict(result) | with_perplexity(result)
    say(group, f"validation  {about['directory']}, {about['split']}{'' if kept is None else f'; from {path}'}")
    say(group, table_of({name: (values[name], values[error]) for name, error in VALIDATION_ROWS.items()}))
    say(group, f"  {'tokens':<16}{result.tokens:>12,}")
    if kept is None:  # after the table: the directory may be another's to write
        group.on_main(lambda: write_result(path, key, asdict(result)))
    return dict(about) | values


VALIDATION_ROWS = {"loss": "stderr", "perplexity": "perplexity_stderr", "bits_per_byte": "bits_per_byte_stderr"}


def with_perplexity(found: Validation) -> dict[str, float | None]:
    """e^loss, and its standard error: that of the loss times the slope."""
    perplexity = math.exp(found.loss) if not found.loss > LARGEST_EXPONENT else math.inf
    return {
        "perplexity": perplexity,
        "perplexity_stderr": None if found.stderr is None else perplexity * found.stderr,
    }


def table_of(rows: Mapping[str, tuple[float, float | None]]) -> str:
    """A line for each number and its standard error."""
    lines = []
    for name, (value, stderr) in rows.items():
        error = "" if stderr is None else f" +- {stderr:.4f}"
        lines.append(f"  {name.replace('_', ' ') if name != 'acc_norm' else name:<16}{value:>12.4f}{error}")
    return "\n".join(lines)


# --- HellaSwag --------------------------------------------------------------------------------------------------------


def open_items_for(options: Options, subject: Subject) -> HellaSwag | None:
    if options.hellaswag is None:
        return None
    context_len = subject.trained.model.config.context_len
    return open_hellaswag(
        options.hellaswag,
        subject.trained.tokenizer,
        context_len=context_len,
        batch_tokens=(options.micro_batch or subject.settings.micro_batch) * context_len,
        fixed_shapes=options.compile,
        most=options.items,
    )


def answered(subject: Subject, data: HellaSwag, group: ProcessGroup, stop_requests: StopRequests) -> dict[str, Any]:
    """Return the report on HellaSwag, whose result is kept, or was."""
    questions = {"questions": data.fingerprint()}
    key = subject.key | questions
    path = subject.path_of("hellaswag", key)
    result = kept = group.on_main(lambda: read_result(path, key, Score))
    if result is None:
        losses_Q4 = ending_losses(
            subject.loss_model, data, group=group, stop_requests=stop_requests, heartbeat=progress_of(group)
        )
        if losses_Q4 is None:
            raise StoppedError
        result = score(data.questions, losses_Q4)
    values = asdict(result) | {"style": STYLE, "remarks": list(data.remarks)}
    say(group, f"hellaswag   {STYLE}{'' if kept is None else f'; from {path}'}")
    say(group, "\n".join(f"  note: {remark}" for remark in data.remarks) or "  the whole pinned set")
    say(
        group, table_of({"acc": (result.acc, result.acc_stderr), "acc_norm": (result.acc_norm, result.acc_norm_stderr)})
    )
    say(group, f"  {'items':<16}{result.items:>12,}")
    if kept is None:
        group.on_main(lambda: write_result(path, key, values))
    return questions | values


def progress_of(group: ProcessGroup) -> Callable[[str], None]:
    """Return what shows, where a person waits at a terminal, how far it is, on a line that the next one replaces."""
    is_shown = group.is_main and sys.stderr.isatty()
    return lambda where: print(f"  {where}", end="\r", file=sys.stderr, flush=True) if is_shown else None


def null_where_not_finite(value: Any) -> Any:
    """JSON has no word for infinity, nor for what is no number."""
    if isinstance(value, dict):
        return {name: null_where_not_finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class StoppedError(Exception):
    """By a signal, or because the launcher died; on all ranks together."""


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors("validate"):
        options = tyro.cli(Options, args=args, description=__doc__)
        check(options)
        reasons: list[str | None] = []
        with open_process_group(TIMEOUT_SECONDS, Path(tempfile.gettempdir()), program="validate") as group:
            with StopRequests(None, is_main=group.is_main) as stop_requests:
                try:
                    say(group, json.dumps(null_where_not_finite(evaluate(options, group, stop_requests))))
                except StoppedError:
                    reasons = [reason for reason in group.gather(stop_requests.reason) if reason]
            group.barrier()  # launchers kill the rest when the first process exits
        if reasons:
            if group.is_main:
                print(f"validate: stopped ({reasons[0]}); the same command does what is left", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
