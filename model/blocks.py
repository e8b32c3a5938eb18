"""A block: attention, then an MLP, each added to the residual stream. Letters as in model/gpt.py."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attention, Shared
from model.config import ModelConfig
from model.layers import Linear, make_norm


class MLP(nn.Module):
    """Two matrices with a non-linearity between them; of SwiGLU three."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        if self.kind == "swiglu":
            self.c_gate = Linear(config.width, config.mlp_width, bias=config.bias)
        self.c_fc = Linear(config.width, config.mlp_width, bias=config.bias)
        self.c_proj = Linear(config.mlp_width, config.width, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTF = self.c_fc(x_BTD)
        if self.kind == "swiglu":
            y_BTF = F.silu(self.c_gate(x_BTD)) * y_BTF
        elif self.kind == "silu":
            y_BTF = F.silu(y_BTF)
        elif self.kind == "relu2":
            y_BTF = F.relu(y_BTF).square()
        else:
            y_BTF = F.gelu(y_BTF, approximate="tanh")
        return self.c_proj(y_BTF)


class Block(nn.Module):
    """x_BTD -> x_BTD, and the values of its attention, if later blocks mix theirs with them.

    Pre-norm: each half reads the normalised residual stream and adds to it; post-norm: it reads the stream itself,
    which is normalised after each addition.
    """

    def __init__(self, config: ModelConfig, *, is_first: bool) -> None:
        super().__init__()
        self.is_post_norm = config.norm_place == "post"
        self.ln_1 = make_norm(config)
        self.attn = Attention(config, is_first=is_first)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, shared: Shared) -> tuple[Tensor, Tensor | None]:
        if self.is_post_norm:
            y_BTD, values_BHTK = self.attn(x_BTD, shared)
            x_BTD = self.ln_1(x_BTD + y_BTD)
            return self.ln_2(x_BTD + self.mlp(x_BTD)), values_BHTK
        y_BTD, values_BHTK = self.attn(self.ln_1(x_BTD), shared)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.ln_2(x_BTD)), values_BHTK
