"""The model that train/validate.py evaluates, with the settings of the run that trained it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.compile_cache import take_compile_cache
from common.errors import InputError
from common.reading import Form, misfit
from model.checkpoint import TrainedModel, load_checkpoint, load_model, read_state
from model.costs.gpu_peaks import DType
from train.config import TrainConfig, ValidateConfig
from train.evals.results import FOLDER, Key, file_name, fingerprint_of
from train.losses import LossModel
from train.parallel.apply import compile_parts
from train.parallel.precision import COMPUTE_DTYPES, set_numerics

# What is read of a run's configuration here.
CONFIG_FORM: Form = {
    "train": {
        "dtype": frozenset(COMPUTE_DTYPES),
        "micro_batch": (frozenset({"auto"}), range(1, 2**31)),
        "loss": frozenset({"plain", "chunked"}),
        "deterministic": bool,
    },
    "validate": {"tokens": (None, range(1, 2**63))},
    "data": {"dir": str},
}


@dataclass(frozen=True)
class Settings:
    """Settings that a model's run computes and validates with; the defaults are for a model without a run."""

    dtype: DType = "fp32"
    micro_batch: int = 8
    chunk_tokens: int | None = TrainConfig.loss_chunk_tokens
    deterministic: bool = False
    tokens: int | None = ValidateConfig.tokens
    data: Path | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Subject:
    """A loaded model, the settings of its run, and the key and directory of its results."""

    trained: TrainedModel
    settings: Settings
    loss_model: LossModel
    micro_batch: int
    out: Path | None
    key: dict[str, Any]

    def path_of(self, kind: str, key: Key) -> Path | None:
        """Return the file that keeps a result, or None if results are not kept."""
        return None if self.out is None else self.out / file_name(kind, self.trained.step, key)


def settings_of(checkpoint: Path) -> Settings:
    """Return the settings in a checkpoint's state.json. Raise InputError if this code does not know them."""
    state = read_state(checkpoint)
    config = state["config"]
    fault = misfit(config, CONFIG_FORM)
    if fault is not None:
        raise InputError(f"{checkpoint}: its state.json has no configuration of this code ({fault})")
    train = config["train"]
    return Settings(
        dtype=train["dtype"],
        micro_batch=Settings.micro_batch if train["micro_batch"] == "auto" else train["micro_batch"],
        chunk_tokens=Settings.chunk_tokens if train["loss"] == "chunked" else None,
        deterministic=train["deterministic"],
        tokens=config["validate"]["tokens"],
        data=Path(config["data"]["dir"]),
        fingerprint=state["data"],
    )


def load_subject(
    name: str | Path,
    *,
    is_checkpoint: bool,
    dtype: DType | None,
    micro_batch: int | None,
    compiled: bool,
    out: Path | None,
    device: torch.device,
) -> Subject:
    """Return a sound checkpoint or a Hugging Face folder as a loaded model; None stands for its run's setting.

    Raise InputError if anything is unusable. Needs no collectives.
    """
    if compiled:
        take_compile_cache()
    settings = settings_of(Path(name)) if is_checkpoint else Settings()
    dtype = dtype or settings.dtype
    set_numerics(TrainConfig(dtype=dtype, deterministic=settings.deterministic), device)
    load = load_checkpoint if is_checkpoint else load_model
    trained = load(Path(name), device=device, dtype=COMPUTE_DTYPES[dtype])
    loss_model = LossModel(trained.model, chunk_tokens=settings.chunk_tokens, compiled=compiled)
    if compiled:
        compile_parts(trained.model)
    if out is None and is_checkpoint:
        out = Path(name).resolve().parents[1] / FOLDER
    key = {"weights": fingerprint_of(trained.model), "dtype": dtype}
    return Subject(trained, settings, loss_model, micro_batch or settings.micro_batch, out, key)
