"""Causal multi-head self-attention: fused, written out, or within documents; and where a token's position enters it.

Letters as in model/gpt.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model.config import ModelConfig
from model.kv_cache import BlockCache
from model.layers import NORM_EPS, Linear, RMSNorm

ROPE_BASE = 10_000.0  # Su et al. 2021, section 3.2.2
Rotation = tuple[Tensor, Tensor]  # cosines and sines, fp32 [T, K], or [B, 1, T, K] where rows stand elsewhere


class Shared(NamedTuple):
    """What one pass makes once and every block's attention reads; None where no switch asks for it.

    No module keeps it, since DDP would have to keep the processes' buffers alike, and a mask is the batch's anyway. The
    rotation takes T x K of each function, nothing beside a block's products.
    """

    rotation: Rotation | None = None
    mask: BlockMask | None = None
    first_values_BHTK: Tensor | None = None
    cache: BlockCache | None = None
    visible_B1TS: Tensor | None = None


class Attention(nn.Module):
    """x_BTD -> what attention adds to the residual stream, and the values, if later blocks mix theirs with them."""

    def __init__(self, config: ModelConfig, *, is_first: bool) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.kind = config.attention
        self.c_attn = Linear(config.width, 3 * config.width, bias=config.bias)
        self.c_proj = Linear(config.width, config.width, bias=config.bias)
        self.q_norm = RMSNorm(config.head_size, eps=NORM_EPS) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, eps=NORM_EPS) if config.qk_norm else None
        self.gives_values = config.value_residual and is_first
        # Of one element rather than none, which FSDP2 cannot shard.
        self.value_mix = nn.Parameter(torch.empty(1)) if config.value_residual and not is_first else None

    def queries_keys_values(self, x_BTD: Tensor, shared: Shared) -> tuple[Tensor, Tensor, Tensor]:
        """As the scores and their mean read them: normalised, turned and mixed, each [B, H, T, K]."""
        B, T, D = x_BTD.shape
        q_BTD, k_BTD, v_BTD = self.c_attn(x_BTD).split(D, dim=2)
        q_BTHK, k_BTHK, v_BTHK = (y_BTD.view(B, T, self.num_heads, -1) for y_BTD in (q_BTD, k_BTD, v_BTD))
        if self.q_norm is not None and self.k_norm is not None:  # before heads come first: its result lies in order
            q_BTHK, k_BTHK = self.q_norm(q_BTHK), self.k_norm(k_BTHK)
        q_BHTK, k_BHTK, v_BHTK = (y_BTHK.transpose(1, 2) for y_BTHK in (q_BTHK, k_BTHK, v_BTHK))
        if shared.rotation is not None:
            q_BHTK, k_BHTK = rotated(q_BHTK, shared.rotation), rotated(k_BHTK, shared.rotation)
        if self.value_mix is not None:
            assert shared.first_values_BHTK is not None
            v_BHTK = torch.lerp(v_BHTK, shared.first_values_BHTK, self.value_mix.to(v_BHTK.dtype))
        return q_BHTK, k_BHTK, v_BHTK

    def forward(self, x_BTD: Tensor, shared: Shared) -> tuple[Tensor, Tensor | None]:
        q_BHTK, k_BHTK, v_BHTK = self.queries_keys_values(x_BTD, shared)
        kept_BHSK = None if shared.cache is None else shared.cache.update(k_BHTK, v_BHTK)
        if kept_BHSK is not None and shared.visible_B1TS is not None:
            y_BHTK = F.scaled_dot_product_attention(q_BHTK, *kept_BHSK, attn_mask=shared.visible_B1TS)
        elif self.kind == "naive":
            y_BHTK = naive_attention(q_BHTK, k_BHTK, v_BHTK)
        elif self.kind == "flex":
            # In heads' own order: compiled for a CPU, torch 2.13 gave wrong numbers for operands computed in another.
            q_BHTK, k_BHTK, v_BHTK = (y_BHTK.contiguous() for y_BHTK in (q_BHTK, k_BHTK, v_BHTK))
            y_BHTK = flex_attention(q_BHTK, k_BHTK, v_BHTK, block_mask=shared.mask)
        else:
            y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        y_BTD = self.c_proj(y_BHTK.transpose(1, 2).reshape(x_BTD.shape))
        return y_BTD, v_BHTK if self.gives_values else None


def naive_attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    """Vaswani et al. 2017, equation 1, with a causal mask."""
    T = q_BHTK.shape[2]
    is_future_TT = torch.ones(T, T, dtype=torch.bool, device=q_BHTK.device).triu(1)
    return attention_weights(q_BHTK, k_BHTK, is_future_TT).to(v_BHTK.dtype) @ v_BHTK


def attention_weights(q_BHTK: Tensor, k_BHTK: Tensor, is_hidden_TT: Tensor) -> Tensor:
    """What of each value is taken, [B, H, T, T]: rows add up to 1. The softmax is computed in fp32, and left in it.

    The queries are scaled rather than the scores, which could leave the range of fp16 before they are.
    """
    scores_BHTT = ((q_BHTK * q_BHTK.shape[3] ** -0.5) @ k_BHTK.transpose(2, 3)).float()
    return scores_BHTT.masked_fill(is_hidden_TT, -torch.inf).softmax(dim=3)


def rope_rotation(places_T: Tensor, head_size: int) -> Rotation:
    """Cosines and sines of position t times frequency base^(-2i / K), for element i and again for element i + K/2.

    Su et al. 2021 pair neighbours (equation 34); pairing an element with the one half a head on is the same up to the
    order of the rows of c_attn, and is what Llama's weights are for.
    """
    exponent_k = torch.arange(0, head_size, 2, device=places_T.device, dtype=torch.float32) / head_size
    angle_Tk = places_T.float()[..., None] * ROPE_BASE**-exponent_k
    angle_TK = torch.cat([angle_Tk, angle_Tk], dim=-1)
    return angle_TK.cos(), angle_TK.sin()


def rotated(x_BHTK: Tensor, rotation: Rotation) -> Tensor:
    """Each pair (x_i, x_{i + K/2}) turned by its angle, computed in fp32."""
    cos_TK, sin_TK = rotation
    first_BHTk, second_BHTk = x_BHTK.float().chunk(2, dim=3)
    turned_BHTK = torch.cat([-second_BHTk, first_BHTk], dim=3)
    return (x_BHTK.float() * cos_TK + turned_BHTK * sin_TK).to(x_BHTK.dtype)


def document_mask(tokens_BT: Tensor, eot_id: int | None) -> BlockMask:
    """Causal, and within documents: one begins at each `eot_id`; None: there are no documents to tell apart.

    Which blocks of 128 x 128 scores are needed at all is found by way of all B x T x T, a byte each.
    """
    B, T = tokens_BT.shape
    if eot_id is None:
        return create_block_mask(_is_past, None, None, T, T, device=tokens_BT.device)
    document_BT = (tokens_BT == eot_id).cumsum(dim=1)

    def is_seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (document_BT[b, q] == document_BT[b, k])

    return create_block_mask(is_seen, B, None, T, T, device=tokens_BT.device)


def _is_past(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k
