"""Matrices and norms whose fp32 weights serve a residual stream of any dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig

NORM_EPS = 1e-5


class Linear(nn.Linear):
    """nn.Linear whose fp32 master weights are used in the dtype of what they multiply."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm computed in fp32 whatever the dtype of the residual stream, as autocast would."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()  # FSDP2 gathers them in the dtype of the stream
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm computed in fp32, too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


def make_norm(config: ModelConfig) -> nn.Module:
    """What --model.norm says; of none the identity, which has no parameters."""
    if config.norm == "none":
        return nn.Identity()
    if config.norm == "rmsnorm":
        return RMSNorm(config.width, eps=NORM_EPS)
    return LayerNorm(config.width, eps=NORM_EPS, bias=config.bias)


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """cap x tanh(logits / cap), in the dtype of the logits: give it fp32."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
