"""The precision a run computes with: dtypes, the TF32 policy, determinism, and the loss scale that fp16 needs."""

import os

import torch
from torch import Tensor

from common.errors import InputError
from train.config import TrainConfig

# torch.amp.GradScaler's constants: where the scale starts, and after how many good steps it doubles.
FIRST_LOSS_SCALE = 65536.0
STEPS_TO_DOUBLE = 2000

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """Return the dtype of the residual stream and of matrix products."""
    return COMPUTE_DTYPES[config.dtype]


def set_numerics(config: TrainConfig, device: torch.device) -> None:
    """Set torch's global switches for this run, whatever they were.

    TF32 is on with --train.dtype tf32 and off otherwise. --train.deterministic admits only kernels that add in a fixed
    order (an operation that has none raises), and makes cuBLAS keep one workspace per stream.
    """
    if device.type == "cuda":
        if config.dtype == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise InputError(f"{torch.cuda.get_device_name(device)} has no bf16; use fp16 (--train.dtype, or --dtype)")
        torch.backends.cuda.matmul.allow_tf32 = config.dtype == "tf32"
        torch.backends.cudnn.allow_tf32 = config.dtype == "tf32"
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS, "Results reproducibility"
    if torch.are_deterministic_algorithms_enabled() != config.deterministic:  # asked first: setting loads the compiler
        torch.use_deterministic_algorithms(config.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads memory it did not write


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2), on the device: no step waits for it.

    The loss is multiplied by `scale` before the backward pass, so that small gradients do not vanish in fp16. A step
    whose gradients overflow is skipped and halves the scale; STEPS_TO_DOUBLE good steps in a row double it.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), FIRST_LOSS_SCALE, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, is_finite: Tensor, frozen: Tensor) -> None:
        """Adapt the scale after a step whose gradient was finite or not; `frozen` (bool scalar) changes nothing."""
        good_steps = (self.good_steps + 1) * is_finite
        doubles = good_steps >= STEPS_TO_DOUBLE
        factor = torch.where(is_finite, torch.where(doubles, 2.0, 1.0), 0.5)
        self.scale.mul_(torch.where(frozen, 1.0, factor))
        self.good_steps.copy_(torch.where(frozen, self.good_steps, good_steps * ~doubles))

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps of the scale, by name."""
        return {"loss_scale.scale": self.scale, "loss_scale.good_steps": self.good_steps}
