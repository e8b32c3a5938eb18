"""--train.attention-backend: which library's kernel computes torch's scaled_dot_product_attention on this GPU.

torch takes the first in its order that can; the order differs between its versions, and none of them measures. The
choice is made for the whole process before anything is compiled, since the compiler keeps the kernel that it traced.
"""

import contextlib
import dataclasses
import os
import re
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.errors import InputError
from common.reading import misfit
from model.gpt import attention_bias
from train.config import Config
from train.data import BatchPlan
from train.parallel.precision import compute_dtype
from train.processes.group import ProcessGroup

# In torch's own order. FlashAttention 3 takes the place of torch's FlashAttention 2.
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "fa3": SDPBackend.FLASH_ATTENTION,
}
MOST_SEQUENCES = 16  # in a measurement: enough to fill a GPU, and little memory
TIMED_CALLS = 10
FORM = {"attention": {"backend": frozenset(BACKENDS), "conditions": dict}}


def settle_attention_backend(
    config: Config, batch_plan: BatchPlan, kept: dict[str, Any], group: ProcessGroup
) -> tuple[Config, dict[str, Any], str | None]:
    """Use --train.attention-backend; return the config with the kernel in place of auto, what to keep, and a remark.

    Collective. `kept`: rank 0's measurement of an earlier attempt, which stays under the same conditions. Raise
    InputError if some rank's device cannot compute this attention with the kernel that was asked for.
    """
    backend, remark = config.train.attention_backend, None
    if config.model.kind != "gpt" or config.model.attention != "sdpa":
        return config, {}, None
    if backend == "auto" and group.device.type != "cuda":
        return config, {}, None
    trial = Trial(config, batch_plan, group.device)
    record: dict[str, Any] = {}
    if backend == "auto":
        recorded = group.on_main(lambda: kept_backend(kept, trial.conditions))
        if recorded is None or None in group.gather(trial.milliseconds(recorded)):  # such as a package that is gone
            milliseconds = fastest_first(group.gather({name: trial.milliseconds(name) for name in BACKENDS}))
            if not milliseconds:  # none of them has a kernel for these shapes: torch's own choice then
                return (
                    config,
                    {},
                    "attention: no library has a kernel for these shapes, so torch holds all scores in memory",
                )
            recorded = next(iter(milliseconds))
            times = ", ".join(f"{name} {milliseconds[name]:.2f} ms" for name in milliseconds)
            remark = f"attention by {recorded}: {times} for one layer, forward and backward"
        backend = recorded
        record = {"attention": {"backend": backend, "conditions": trial.conditions}}
    group.on_all(lambda: trial.use(backend))
    train = dataclasses.replace(config.train, attention_backend=backend)
    return dataclasses.replace(config, train=train), record, remark


def kept_backend(kept: dict[str, Any], conditions: dict[str, Any]) -> Any:
    """Return the backend that config.json keeps for the same conditions; None if it keeps none."""
    if misfit(kept, FORM) is not None or kept["attention"]["conditions"] != conditions:
        return None
    return kept["attention"]["backend"]


def fastest_first(measured: list[dict[str, float | None]]) -> dict[str, float]:
    """Return the slowest rank's time for each backend that every rank can use, the fastest first."""
    slowest = {
        name: max(time for ranks in measured if (time := ranks[name]) is not None)
        for name in BACKENDS
        if all(ranks[name] is not None for ranks in measured)
    }
    return dict(sorted(slowest.items(), key=lambda item: item[1]))


class Trial:
    """Attention alone in a run's shapes and dtype, as model/gpt.py calls it."""

    def __init__(self, config: Config, batch_plan: BatchPlan, device: torch.device) -> None:
        model, sequences = config.model, min(batch_plan.micro_batch, MOST_SEQUENCES)
        self._device = device
        self._shape = sequences, config.train.seq_len, 3, model.num_heads, model.head_size
        self._dtype = compute_dtype(config.train)
        self._bias_TT = None
        if model.window is not None:
            self._bias_TT = attention_bias(config.train.seq_len, model.window, self._dtype, device)
        self.conditions = {
            "device": device.type if device.type != "cuda" else torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "shape": list(self._shape),
            "dtype": config.train.dtype,
            "deterministic": config.train.deterministic,
            **({} if model.window is None else {"window": model.window}),
        }

    def seconds(self, backend: str, calls: int = 1) -> float:
        """Return the time of a forward and backward pass with one backend alone. Raise if it cannot.

        RuntimeError stands for shapes, dtypes or a device that it does not take, ImportError for its package.
        """
        generator = torch.Generator(self._device).manual_seed(0)  # the run's own random numbers stay as they are
        options: dict[str, Any] = {"dtype": self._dtype, "device": self._device}
        x_BT3HK = torch.randn(self._shape, generator=generator, **options).requires_grad_()
        gradient_BHTK = torch.randn(self._shape[:2] + self._shape[3:], generator=generator, **options).transpose(1, 2)
        q_BHTK, k_BHTK, v_BHTK = (y_BTHK.transpose(1, 2) for y_BTHK in x_BT3HK.unbind(dim=2))
        with activated(backend), sdpa_kernel([BACKENDS[backend]]):
            started = 0.0
            for call in range(calls + 1):
                if call == 1:  # the first loads the kernels
                    self._wait()
                    started = time.perf_counter()
                is_causal = self._bias_TT is None
                y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, self._bias_TT, is_causal=is_causal)
                torch.autograd.grad(y_BHTK, (q_BHTK, k_BHTK, v_BHTK), gradient_BHTK)
            self._wait()
            return (time.perf_counter() - started) / calls

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def milliseconds(self, backend: str) -> float | None:
        """Return the time of a forward and backward pass, the best of three means; None if it cannot be."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's reasons why it cannot
            try:
                return 1000 * min(self.seconds(backend, TIMED_CALLS) for _ in range(3))
            except (RuntimeError, ImportError):
                return None

    def use(self, backend: str) -> None:
        """Make a backend this process's first choice. Raise InputError if it cannot compute this attention.

        The others follow in torch's order, for shapes that it does not take, such as those of an evaluation. The trial
        comes first also because torch 2.13 sets an order of its own at the first call.
        """
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                self.seconds(backend)
            except (RuntimeError, ImportError) as error:
                texts = [str(warning.message) for warning in warned] + [str(error)]
                told = [text for text in texts if "because:" not in text and "runtime disabled" not in text]
                reason = re.split(r"\n|\. | \(Triggered", (told or texts)[0])[0]
                raise InputError(
                    f"--train.attention-backend {backend} cannot compute this run's attention "
                    f"({', '.join(f'{name} {value}' for name, value in self.conditions.items())}): "
                    f"{reason}; use --train.attention-backend auto"
                ) from error
        if backend == "fa3":
            attention.activate_flash_attention_impl("FA3")
        order = [BACKENDS[backend], *BACKENDS.values(), SDPBackend.MATH]
        attention._sdpa_kernel(list(dict.fromkeys(order)), set_priority=True)  # sdpa_kernel would undo it at its end
        # The kernel that was traced stays in the compiler's cache on disk, whose keys know nothing of this choice.
        tag = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "")
        torch.compiler.config.cache_key_tag = f"{tag} attention {backend}"


@contextlib.contextmanager
def activated(backend: str) -> Iterator[None]:
    """Let FlashAttention 3 take the place of torch's FlashAttention 2 meanwhile, if that is the backend."""
    if backend != "fa3":
        yield
        return
    attention.activate_flash_attention_impl("FA3")
    try:
        yield
    finally:
        attention.restore_flash_attention_impl()
