"""A GPT-2 and its training loop as most people write them: nn.Linear, autocast, one torch.compile around the whole.

This is the form of nanoGPT's script, for benchmarks to time beside ours. It has the shape of the compared model, its
biases, its tied head and its padded vocabulary. Its weights are fp32 and are cast by autocast in every forward pass.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.steps import Step, plain_step
from model.config import ModelConfig
from train.config import Config
from train.data import plan_batches
from train.parallel.precision import compute_dtype


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP, each added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, bias = config.width, config.bias
        self.num_heads = config.num_heads
        self.norm_1, self.norm_2 = (nn.LayerNorm(width, bias=bias) for _ in range(2))
        self.to_qkv, self.from_heads = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)
        self.widen, self.narrow = nn.Linear(width, 4 * width, bias), nn.Linear(4 * width, width, bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        qkv_BTD = self.to_qkv(self.norm_1(x_BTD)).split(D, dim=2)
        q_BHTK, k_BHTK, v_BHTK = (y_BTD.view(B, T, self.num_heads, -1).transpose(1, 2) for y_BTD in qkv_BTD)
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        x_BTD = x_BTD + self.from_heads(y_BHTK.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.narrow(F.gelu(self.widen(self.norm_2(x_BTD)), approximate="tanh"))


class PlainGPT(nn.Module):
    """tokens_BT, targets_BT -> the mean loss."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.padded_vocab_size, config.width)
        self.positions = nn.Embedding(config.context_len, config.width)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        self.last_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.head = nn.Linear(config.width, config.padded_vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x_BTD = self.tokens(tokens_BT) + self.positions(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return F.cross_entropy(self.head(self.last_norm(x_BTD)).flatten(0, 1), targets_BT.flatten())


def usual_step(config: Config, device: torch.device) -> Step:
    """Return a step of that loop on fixed tokens, with the batch, precision and compilation of `config`."""
    with device:
        model = PlainGPT(config.model)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-4,
        betas=(0.9, 0.95),
        fused=True,
    )
    plan, dtype = plan_batches(config, 1), compute_dtype(config.train)
    shape = (plan.accumulation, plan.micro_batch, config.train.seq_len + 1)
    tokens = torch.randint(config.model.vocab_size, shape, device=device)
    called = torch.compile(model) if config.train.compile else model

    def score(rows_BT: Tensor, is_last: bool) -> Tensor:
        is_half = dtype != torch.float32
        with torch.autocast(device.type, dtype) if is_half else contextlib.nullcontext():
            loss: Tensor = called(rows_BT[:, :-1], rows_BT[:, 1:])
        return loss

    return plain_step(tokens, score, model, optimizer)
