"""Parameter groups, the optimizer, the schedule as a pure function, the global norm and the update."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from train.config import OptimConfig
from train.parallel.apply import local


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return fused AdamW (Loshchilov & Hutter 2019), its state in place from the start.

    Matrices and embeddings decay, vectors do not. The state is made here rather than at the first step, so that saving
    and loading see the same tensors at any step.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr_peak, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def learning_rate(step: int, config: OptimConfig, num_steps: int) -> float:
    """Return the learning rate of step `step` (from 0): linear warm-up to lr_peak, then `config.schedule`.

    cosine: Loshchilov & Hutter 2017, equation 5, one half-period over the steps after warm-up, to lr_final.
    wsd (warmup, stable, decay: Hu et al. 2024, section 4): lr_peak, then linear to lr_final over the last
    warmdown_fraction of all steps; Haegele et al. 2024 recommend linear over a fifth.
    """
    if step < config.warmup_steps:
        return config.lr_peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr_peak
    if config.schedule == "wsd":
        warmdown_steps = max(1, round(config.warmdown_fraction * num_steps))
        left = min(1.0, (num_steps - step) / warmdown_steps)
        return config.lr_final + left * (config.lr_peak - config.lr_final)
    assert config.schedule == "cosine"
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.lr_final + 0.5 * (1 + math.cos(math.pi * progress)) * (config.lr_peak - config.lr_final)


def sum_of_squares(parameters: Iterable[Tensor]) -> Tensor:
    """Return the sum of squares of this rank's part of all gradients, an fp64 scalar on their device.

    The global norm is the root of its sum over a replica's shards, rounded to fp32.
    """
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    norms = list(torch._foreach_norm(gradients, 2, dtype=torch.float64))
    return torch.stack(norms).square().sum()


def update(
    optimizer: torch.optim.AdamW,
    lr: float,
    norm: Tensor,
    is_finite: Tensor,
    clip_norm: float | None,
    loss_scale: Tensor | None = None,
) -> None:
    """Take one optimizer step on the device, clipped to `clip_norm`; take none where `is_finite` is False.

    The gradients are `loss_scale` times too large if it is given; `norm` is that of the true ones. Fused AdamW divides
    by `grad_scale` and skips on `found_inf` inside its kernel. So clipping, unscaling and the finiteness check neither
    make the host wait nor read the gradients once more.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    divisor = loss_scale
    if clip_norm is not None:
        excess = (norm / clip_norm).clamp(min=1.0)
        divisor = excess if loss_scale is None else excess * loss_scale
    optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
    optimizer.grad_scale = divisor  # type: ignore[attr-defined]
    optimizer.step()
