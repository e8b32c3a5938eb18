"""What training, validation and sampling need of any language model. Letters as in model/gpt.py."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig, Softcap

INIT_STD = 0.02  # Radford et al. 2018, section 4.1
# Parameters with a row for each id. Tied, they are one parameter, which is saved once, under the first name.
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"


def softcapped(logits: Tensor, softcap: Softcap | None) -> Tensor:
    """Return the bounded logits in their own dtype, which should be fp32; the logits if `softcap` is None."""
    if softcap is None:
        return logits
    if softcap.form == "rsqrt":
        capped: Tensor = RsqrtSoftcap.apply(logits, softcap.cap)
        return capped
    return softcap.cap * torch.tanh(logits / softcap.cap)


def softcap_slope(capped: Tensor, softcap: Softcap) -> Tensor:
    """Return the derivative of `softcapped` where it returned `capped`.

    For y = c tanh(x / c) it is 1 - (y / c)^2, and (x^2 / c^2 + 1)^(-3/2) = (1 - (y / c)^2)^(3/2) for the other form.
    """
    slope = 1 - (capped / softcap.cap).square()
    if softcap.form == "rsqrt":
        slope.clamp_(min=0)  # rounding takes y beyond c where logits are 4,000 times the cap
        slope *= slope.sqrt()
    return slope


class RsqrtSoftcap(torch.autograd.Function):
    """x / sqrt(x^2 / cap^2 + 1), of which the result is kept. torch's own derivatives would keep two other tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cap: float) -> Tensor:
        y = x * (x.square() / cap**2 + 1).rsqrt()
        ctx.save_for_backward(y)
        ctx.cap = cap
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return gradients[0] * softcap_slope(y, Softcap(ctx.cap, "rsqrt")), None


class LanguageModel(nn.Module):
    """tokens_BT int64 -> logits_BTV in `compute_dtype`; V is the padded vocabulary.

    A model of this kind is its `hidden_states` and the head `lm_head`. Parameters are fp32. `compute_dtype` is the
    dtype of the residual stream and of every matrix product. Losses and samplers convert the logits to fp32.
    """

    lm_head: nn.Linear

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype

    def hidden_states(self, tokens_BT: Tensor) -> Tensor:
        """Return the input of the head, x_BTD. Raise ValueError when T exceeds `config.context_len`."""
        raise NotImplementedError

    def training_states(self, tokens_BT: Tensor, seeds_B: Tensor | None) -> Tensor:
        """Return `hidden_states` as training needs them: with dropout by `seeds_B`, int64, where the model has it."""
        return self.hidden_states(tokens_BT)

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Return the whole initial value of the parameter `name`; padding rows of the vocabulary are 0."""
        raise NotImplementedError

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.logits(self.hidden_states(tokens_BT))

    def logits_at(self, tokens_BT: Tensor, positions_B: Tensor) -> Tensor:
        """Return the logits at one position of each row, [B, V], which is all that sampling needs."""
        x_BTD = self.hidden_states(tokens_BT)
        return self.logits(x_BTD[torch.arange(len(positions_B), device=positions_B.device), positions_B])

    def logits(self, x: Tensor) -> Tensor:
        """Apply the head and --model.logit-softcap: hidden states [..., D] -> logits [..., V]."""
        logits = self.lm_head(x)
        softcap = self.config.softcap
        return logits if softcap is None else softcapped(logits.float(), softcap).to(logits.dtype)

    def check_length(self, tokens_BT: Tensor) -> int:
        """Return T. Raise ValueError if the model has fewer positions."""
        T = tokens_BT.shape[1]
        if self.config.context_len < T:
            raise ValueError(f"{T} tokens exceed the model's context of {self.config.context_len}")
        return T

    @property
    def is_tied(self) -> bool:
        """Return whether the head and the token embedding are one parameter."""
        return False

    def tie_weights(self) -> None:
        """Make head and token embedding one parameter (again), if the model ties them."""

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the layers that are alike: they are sharded, compiled and recomputed one by one."""
        return nn.ModuleList()

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """Return the modules that are worth compiling by themselves."""
        return []


@torch.no_grad()
def init_weights(model: LanguageModel, seed: int, put: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
    """Give the model its initial values, which depend on its config and the seed alone.

    Each parameter is drawn whole, on the CPU, by a generator of its own seeded by (seed, name). So neither the device,
    nor the number of processes, nor another parameter's presence changes it. `put` writes a whole value into its
    parameter, or into the part that a process holds.
    """
    for name, parameter in model.named_parameters():
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        put(parameter, model.initial_value(name, parameter.shape, generator))
