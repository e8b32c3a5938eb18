"""Loss, tokens/s, MFU, memory and data wait: what one metrics row says of its step."""

import resource
import sys
import time
from typing import Any

import torch

from model.budget import budget
from train.config import Config

GIB = 2**30
# Dense bf16 peaks in FLOP/s, from NVIDIA's datasheets (A100 2021, H100 2023, H200 2024).
BF16_PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
}


def peak_flops(device: torch.device) -> float | None:
    """A known GPU's dense bf16 peak, or None: then MFU is null."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in BF16_PEAKS.items() if name.startswith(known)), None)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has used: allocated on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


class Meters:
    """Turns steps into metrics rows. Rates are means since the row before, validation and saving left out."""

    def __init__(self, config: Config, *, device: torch.device, world: int, step: int, seconds: float) -> None:
        self._batch_tokens = config.train.batch_tokens
        self._flops_per_token = budget(config.model).flops_per_token
        peak = peak_flops(device)
        self._peak_flops = None if peak is None or config.train.dtype != "bf16" else peak * world
        self._device = device
        self._elapsed = seconds
        self._since: float | None = None
        self._lap_step, self._lap_seconds = step, seconds
        self.data_wait_seconds = 0.0  # since this attempt began
        self._lap_data_wait = 0.0

    def start(self) -> None:
        self._since = time.perf_counter()

    def pause(self) -> None:
        """What follows, until `start`, is not training."""
        self._elapsed, self._since = self.seconds, None

    def waited_for_data(self, seconds: float) -> None:
        self.data_wait_seconds += seconds

    @property
    def seconds(self) -> float:
        """Seconds of training in all attempts."""
        return self._elapsed + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def row(
        self, *, step: int, tokens: int, seconds: float, data_wait_seconds: float, loss: float, lr: float, norm: float
    ) -> dict[str, Any]:
        """The record of the step that was done after `seconds` of training, and the start of the next lap."""
        num_steps, lap_seconds = step - self._lap_step, seconds - self._lap_seconds
        tokens_per_second = num_steps * self._batch_tokens / lap_seconds
        row = {
            "step": step,
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_second": round(tokens_per_second, 1),
            "mfu": self._mfu(tokens_per_second),
            "step_seconds": round(lap_seconds / num_steps, 6),
            "data_wait_fraction": round((data_wait_seconds - self._lap_data_wait) / lap_seconds, 4),
            "peak_memory_gib": round(peak_memory_gib(self._device), 3),
            "flops": tokens * self._flops_per_token,
        }
        self._lap_step, self._lap_seconds, self._lap_data_wait = step, seconds, data_wait_seconds
        return row

    def _mfu(self, tokens_per_second: float) -> float | None:
        if self._peak_flops is None:
            return None
        return round(tokens_per_second * self._flops_per_token / self._peak_flops, 4)
