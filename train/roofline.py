"""Print how long a training step takes at best on a card: FLOPs, bytes and milliseconds by kind of kernel.

    python train/roofline.py gpt2-small --card h100 --batch 64
    python train/roofline.py gpt2-medium --card 96 --peak-tflops 400 --bandwidth-tb-per-s 1.8 --loss chunked

It needs no GPU and takes 10 to 20 seconds, since it traces the step that train/main.py runs: the compiled blocks and
loss with their backward passes, what runs around them, and the update (model/costs/roofline.py says how it counts). The
step has one micro-batch on one card. The first command prints 82.9 ms at the card's peaks, which no program reaches,
and 115 ms at the rates that --attained assumes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from common.errors import one_line_errors
from model.config import ModelConfig
from model.cost import CARDS, COMPUTE_BYTES, ModelOnCard, in_bytes, in_flops, memory_and_peak, model_cost, parse_as
from model.costs.activations import StepShape
from model.costs.gpu_peaks import BANDWIDTHS
from model.costs.memory import memory
from model.costs.roofline import Kernel, Rates, Row, StepTrace, rows_of
from model.gpt import GPT
from train.config import OptimConfig, TrainConfig
from train.data import zero_batch
from train.losses import LossModel
from train.optim import build_optimizer, sum_of_squares, update
from train.parallel.apply import compile_parts
from train.parallel.precision import COMPUTE_DTYPES


@dataclass(frozen=True)
class Options(ModelOnCard):
    """Print how long a training step takes at best on a card."""

    loss: Literal["plain", "chunked"] = "plain"
    """The loss that --train.loss names."""
    loss_chunk_tokens: int = TrainConfig.loss_chunk_tokens
    """chunked: tokens whose logits are computed at once."""
    bandwidth_tb_per_s: float | None = None
    """The bandwidth of the card's memory in TB/s (10^12 bytes). None: the listed bandwidth of a named card."""
    attained: tuple[float, float, float] = (0.70, 0.35, 0.90)
    """Fractions of the peaks for the last column: of FLOP/s in products, of FLOP/s in attention, of bandwidth. The
    default is for an H100: 35 % is FlashAttention-2's (Shah et al. 2024, abstract), the others are assumptions."""

    def faults(self) -> list[str]:
        faults = super().faults() + self.not_positive("bandwidth_tb_per_s", "loss_chunk_tokens")
        if self.model.attention == "flex":
            faults.append("--model.attention flex: its work depends on the documents; give sdpa or naive")
        if not all(0 < fraction <= 1 for fraction in self.attained):
            faults.append(f"--attained {' '.join(map(str, self.attained))}: give three fractions above 0 and at most 1")
        if card_rates(self) is None:
            faults.append(
                f"--card {self.card}: its peaks are not listed; give --peak-tflops and --bandwidth-tb-per-s, or "
                f"--card with one of {', '.join(CARDS)}"
            )
        return faults or self.overflow()

    def overflow(self) -> list[str]:
        """Return a fault if torch cannot count the bytes of the step's tensors in 64 bits."""
        shape = StepShape(micro_batch=self.batch, seq_len=self.seq_len, compute_bytes=COMPUTE_BYTES[self.dtype])
        if (peak_bytes := memory(self.model, shape).peak_bytes) < 2**60:
            return []
        step = f"--batch {self.batch} x --seq-len {self.seq_len}: a step of this model"
        return [f"{step} needs {in_bytes(peak_bytes)} of memory, but at most 2^60 bytes can be counted"]


def card_rates(options: Options) -> Rates | None:
    """Return the card's peaks at --dtype; None if the FLOP/s or the bandwidth is neither listed nor given."""
    _, peak = memory_and_peak(options)
    bandwidth = options.bandwidth_tb_per_s and options.bandwidth_tb_per_s * 1e12
    if bandwidth is None and options.card in CARDS:
        bandwidth, _ = BANDWIDTHS[CARDS[options.card][1]]
    return None if peak is None or bandwidth is None else Rates(peak, peak, bandwidth)


def traced_step(
    config: ModelConfig, *, batch: int, seq_len: int, compute_dtype: torch.dtype, chunk_tokens: int | None = None
) -> list[Kernel]:
    """Return the kernels of one step with one micro-batch: forward pass, backward pass and update.

    Model, loss, compilation and optimizer are those of training; `chunk_tokens` None is the plain loss. Gradients are
    taken as autograd returns them, without a copy or a sum with those of other micro-batches.
    """
    trace = StepTrace()

    def enter_the_loss(module: nn.Module, inputs: tuple[Tensor], x_BTD: Tensor) -> None:
        trace.phase = "loss"
        x_BTD.register_hook(leave_the_loss)

    def leave_the_loss(gradient_BTD: Tensor) -> None:
        trace.phase = "hidden states"

    with FakeTensorMode():
        model = GPT(config, compute_dtype=compute_dtype)
        loss_model = LossModel(model, chunk_tokens=chunk_tokens, compiled=True)
        compile_parts(model)
        model.transformer["ln_f"].register_forward_hook(enter_the_loss)  # the last module before the head
        optimizer = build_optimizer(loss_model.model, OptimConfig())
        parameters = list(loss_model.parameters())
        inputs_BT, targets_BT, *seeds = zero_batch((batch, seq_len), has_dropout=config.dropout > 0)
        with trace.recording():
            losses = loss_model(inputs_BT, targets_BT, torch.empty(()), *seeds)
            gradients = torch.autograd.grad(losses[0], parameters)
            trace.phase = "update"
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            norm = sum_of_squares(parameters).sqrt().float()
            update(optimizer, 0, 1.0, norm, norm.isfinite())
    return trace.kernels


def report(options: Options) -> str:
    """Return everything that the command prints."""
    peaks = card_rates(options)
    assert peaks is not None  # `faults` has seen to it
    kernels = traced_step(
        options.model,
        batch=options.batch,
        seq_len=options.seq_len,
        compute_dtype=COMPUTE_DTYPES[options.dtype],
        chunk_tokens=options.loss_chunk_tokens if options.loss == "chunked" else None,
    )
    products, attention, bandwidth = options.attained
    attained = Rates(peaks.products * products, peaks.attention * attention, peaks.bandwidth * bandwidth)
    tokens = options.batch * options.seq_len
    return "\n".join(
        [
            f"one step of {options.batch} x {options.seq_len} tokens on {options.card}, {options.dtype}, "
            f"{options.loss} loss; peaks: {peaks.products / 1e12:,.1f} TFLOP/s, {peaks.bandwidth / 1e12:g} TB/s",
            "",
            *table(rows_of(kernels, peaks), rows_of(kernels, attained)),
            "",
            *(
                f"{f'  {name}':<24}{tokens / seconds:>14,.0f} tokens/s"
                f"{100 * tokens * model_cost(options.model).flops_per_token / (peaks.products * seconds):>8.1f} % MFU"
                for name, seconds in (
                    ("at the peaks", total_seconds(rows_of(kernels, peaks))),
                    ("at attained rates", total_seconds(rows_of(kernels, attained))),
                )
            ),
            "",
            f"(attained: {100 * products:g} % of the FLOP/s in products, {100 * attention:g} % in attention, "
            f"{100 * bandwidth:g} % of the bandwidth; --attained)",
        ]
    )


def total_seconds(rows: dict[str, Row]) -> float:
    """Return the seconds of a step."""
    return sum(row.seconds for row in rows.values())


def table(at_peaks: dict[str, Row], attained: dict[str, Row]) -> list[str]:
    """Return a line for each row, and one for the total. "bound by" and "share" are of the time at the peaks."""
    total = total_seconds(at_peaks)
    lines = [f"{'':<20}{'FLOPs':>16}{'bytes':>14}{'ms':>9}{'share':>9}  {'bound by':<11}{'ms, attained':>14}"]
    for name, row in at_peaks.items():
        lines.append(
            f"{f'  {name}':<20}{in_flops(row.flops) if row.flops else '':>16}{in_bytes(row.num_bytes):>14}"
            f"{1e3 * row.seconds:>9.2f}{100 * row.seconds / total:>7.1f} %  {row.bound:<11}"
            f"{1e3 * attained[name].seconds:>14.2f}"
        )
    flops, num_bytes = (sum(getattr(row, name) for row in at_peaks.values()) for name in ("flops", "num_bytes"))
    lines.append(
        f"{'  total':<20}{in_flops(flops):>16}{in_bytes(num_bytes):>14}{1e3 * total:>9.2f}{'':>22}"
        f"{1e3 * total_seconds(attained):>14.2f}"
    )
    return lines


def main(args: Sequence[str] | None = None) -> None:
    """Print the roofline of the model of the command line."""
    with one_line_errors("roofline"):
        arguments = sys.argv[1:] if args is None else args
        print(report(parse_as(Options, arguments, program="train/roofline.py", text=__doc__)))


if __name__ == "__main__":
    main()
