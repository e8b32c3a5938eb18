"""GPT-2 (Radford et al. 2019), plain and single-device. It knows nothing of processes or training.

Tensors carry their shape: B batch, T time, D model, H heads, K head size, F feed-forward, V padded vocabulary.
State-dict names are Hugging Face's, every matrix in nn.Linear's orientation.
"""

import hashlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig

INIT_STD = 0.02  # Radford et al. 2018, section 4.1
NORM_EPS = 1e-5


class Linear(nn.Linear):
    """nn.Linear whose fp32 master weights are used in the dtype of what they multiply."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm computed in fp32 whatever the dtype of the residual stream, as autocast would."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()  # FSDP2 gathers them in the dtype of the stream
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.c_attn = Linear(config.width, 3 * config.width)
        self.c_proj = Linear(config.width, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q_BTD, k_BTD, v_BTD = self.c_attn(x_BTD).split(D, dim=2)
        q_BHTK, k_BHTK, v_BHTK = (
            y_BTD.view(B, T, self.num_heads, -1).transpose(1, 2) for y_BTD in (q_BTD, k_BTD, v_BTD)
        )
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        return self.c_proj(y_BHTK.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Two matrices with GELU in its tanh form between them (Hendrycks & Gimpel 2016, section 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.width, config.hidden_size)
        self.c_proj = Linear(config.hidden_size, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x_BTD), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm: each half reads the normalised residual stream and adds to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.width, eps=NORM_EPS)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD))
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class GPT(nn.Module):
    """tokens_BT int64 -> logits_BTV in `compute_dtype`; V is the padded vocabulary.

    Parameters are fp32. `compute_dtype` is the dtype of the residual stream and of every matrix product;
    norms are computed in fp32, and the losses and samplers that read the logits turn them to fp32.
    Raises ValueError when T exceeds `config.context_len`.
    """

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.width),
                "wpe": nn.Embedding(config.context_len, config.width),
                "h": nn.ModuleList(Block(config) for _ in range(config.num_layers)),
                "ln_f": LayerNorm(config.width, eps=NORM_EPS),
            }
        )
        self.lm_head = Linear(config.width, config.padded_vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head and the token embedding one parameter (again)."""
        embedding = self.transformer["wte"]
        assert isinstance(embedding, nn.Embedding)
        self.lm_head.weight = embedding.weight

    @property
    def blocks(self) -> nn.ModuleList:
        blocks = self.transformer["h"]
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.lm_head(self.features(tokens_BT))

    def logits_at(self, tokens_BT: Tensor, places_B: Tensor) -> Tensor:
        """The logits at one place of each row, [B, V]: all that sampling needs of them."""
        return self.lm_head(self.features(tokens_BT)[torch.arange(len(places_B), device=places_B.device), places_B])

    def features(self, tokens_BT: Tensor) -> Tensor:
        """The normalised residual stream after the last block, x_BTD: what the head reads."""
        T = tokens_BT.shape[1]
        if self.config.context_len < T:
            raise ValueError(f"{T} tokens exceed the model's context of {self.config.context_len}")
        positions_T = torch.arange(T, device=tokens_BT.device)
        x_BTD = self.transformer["wte"](tokens_BT) + self.transformer["wpe"](positions_T)
        x_BTD = x_BTD.to(self.compute_dtype)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.transformer["ln_f"](x_BTD)


def build_model(
    config: ModelConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> GPT:
    """A GPT with its initial weights, which depend on the config and the seed alone."""
    with torch.device("meta"):
        model = GPT(config, compute_dtype=compute_dtype)
    model.to_empty(device=device)
    model.tie_weights()
    init_weights(model, seed)
    return model


@torch.no_grad()
def init_weights(model: GPT, seed: int, put: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
    """GPT-2's initialisation: normal(0, 0.02), residual projections / sqrt(2 L), biases 0, norms 1.

    Each parameter is drawn whole, on the CPU, by a generator of its own, seeded by (seed, name): neither the
    device, the number of processes, nor another parameter's presence changes it. Padding rows are 0. `put` writes a
    whole value into its parameter, or into what a process holds of it.
    """
    vocab_size = model.config.vocab_size
    residual_std = INIT_STD / math.sqrt(2 * model.config.num_layers)  # Radford et al. 2019, section 2.3
    for name, parameter in model.named_parameters():
        value = torch.zeros(parameter.shape)
        if ".ln_" in name and name.endswith("weight"):
            value.fill_(1.0)
        elif not name.endswith("bias"):
            std = residual_std if name.endswith("c_proj.weight") else INIT_STD
            rows = vocab_size if name == "transformer.wte.weight" else parameter.shape[0]
            value[:rows].normal_(0.0, std, generator=_generator(seed, name))
        put(parameter, value)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
