"""The layers of model/gpt.py: fp32 weights that serve a residual stream of any dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.linear import linear

NORM_EPS = 1e-5


class Linear(nn.Linear):
    """nn.Linear that uses its fp32 master weights in the dtype of its input. `init_weights` gives their values."""

    def reset_parameters(self) -> None:
        """Draw nothing: on the meta device that would load the compiler, which takes a second."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Embedding):
    """nn.Embedding, to which `init_weights` gives its values."""

    def reset_parameters(self) -> None:
        """Draw nothing, as in Linear."""


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm computed in fp32 whatever the dtype of the residual stream, as autocast would."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()  # FSDP2 gathers the weights in the dtype of the stream
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm computed in fp32 whatever the dtype of the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


def learned_number(is_wanted: bool) -> nn.Parameter | None:
    """Return a parameter of one element, if it is wanted. FSDP2 cannot shard a scalar."""
    return nn.Parameter(torch.empty(1)) if is_wanted else None


def plus_scaled(x: Tensor, other: Tensor | None, scale: Tensor | None) -> Tensor:
    """Return x + scale x other; x where there is no scale."""
    if scale is None:
        return x
    assert other is not None
    return torch.addcmul(x, other, scale.to(x.dtype))


def make_norm(config: ModelConfig) -> nn.Module:
    """Return the norm that --model.norm names; the identity, which has no parameters, for none."""
    if config.norm == "none":
        return nn.Identity()
    if config.norm == "rmsnorm":
        return RMSNorm(config.width, eps=NORM_EPS)
    return LayerNorm(config.width, eps=NORM_EPS, bias=config.bias)
