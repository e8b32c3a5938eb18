"""The parts of gpu_check.py that need torch. Each runs in a process of its own and prints a JSON line for each row.

python benchmarks/gpu_parts.py attention           # one part, on one GPU
python benchmarks/gpu_parts.py attention --tiny    # the same code at tiny sizes on a CPU
"""

import argparse
import dataclasses
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks import bench_saves
from benchmarks.gpu_check import ROW
from benchmarks.plain_gpt import usual_step
from benchmarks.steps import compare, configured, opened_run
from common.errors import InputError
from model.config import ModelConfig
from model.cost import model_cost
from model.costs.gpu_peaks import BANDWIDTHS, peak_flops
from train import losses
from train.config import Config, SaveConfig
from train.data import plan_batches
from train.losses import LossModel
from train.parallel.apply import build_loss_model
from train.parallel.plan import choose_parallel_plan
from train.processes.group import ProcessGroup, open_process_group
from train.run.card import step_memory

Row = dict[str, Any]
TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Setting:
    """Where and at which size a part measures."""

    folder: Path
    group: ProcessGroup
    is_tiny: bool

    @property
    def device(self) -> torch.device:
        return self.group.device

    def config(self, name: str, *, micro_batch: int, sequences: int = 64, **train: Any) -> Config:
        """Return GPT-2 small on generated text, `sequences` in a step; tiny: two layers, eager, in fp32."""
        folder = self.folder / name
        folder.mkdir()
        preset, vocab_size = ("quickstart", 256) if self.is_tiny else ("gpt2-small", 50257)
        sequences = sequences // 16 if self.is_tiny else sequences
        config = configured(folder, preset=preset, sequences=sequences, vocab_size=vocab_size)
        train["micro_batch"] = max(1, micro_batch // 16) if self.is_tiny else micro_batch
        if self.is_tiny:
            train["compile"] = False
            small = dataclasses.replace(config.model, num_layers=2, num_heads=2, width=32)
            config = dataclasses.replace(config, model=small)
        return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))

    def milliseconds(self, function: Callable[[], object], repeats: int = 20) -> float:
        """Return the median time of a call, after three calls that are not counted."""
        times = []
        for index in range(3 + (3 if self.is_tiny else repeats)):
            self.wait()
            began = time.perf_counter()
            function()
            self.wait()
            times.append(1e3 * (time.perf_counter() - began))
            if index == 2:
                times.clear()
        return statistics.median(times)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_gb(self, function: Callable[[], object]) -> float | None:
        """Return the allocator's peak during a call in 10^9 bytes; None on a CPU, whose allocator keeps none."""
        if self.device.type != "cuda":
            function()
            return None
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return round(torch.cuda.max_memory_allocated() / 1e9, 3)


def rates(setting: Setting) -> Iterator[Row]:
    """Versions, the device, and its two ceilings: bytes copied and products of matrices."""
    is_cuda = setting.device.type == "cuda"
    yield {"what": "python", "value": sys.version.split()[0]}
    yield {"what": "torch", "value": torch.__version__}
    yield {"what": "device", "value": torch.cuda.get_device_name() if is_cuda else "cpu"}
    if is_cuda:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        yield {"what": "CUDA, cuDNN, NCCL", "value": f"{torch.version.cuda}, {torch.backends.cudnn.version()}, {nccl}"}
        yield {"what": "memory, GB", "value": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)}
    source = torch.ones(2**16 if setting.is_tiny else 2**30, device=setting.device)
    target = torch.empty_like(source)
    copy_ms = setting.milliseconds(lambda: target.copy_(source))
    yield {"what": "copy, TB/s read and written", "value": round(2 * source.nbytes / copy_ms / 1e9, 3)}
    size = 128 if setting.is_tiny else 8192
    left, right = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    product_ms = setting.milliseconds(lambda: left @ right)  # on random numbers: zeros would run faster
    yield {"what": f"bf16 {size}^3 products, TFLOP/s", "value": round(2 * size**3 / product_ms / 1e9, 3)}


def steps(setting: Setting) -> Iterator[Row]:
    """Our step against the usual loop (benchmarks/plain_gpt.py), in turns, with an A/A control."""
    rounds, block = (2, 1) if setting.is_tiny else (4, 5)
    for micro_batch in (16, 64):
        config = setting.config(f"steps_{micro_batch}", micro_batch=micro_batch)
        with opened_run(config, setting.group) as (_, ours):
            usual = usual_step(config, setting.device)
            result = compare(ours, usual, rounds=rounds, block=block, group=setting.group)
        ratio, control = result["ours_over_bare"], result["bare_over_bare"]
        yield {
            "micro-batch": micro_batch,
            "our tokens/s": round(config.train.batch_tokens / result["ours_step_ms"] * 1e3),
            "the usual loop's": round(config.train.batch_tokens / result["bare_step_ms"] * 1e3),
            "its time over ours": round(1 / ratio["median"], 4),
            "interval": f"{1 / ratio['high']:.4f} to {1 / ratio['low']:.4f}",
            "its time over its own": f"{control['low']:.4f} to {control['high']:.4f}",
            "our MFU": mfu(setting, config, result["ours_step_ms"]),
        }


def mfu(setting: Setting, config: Config, step_ms: float) -> float | None:
    """Return the fraction of the device's peak that the model's own FLOPs reach; None where no peak is known."""
    peak = None
    if setting.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(), config.train.dtype)
    flops = model_cost(config.model).flops_per_token * config.train.batch_tokens
    return None if peak is None else round(flops / (step_ms / 1e3) / peak, 4)


ON_GPU = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ON_CPU = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


def attention(setting: Setting) -> Iterator[Row]:
    """Each kernel of causal attention at a micro-batch of 64, in the memory order that the model's c_attn leaves."""
    B, H, T, K = (2, 2, 32, 16) if setting.is_tiny else (64, 12, 1024, 64)
    dtype = torch.float32 if setting.is_tiny else torch.bfloat16
    leaf = torch.randn(B, T, 3 * H * K, device=setting.device, dtype=dtype, requires_grad=True)
    slope_BHTK = torch.randn(B, T, H, K, device=setting.device, dtype=dtype).transpose(1, 2)
    flops = 2 * B * H * T * T * K  # of two products, half of which the mask leaves
    for name, backend in (ON_GPU if setting.device.type == "cuda" else ON_CPU).items():

        def forward(backend: SDPBackend = backend) -> Tensor:
            q, k, v = (y.view(B, T, H, K).transpose(1, 2) for y in leaf.split(H * K, dim=2))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def both(forward: Callable[[], Tensor] = forward) -> None:
            leaf.grad = None
            forward().backward(slope_BHTK)

        try:
            forward_ms, both_ms = setting.milliseconds(forward), setting.milliseconds(both)
        except RuntimeError as error:  # torch's answer where a kernel is not for this device, shape or dtype
            yield {"backend": name, "fault": str(error).strip().splitlines()[0]}
            continue
        yield {
            "backend": name,
            "forward, ms": round(forward_ms, 3),
            "both passes, ms": round(both_ms, 3),
            "TFLOP/s of both": round(3.5 * flops / both_ms / 1e9, 3),
        }


def loss(setting: Setting) -> Iterator[Row]:
    """The head and its loss, plain and by chunks, both passes: time and peak memory."""
    N, D, vocab_size = (64, 16, 100) if setting.is_tiny else (64 * 1024, 768, 50257)
    V = ModelConfig(vocab_size=vocab_size).padded_vocab_size
    dtype = torch.float32 if setting.is_tiny else torch.bfloat16
    x_ND = torch.randn(N, D, device=setting.device, dtype=dtype, requires_grad=True)
    weight_VD = (0.02 * torch.randn(V, D, device=setting.device)).requires_grad_()
    targets_N, scale = torch.randint(vocab_size, (N,), device=setting.device), torch.ones((), device=setting.device)
    plain, chunk, head = losses.plain_loss, losses.chunk_loss, partial(losses.make_head, is_fp8=False)
    if not setting.is_tiny:
        plain, chunk = torch.compile(plain, dynamic=False), torch.compile(chunk, dynamic=False)
    sizes = [None, *((16, 32) if setting.is_tiny else (1024, 2048, 4096, 8192, 16384))]
    for size in sizes:

        def both(size: int | None = size) -> None:
            x_ND.grad = weight_VD.grad = None
            if size is None:
                plain(x_ND, weight_VD, targets_N, scale, vocab_size)[0].backward()
            else:
                score = losses.ChunkedCrossEntropy.apply
                score(x_ND, weight_VD, targets_N, scale, vocab_size, None, size, head, chunk)[0].backward()

        time_ms = setting.milliseconds(both, repeats=5)
        yield {
            "loss": "plain" if size is None else f"chunks of {size}",
            "both passes, ms": round(time_ms, 3),
            "TFLOP/s": round(6 * N * V * D / time_ms / 1e9, 3),
            "peak, GB": setting.peak_gb(both),
        }


def fp8(setting: Setting) -> Iterator[Row]:
    """Both passes of GPT-2 small with each choice of --train.fp8, and the first loss with it."""
    for choice in (None, "head", "blocks", "all"):
        config = setting.config(f"fp8_{choice}", micro_batch=64, dtype="bf16", fp8=choice)
        plan = choose_parallel_plan(config, world=1, local_world=1, memory_bytes=10**12)
        loss_model = build_loss_model(config, plan, setting.group)
        shape = plan_batches(config, 1).micro_batch, config.train.seq_len
        generator = torch.Generator(setting.device).manual_seed(1)
        tokens_BT = torch.randint(config.model.vocab_size, shape, device=setting.device, generator=generator)
        scale = torch.full((), 1 / tokens_BT.numel(), device=setting.device)

        def both(loss_model: LossModel = loss_model, tokens_BT: Tensor = tokens_BT, scale: Tensor = scale) -> Tensor:
            loss_model.zero_grad(set_to_none=True)
            losses = loss_model(tokens_BT, tokens_BT.roll(-1, 1), scale)
            losses[0].backward()
            return losses[0].detach()

        time_ms = setting.milliseconds(both, repeats=5)
        yield {"fp8": choice or "none", "both passes, ms": round(time_ms, 3), "loss": round(float(both()), 5)}


def memory(setting: Setting) -> Iterator[Row]:
    """The peak that the run card predicts (model/costs/memory.py) beside the allocator's, for a whole step."""
    cases: list[dict[str, Any]] = [
        {"micro_batch": 64, "loss": "plain", "compile": True},
        {"micro_batch": 16, "loss": "chunked", "compile": True},
        {"micro_batch": 16, "loss": "plain", "compile": False},
    ]
    for case in cases:
        config = setting.config("memory_" + "_".join(map(str, case.values())), **case)
        plan = choose_parallel_plan(config, world=1, local_world=1, memory_bytes=10**12)
        on_cpu = setting.device.type != "cuda"
        predicted = step_memory(config, plan_batches(config, 1), plan, on_cpu=on_cpu)
        with opened_run(config, setting.group) as (_, step):
            step()
            measured = setting.peak_gb(step)
        gigabytes = predicted.peak_bytes / 1e9
        over = None if measured is None else round(measured / gigabytes, 3)
        yield case | {"predicted, GB": round(gigabytes, 3), "measured, GB": measured, "measured over predicted": over}


# A kernel belongs to the first kind whose pattern its name has, in any case.
KINDS = {
    "attention": "flash|fmha|sdpa|attention|bprop",
    "loss": "log_softmax|logsumexp|nll|cross_entropy|softmax",
    "norms": "layer_norm|rms_norm",
    "other kernels of the compiler": "^triton_(?!tem)",  # named after all that it fused
    "optimizer": "adam|multi_tensor|foreach|lpnorm",
    "matrix products": "gemm|nvjet|cutlass|cublas|splitk|addmm|::mm|::bmm|linear|^triton_tem",
    "communication": "nccl",
    "copies": "memcpy|memset|copy|::to\\b|::fill|::zero",
    "elementwise": "elementwise|gelu|add|mul|reduce",
}
TOP_KERNELS = 15


def trace(setting: Setting) -> Iterator[Row]:
    """Where a step's time goes: kernels (on a CPU: operators) by kind, then those that took longest."""
    num_steps = 2
    config = setting.config("trace", micro_batch=64)
    is_cuda = setting.device.type == "cuda"
    with opened_run(config, setting.group) as (_, step):
        for _ in range(3):
            step()
        setting.wait()
        began = time.perf_counter()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
        with profile(activities=activities, acc_events=True) as profiled:
            for _ in range(num_steps):
                step()
            setting.wait()
        wall_ms = 1e3 * (time.perf_counter() - began) / num_steps
    kind = DeviceType.CUDA if is_cuda else DeviceType.CPU
    times: dict[str, tuple[float, int]] = {}
    for each in profiled.key_averages():
        if each.device_type == kind and not each.is_user_annotation:
            microseconds = each.self_device_time_total if is_cuda else each.self_cpu_time_total
            times[each.key] = (microseconds / 1e3 / num_steps, each.count)
    total = sum(each for each, _ in times.values())
    yield {"kernels": "all", "ms a step": round(total, 3), "calls": None, "of the step": round(total / wall_ms, 3)}
    by_kind = sorted(times, key=kind_of)
    for name, kernels in itertools.groupby(by_kind, key=kind_of):
        milliseconds = sum(times[kernel][0] for kernel in kernels)
        yield {"kernels": name, "ms a step": round(milliseconds, 3), "of the step": round(milliseconds / wall_ms, 3)}
    for kernel in sorted(times, key=lambda name: -times[name][0])[:TOP_KERNELS]:
        milliseconds, count = times[kernel]
        calls = count // num_steps
        yield {"kernels": kernel[:90], "ms a step": round(milliseconds, 3), "calls": calls, "kind": kind_of(kernel)}


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel by its name."""
    return next((name for name, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")


def roofline(setting: Setting) -> Iterator[Row]:
    """What each kind of kernel in the traced step takes at the card's peaks (train/roofline.py); tiny: an H100's."""
    # Both load Inductor, which must find a process with its device.
    from model.costs.roofline import Rates, rows_of
    from train.roofline import traced_step

    card = "NVIDIA H100 80GB HBM3" if setting.is_tiny else torch.cuda.get_device_name()
    peak, (bandwidth, _) = peak_flops(card, "bf16"), BANDWIDTHS.get(card, (None, ""))
    if peak is None or bandwidth is None:
        raise InputError(f"no peaks are listed for {card}")
    config = setting.config("roofline", micro_batch=64)
    kernels = traced_step(
        config.model,
        batch=plan_batches(config, 1).micro_batch,
        seq_len=config.train.seq_len,
        compute_dtype=torch.bfloat16,
    )
    rows = rows_of(kernels, Rates(peak, peak, bandwidth))
    for name, row in rows.items():
        yield {"kernels": name, "ms a step at least": round(1e3 * row.seconds, 3), "bound by": row.bound}
    yield {"kernels": "all", "ms a step at least": round(1e3 * sum(row.seconds for row in rows.values()), 3)}


def saves(setting: Setting) -> Iterator[Row]:
    """The cost of a checkpoint: steps beside an asynchronous one, and the wait for one (benchmarks/bench_saves.py)."""
    config = setting.config("saves", micro_batch=64)
    config = dataclasses.replace(config, save=SaveConfig(every=10**9, keep=1, mode="async"))
    options = bench_saves.Options(preset=config.preset, rounds=2 if setting.is_tiny else 3)
    result = bench_saves.measure(options, config, setting.group)
    yield {"what": "a checkpoint, GB", "value": result["checkpoint_gb"]}
    for name in ("steps_beside_over_without", "without_over_without"):
        yield {"what": name.replace("_", " ")} | result[name]
    for name in ("steps_while_writing", "waited_for_seconds"):
        yield {"what": name.replace("_", " ")} | dict(
            zip(("low", "high"), (min(result[name]), max(result[name])), strict=True)
        )


PARTS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    part.__name__: part for part in (rates, steps, attention, loss, fp8, memory, trace, roofline, saves)
}


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS, help="what to measure")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args(args)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_process_group(TIMEOUT_SECONDS, Path(folder)) as group,
    ):
        for row in PARTS[options.part](Setting(Path(folder), group, is_tiny=options.tiny)):
            print(ROW + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
