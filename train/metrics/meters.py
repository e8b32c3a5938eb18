"""Measurements of a run: tokens/s, MFU, memory, data wait, and the time to the first step."""

import resource
import sys
import time
from typing import Any

import torch

from model.cost import model_cost
from model.costs.gpu_peaks import peak_flops
from train.config import Config
from train.run.checkpoints import Progress

GIB = 2**30


def device_peak_flops(config: Config, device: torch.device) -> float | None:
    """Return a device's peak FLOP/s at the run's dtype; None if it is unknown, so that MFU is null."""
    return peak_of(config, torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU")


def peak_of(config: Config, device_name: str) -> float | None:
    """Return the peak FLOP/s of a device by its name, or the one that --track.peak-tflops gives."""
    if config.track.peak_tflops is not None:
        return config.track.peak_tflops * 1e12
    return peak_flops(device_name, config.train.dtype)


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory that this process has used on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def memory_retries(device: torch.device) -> int | None:
    """Return how often the GPU's allocator freed its cache to allocate: above 0, memory is short."""
    return int(torch.cuda.memory_stats(device)["num_alloc_retries"]) if device.type == "cuda" else None


class Startup:
    """The time from the start of the program to its first step, by phase."""

    def __init__(self, started: float) -> None:
        """`started`: time.perf_counter() before the slow imports."""
        self._last = self.started = started
        self._phases: list[tuple[str, float]] = []
        self._is_over = False

    def done(self, phase: str) -> None:
        now = time.perf_counter()
        self._phases.append((phase, now - self._last))
        self._last = now

    def first_step(self) -> str | None:
        """Return the line about all phases after the first step; None after later ones."""
        if self._is_over:
            return None
        self.done("first step")
        self._is_over = True
        phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in self._phases)
        return f"first step done after {self._last - self.started:.1f} s: {phases}"


class Meters:
    """The clock of a run, which makes the metrics rows.

    Rates are means since the row before, without validation and saving.
    """

    def __init__(self, config: Config, progress: Progress, *, device: torch.device, world: int) -> None:
        """`progress`: with which this attempt begins."""
        self._flops_per_token = model_cost(config.model).flops_per_token
        self._total_tokens = config.train.total_tokens
        peak = device_peak_flops(config, device)
        self._peak_flops = None if peak is None else peak * world
        self._device = device
        self._elapsed = progress.seconds
        self._since: float | None = None
        self._lap_step, self._lap_tokens, self._lap_seconds = progress.step, progress.tokens, progress.seconds
        self.data_wait_seconds = 0.0  # since this attempt began
        self._lap_data_wait = 0.0

    def start(self) -> None:
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock of training until `start`."""
        self._elapsed, self._since = self.seconds, None

    def waited_for_data(self, seconds: float) -> None:
        self.data_wait_seconds += seconds

    @property
    def seconds(self) -> float:
        """Return the seconds of training in all attempts."""
        return self._elapsed + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def axes(self, *, step: int, tokens: int, seconds: float) -> dict[str, Any]:
        """Return the values against which any record can be plotted."""
        return {"step": step, "tokens": tokens, "seconds": round(seconds, 4), "flops": tokens * self._flops_per_token}

    def row(
        self,
        *,
        step: int,
        tokens: int,
        seconds: float,
        data_wait_seconds: float,
        loss: float | None,
        lr: float,
        norm: float | None,
    ) -> dict[str, Any]:
        """Return the record of a step done after `seconds` of training, and start the next lap."""
        num_steps, lap_seconds = step - self._lap_step, seconds - self._lap_seconds
        tokens_per_second = (tokens - self._lap_tokens) / lap_seconds
        flops_per_second = tokens_per_second * self._flops_per_token
        row = self.axes(step=step, tokens=tokens, seconds=seconds) | {
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_second": round(tokens_per_second, 1),
            "mfu": None if self._peak_flops is None else round(flops_per_second / self._peak_flops, 4),
            "step_seconds": round(lap_seconds / num_steps, 6),
            "data_wait_fraction": round((data_wait_seconds - self._lap_data_wait) / lap_seconds, 4),
            "peak_memory_gib": round(peak_memory_gib(self._device), 3),
            "memory_retries": memory_retries(self._device),
            "eta_seconds": round((self._total_tokens - tokens) / tokens_per_second, 3),
        }
        self._lap_step, self._lap_tokens = step, tokens
        self._lap_seconds, self._lap_data_wait = seconds, data_wait_seconds
        return row
