"""The optimizer, its learning rates, the schedule as a pure function, the global norm and the update."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from model.base import HEAD, LanguageModel
from train.config import FIRST_MOMENTUM, OptimConfig
from train.muon import MatrixUpdates
from train.parallel.apply import local
from train.parallel.averaging import WeightAverage
from train.parallel.plan import ParallelPlan
from train.parallel.state_slices import StateSlices
from train.processes.group import ProcessGroup

Kind = Literal["matrix", "embedding", "head", "vector"]
KINDS: tuple[Kind, ...] = ("matrix", "embedding", "head", "vector")


@dataclass(frozen=True)
class Group:
    """Parameters with one rule: `relative_rate` times the step's learning rate, and one weight decay."""

    kind: Kind
    parameters: list[nn.Parameter]
    relative_rate: float
    weight_decay: float


@dataclass
class Optimizer:
    """AdamW (Loshchilov & Hutter 2019), or Muon for the matrices of the blocks and AdamW for the rest.

    `state` has each parameter's tensors by name. They are made here rather than at the first step, so that saving and
    loading see the same tensors at any step. With AdamW alone, state is sharded as the parameters are. With Muon and
    several ranks, each rank has the state of its `slices` alone.

    It calls torch's fused kernel itself: torch.optim's classes load the compiler, which takes a second at the start.
    """

    config: OptimConfig
    groups: list[Group]
    state: dict[nn.Parameter, dict[str, Tensor]] = field(default_factory=dict)
    slices: StateSlices | None = None
    matrix_updates: MatrixUpdates | None = None  # None: AdamW alone
    average: WeightAverage | None = None

    def own(self, parameter: nn.Parameter, tensor: Tensor) -> Tensor:
        """Return what this rank updates of a parameter or of its gradient: a view."""
        shard = local(tensor)
        return shard if self.slices is None else self.slices.of(shard, len(parameter))


def kind_of(name: str, parameter: Tensor, model: LanguageModel) -> Kind:
    """Return what a parameter is to the optimizer. A tied head is an embedding."""
    if parameter.dim() < 2:
        return "vector"
    if name == HEAD:
        return "head"
    is_embedding = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
    return "embedding" if is_embedding else "matrix"


def build_optimizer(
    model: LanguageModel,
    config: OptimConfig,
    parallel_plan: ParallelPlan | None = None,
    group: ProcessGroup | None = None,
) -> Optimizer:
    """Return the optimizer with its state in place. Collective with Muon and several ranks.

    AdamW decays everything but vectors. Muon's AdamW decays nothing: its rates are so much higher than the matrices'
    that a common decay would not fit.
    """
    kinds = {parameter: kind_of(name, parameter, model) for name, parameter in model.named_parameters()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = Optimizer(config, [])
    for kind in KINDS:
        parameters = [parameter for parameter in kinds if kinds[parameter] == kind]
        peak = {"embedding": config.embedding_lr, "head": config.head_lr, "vector": config.vector_lr}.get(kind)
        decays = kind == "matrix" or (kind != "vector" and config.name == "adamw")
        relative_rate = 1.0 if peak is None else peak / config.lr_peak
        if parameters:
            optimizer.groups.append(Group(kind, parameters, relative_rate, config.weight_decay if decays else 0.0))
    if config.name == "muon" and group is not None and parallel_plan is not None and group.world > 1:
        optimizer.slices = StateSlices(list(kinds), parallel_plan, group)
    zeros = torch.zeros_like if optimizer.slices is None else optimizer.slices.zeros
    for parameter, kind in kinds.items():
        if kind == "matrix" and config.name == "muon":
            optimizer.state[parameter] = {"momentum": zeros(parameter)}
        else:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": zeros(parameter),
                "exp_avg_sq": zeros(parameter),
            }
    if config.name == "muon":
        weights = {names[parameter]: parameter for parameter, kind in kinds.items() if kind == "matrix"}
        optimizer.matrix_updates = MatrixUpdates(weights, optimizer.slices)
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


def momentum_at(step: int, config: OptimConfig) -> float:
    """Return Muon's momentum in step `step` (from 0): linear from FIRST_MOMENTUM, then --optim.momentum."""
    risen = min(1.0, step / config.momentum_warmup_steps) if config.momentum_warmup_steps else 1.0
    return config.momentum - (1 - risen) * max(0.0, config.momentum - FIRST_MOMENTUM)


def sum_of_squares(parameters: Iterable[Tensor]) -> Tensor:
    """Return the sum of squares of this rank's part of all gradients, an fp64 scalar on their device.

    The global norm is the root of its sum over a replica's shards, rounded to fp32.
    """
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    norms = list(torch._foreach_norm(gradients, 2, dtype=torch.float64))
    return torch.stack(norms).square().sum()


@torch.no_grad()
def update(
    optimizer: Optimizer,
    step: int,
    lr: float,
    norm: Tensor,
    is_finite: Tensor,
    loss_scale: Tensor | None = None,
) -> None:
    """Make the update of step `step` (from 0) on the device, clipped; make none where `is_finite` is False.

    The gradients are `loss_scale` times too large if it is given; `norm` is that of the true ones. Nothing makes the
    host wait: fused AdamW divides by `grad_scale` and skips on `found_inf` inside its kernel, and Muon computes with a
    rate of 0. Collective with Muon and several ranks.
    """
    config, divisor = optimizer.config, loss_scale
    if config.clip_norm is not None:
        excess = (norm / config.clip_norm).clamp(min=1.0)
        divisor = excess if loss_scale is None else excess * loss_scale
    by_adamw, found_inf = list[nn.Parameter](), (~is_finite).float()
    for group in optimizer.groups:
        rate = lr * group.relative_rate
        if group.kind == "matrix" and optimizer.matrix_updates is not None:
            gradients = [optimizer.own(p, p.grad) for p in group.parameters if p.grad is not None]
            momenta = [local(optimizer.state[p]["momentum"]) for p in group.parameters]
            optimizer.matrix_updates.apply(
                gradients, momenta, momentum_at(step, config), rate, group.weight_decay, divisor, is_finite
            )
        else:
            by_adamw += group.parameters
            _update_by_adamw(optimizer, group, rate, divisor, found_inf)
    if optimizer.slices is not None:
        optimizer.slices.share([local(p) for p in by_adamw], [len(p) for p in by_adamw])
    if optimizer.average is not None:
        optimizer.average.add(step, is_finite)


def _update_by_adamw(
    optimizer: Optimizer, group: Group, rate: float, divisor: Tensor | None, found_inf: Tensor
) -> None:
    config = optimizer.config
    parameters = [p for p in group.parameters if p.grad is not None]  # an empty slice too, for its count of steps
    states = [optimizer.state[p] for p in parameters]
    adamw(
        [optimizer.own(p, p) for p in parameters],
        [optimizer.own(p, p.grad) for p in parameters if p.grad is not None],
        [local(state["exp_avg"]) for state in states],
        [local(state["exp_avg_sq"]) for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        grad_scale=divisor,
        found_inf=found_inf,
        amsgrad=False,
        beta1=config.beta1,
        beta2=config.beta2,
        lr=rate,
        weight_decay=group.weight_decay,
        eps=config.epsilon,
        maximize=False,
    )
