"""GPT-2 (Radford et al. 2019) and every switch of model/config.py: the whole forward pass.

The model is plain single-device PyTorch. It knows nothing of processes, precision policies or training.
Read it from its last class upward: GPT calls its blocks, a Block calls Attention and MLP. Its layers are those of
torch, with casts (model/layers.py).

Tensors carry their shape in their name: B batch, T time, D model, H heads, K head size, F feed-forward, V padded
vocabulary. State-dict names are Hugging Face's; every matrix has nn.Linear's orientation.
"""

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model.base import EMBEDDING, HEAD, INIT_STD, LanguageModel, init_weights
from model.config import ModelConfig
from model.dropout import dropped, place_keys
from model.layers import NORM_EPS, Embedding, Linear, RMSNorm, learned_number, make_norm, plus_scaled

ROPE_BASE = 10_000.0  # Su et al. 2021, section 3.2.2
# Initial values of a block's learned numbers: its own values and the first block's in equal parts; half a row of the
# value embedding; nothing of the embedding; the whole output of an earlier block.
INITIAL_NUMBERS = {"value_mix": 0.5, "table_scale": 0.5, "shortcut_scale": 0.0, "skip_scale": 1.0}

Rotation = tuple[Tensor, Tensor]  # cosines and sines, fp32 [T, K], or [B, 1, T, K] where rows have other positions


# --- Positions and masks ----------------------------------------------------------------------------------------------


def rope_rotation(positions_T: Tensor, head_size: int) -> Rotation:
    """Return cosines and sines of position t times frequency base^(-2i / K), for elements i and i + K/2.

    Su et al. 2021 pair neighbouring elements (equation 34). Pairing an element with the one half a head further on is
    the same up to the order of the rows of c_attn, and is what Llama's weights expect.
    """
    exponent_k = torch.arange(0, head_size, 2, device=positions_T.device, dtype=torch.float32) / head_size
    angle_Tk = positions_T.float()[..., None] * ROPE_BASE**-exponent_k
    angle_TK = torch.cat([angle_Tk, angle_Tk], dim=-1)
    return angle_TK.cos(), angle_TK.sin()


def rotated(x_BHTK: Tensor, rotation: Rotation) -> Tensor:
    """Return x with each pair (x_i, x_{i + K/2}) turned by its angle, computed in fp32."""
    cos_TK, sin_TK = rotation
    first_BHTk, second_BHTk = x_BHTK.float().chunk(2, dim=3)
    turned_BHTK = torch.cat([-second_BHTk, first_BHTk], dim=3)
    return (x_BHTK.float() * cos_TK + turned_BHTK * sin_TK).to(x_BHTK.dtype)


def hidden_tokens(T: int, window: int | None, device: torch.device) -> Tensor:
    """Return which tokens a token must not look at, bool [T, T]: later ones, and those outside its window."""
    all_TT = torch.ones(T, T, dtype=torch.bool, device=device)
    return all_TT.triu(1) if window is None else all_TT.triu(1) | all_TT.tril(-window)


def attention_bias(T: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what is added to the scores: 0, and -infinity for hidden tokens. All blocks keep the same [T, T]."""
    zeros_TT = torch.zeros(T, T, dtype=dtype, device=device)
    return zeros_TT.masked_fill_(hidden_tokens(T, window, device), -torch.inf)


def document_mask(tokens_BT: Tensor, eot_id: int | None, window: int | None = None) -> BlockMask:
    """Return the mask of causal attention within documents, each of which begins with `eot_id`, and in the window.

    With `eot_id` None there are no documents to tell apart. Finding the blocks of 128 x 128 scores that are needed
    takes B x T x T bytes for a moment.
    """
    B, T = tokens_BT.shape
    span = T if window is None else window
    if eot_id is None:
        return create_block_mask(
            lambda b, h, q, k: (q >= k) & (q - k < span), None, None, T, T, device=tokens_BT.device
        )
    document_BT = (tokens_BT == eot_id).cumsum(dim=1)

    def is_visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < span) & (document_BT[b, q] == document_BT[b, k])

    return create_block_mask(is_visible, B, None, T, T, device=tokens_BT.device)


# --- Attention --------------------------------------------------------------------------------------------------------


class BlockCache(Protocol):
    """One block's keys and values of the tokens before this pass (model/generation/kv_cache.py)."""

    def update(self, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store this pass's keys and values; return all that its tokens may look at, [B, H, S, K] each."""
        ...


class Past(Protocol):
    """The tokens before this pass, as generation keeps them (model/generation/kv_cache.py)."""

    @property
    def positions_BT(self) -> Tensor: ...  # noqa: N802  # a tensor's name carries its shape

    def of_block(self, index: int) -> BlockCache: ...

    def visible(self, tokens_BT: Tensor) -> Tensor | None: ...


class Shared(NamedTuple):
    """Tensors that one forward pass makes once and every block's attention reads; None where no switch needs them.

    No module stores them: DDP would have to keep such buffers alike on all processes, and a mask belongs to its batch.
    """

    rotation: Rotation | None = None
    mask: BlockMask | None = None
    bias_TT: Tensor | None = None
    first_values_BHTK: Tensor | None = None
    table_rows_BTD: Tensor | None = None
    embedding_BTD: Tensor | None = None
    skipped_BTD: Tensor | None = None
    cache: BlockCache | None = None
    visible_B1TS: Tensor | None = None
    dropout_keys_PB2: Tensor | None = None  # of the block's two places: after attention and after the MLP


class Attention(nn.Module):
    """Causal multi-head self-attention: x_BTD -> (y_BTD to add to the stream, the values if later blocks mix them)."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.kind = config.attention
        self.window = config.window
        self.c_attn = Linear(config.width, 3 * config.width, bias=config.bias)
        self.c_proj = Linear(config.width, config.width, bias=config.bias)
        self.q_norm = RMSNorm(config.head_size, eps=NORM_EPS) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, eps=NORM_EPS) if config.qk_norm else None
        self.gives_values = config.value_residual and index == 0
        self.value_mix = learned_number(config.value_residual and index > 0)
        self.table_scale = learned_number(config.value_table(index) is not None)

    def queries_keys_values(self, x_BTD: Tensor, shared: Shared) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values after QK-norm, rotation and all additions, each [B, H, T, K]."""
        B, T, D = x_BTD.shape
        q_BTD, k_BTD, v_BTD = self.c_attn(x_BTD).split(D, dim=2)
        v_BTD = plus_scaled(v_BTD, shared.table_rows_BTD, self.table_scale)
        q_BTHK, k_BTHK, v_BTHK = (y_BTD.view(B, T, self.num_heads, -1) for y_BTD in (q_BTD, k_BTD, v_BTD))
        if self.q_norm is not None and self.k_norm is not None:  # before the transpose, so that the result is dense
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
        cached_keys_values = None if shared.cache is None else shared.cache.update(k_BHTK, v_BHTK)
        if cached_keys_values is not None and shared.visible_B1TS is not None:
            y_BHTK = F.scaled_dot_product_attention(q_BHTK, *cached_keys_values, attn_mask=shared.visible_B1TS)
        elif self.kind == "naive":
            y_BHTK = naive_attention(q_BHTK, k_BHTK, v_BHTK, window=self.window)
        elif self.kind == "flex":
            # Dense per head: compiled for a CPU, torch 2.13 gave wrong numbers for operands in another memory order.
            q_BHTK, k_BHTK, v_BHTK = (y_BHTK.contiguous() for y_BHTK in (q_BHTK, k_BHTK, v_BHTK))
            y_BHTK = flex_attention(q_BHTK, k_BHTK, v_BHTK, block_mask=shared.mask)
        else:
            bias_TT = shared.bias_TT
            y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, bias_TT, is_causal=bias_TT is None)
        y_BTD = self.c_proj(y_BHTK.transpose(1, 2).reshape(x_BTD.shape))
        return y_BTD, (v_BHTK if self.gives_values else None)


def naive_attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, *, window: int | None = None) -> Tensor:
    """Return attention by Vaswani et al. 2017, equation 1, causal and with all scores in memory."""
    is_hidden_TT = hidden_tokens(q_BHTK.shape[2], window, q_BHTK.device)
    return attention_weights(q_BHTK, k_BHTK, is_hidden_TT).to(v_BHTK.dtype) @ v_BHTK


def attention_weights(q_BHTK: Tensor, k_BHTK: Tensor, is_hidden_TT: Tensor) -> Tensor:
    """Return the weight of each value, fp32 [B, H, T, T]; each row adds up to 1.

    The queries are scaled rather than the scores, since unscaled scores can exceed the range of fp16.
    """
    scores_BHTT = ((q_BHTK * q_BHTK.shape[3] ** -0.5) @ k_BHTK.transpose(2, 3)).float()
    return scores_BHTT.masked_fill(is_hidden_TT, -torch.inf).softmax(dim=3)


# --- Blocks -----------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Two matrices with a non-linearity between them, x_BTD -> y_BTD; SwiGLU has a third matrix for its gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        if self.kind == "swiglu":
            self.c_gate = Linear(config.width, config.resolved_mlp_width, bias=config.bias)
        self.c_fc = Linear(config.width, config.resolved_mlp_width, bias=config.bias)
        self.c_proj = Linear(config.resolved_mlp_width, config.width, bias=config.bias)

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
    """Attention, then an MLP, each added to the residual stream: x_BTD -> (x_BTD, values that later blocks mix).

    With pre-norm each half reads the normalised stream. With post-norm it reads the stream itself, which is normalised
    after each addition.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.is_post_norm = config.norm_place == "post"
        self.dropout = config.dropout
        self.ln_1 = make_norm(config)
        self.attn = Attention(config, index)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)
        self.shortcut_scale = learned_number(config.embedding_shortcut)
        self.skip_scale = learned_number(config.skip_source(index) is not None)

    def forward(self, x_BTD: Tensor, shared: Shared) -> tuple[Tensor, Tensor | None]:
        x_BTD = plus_scaled(x_BTD, shared.embedding_BTD, self.shortcut_scale)
        x_BTD = plus_scaled(x_BTD, shared.skipped_BTD, self.skip_scale)
        after_attention, after_mlp = (None, None) if shared.dropout_keys_PB2 is None else shared.dropout_keys_PB2
        if self.is_post_norm:
            y_BTD, values_BHTK = self.attn(x_BTD, shared)
            x_BTD = self.ln_1(x_BTD + dropped(y_BTD, after_attention, self.dropout))
            return self.ln_2(x_BTD + dropped(self.mlp(x_BTD), after_mlp, self.dropout)), values_BHTK
        y_BTD, values_BHTK = self.attn(self.ln_1(x_BTD), shared)
        x_BTD = x_BTD + dropped(y_BTD, after_attention, self.dropout)
        return x_BTD + dropped(self.mlp(self.ln_2(x_BTD)), after_mlp, self.dropout), values_BHTK


def another_view(x: Tensor) -> Tensor:
    """Return x as another tensor object: a block that gets one object twice would be compiled by itself."""
    return x.view_as(x)


class GPT(LanguageModel):
    """tokens_BT int64 -> logits_BTV. Norms are computed in fp32, everything else in `compute_dtype`."""

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, compute_dtype=compute_dtype)
        parts: dict[str, nn.Module] = {"wte": Embedding(config.padded_vocab_size, config.width)}
        if config.position_embedding == "learned":
            parts["wpe"] = Embedding(config.context_len, config.width)
        parts["vte"] = nn.ModuleList(
            Embedding(config.padded_vocab_size, config.width) for _ in range(config.value_embeddings)
        )
        parts["ln_e"] = make_norm(config) if config.embedding_norm else nn.Identity()
        parts["h"] = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        parts["ln_f"] = make_norm(config) if config.has_last_norm else nn.Identity()
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = Linear(config.width, config.padded_vocab_size, bias=False)
        self.tie_weights()

    @property
    def is_tied(self) -> bool:
        return self.config.tie

    def tie_weights(self) -> None:
        embedding = self.transformer["wte"]
        assert isinstance(embedding, nn.Embedding)
        if self.is_tied:
            self.lm_head.weight = embedding.weight

    @property
    def blocks(self) -> nn.ModuleList:
        blocks = self.transformer["h"]
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """Return the modules to compile: the blocks, and the norms before and after them."""
        norms = [self.transformer["ln_e"]] if self.config.embedding_norm else []
        return [*self.blocks, *norms, *([self.transformer["ln_f"]] if self.config.has_last_norm else [])]

    def training_states(self, tokens_BT: Tensor, seeds_B: Tensor | None) -> Tensor:
        return self.hidden_states(tokens_BT, seeds_B=seeds_B)

    def hidden_states(self, tokens_BT: Tensor, past: Past | None = None, *, seeds_B: Tensor | None = None) -> Tensor:
        """Return the normalised residual stream after the last block, x_BTD. `past`: the tokens before these.

        `seeds_B`, int64, draws each row's dropout, of which there is none without it.
        """
        config, T = self.config, self.check_length(tokens_BT)
        positions = torch.arange(T, device=tokens_BT.device) if past is None else past.positions_BT
        x_BTD = self.transformer["wte"](tokens_BT)
        if config.position_embedding == "learned":
            x_BTD = x_BTD + self.transformer["wpe"](positions)
        x_BTD = self.transformer["ln_e"](x_BTD).to(self.compute_dtype)
        keys_PB2 = None if seeds_B is None else place_keys(seeds_B, 1 + 2 * config.num_layers)
        if keys_PB2 is not None:
            x_BTD = dropped(x_BTD, keys_PB2[0], config.dropout)
        tables_rows = [table(tokens_BT).to(self.compute_dtype) for table in self.transformer["vte"].children()]
        heads_positions = positions if past is None else positions[:, None]  # [T], or [B, 1, T]
        visible_B1TS = None if past is None else past.visible(tokens_BT)
        needs_mask = config.attention == "flex" and visible_B1TS is None
        bias_TT = None
        if config.window is not None and config.attention == "sdpa" and visible_B1TS is None:
            bias_TT = attention_bias(T, config.window, x_BTD.dtype, x_BTD.device)
        shared = Shared(
            rotation=rope_rotation(heads_positions, config.head_size) if config.position_embedding == "rope" else None,
            mask=document_mask(tokens_BT, config.eot_id, config.window) if needs_mask else None,
            bias_TT=bias_TT,
            embedding_BTD=another_view(x_BTD) if config.embedding_shortcut else None,
            visible_B1TS=visible_B1TS,
        )
        skipped: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            table, source = config.value_table(index), config.skip_source(index)
            shared = shared._replace(
                table_rows_BTD=None if table is None else tables_rows[table],
                skipped_BTD=None if source is None else skipped.pop(source),
                cache=None if past is None else past.of_block(index),
                dropout_keys_PB2=None if keys_PB2 is None else keys_PB2[1 + 2 * index : 3 + 2 * index],
            )
            x_BTD, values_BHTK = block(x_BTD, shared)
            if values_BHTK is not None:
                shared = shared._replace(first_values_BHTK=values_BHTK)
            if config.skips and 2 * index + 1 < config.num_layers:
                skipped[index] = another_view(x_BTD)
        return self.transformer["ln_f"](x_BTD)

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Return GPT-2's initial value: normal(0, 0.02), residual projections / sqrt(2 L) (or 0), biases 0, norms 1."""
        config, value, last = self.config, torch.zeros(shape), name.rpartition(".")[2]
        is_projection = name.endswith("c_proj.weight")
        is_zero = (config.zero_init_projections and is_projection) or (config.zero_init_head and name == HEAD)
        if last in INITIAL_NUMBERS:
            value.fill_(INITIAL_NUMBERS[last])
        elif (".ln_" in name or "_norm." in name) and last == "weight":
            value.fill_(1.0)
        elif last != "bias" and not is_zero:
            # Radford et al. 2019, section 2.3
            std = INIT_STD / math.sqrt(2 * config.num_layers) if is_projection else INIT_STD
            rows = config.vocab_size if name in (EMBEDDING, HEAD) or ".vte." in name else shape[0]
            value[:rows].normal_(0.0, std, generator=generator)
        return value


def num_matrices(name: str) -> int:
    """Return how many matrices lie above each other in the weight `name` of a block: c_attn has three."""
    return 3 if name.endswith("c_attn.weight") else 1


def build_model(
    config: ModelConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> GPT:
    """Return a GPT with its initial weights, which depend on the config and the seed alone."""
    with torch.device("meta"):
        model = GPT(config, compute_dtype=compute_dtype)
    model.to_empty(device=device)
    model.tie_weights()
    init_weights(model, seed)
    return model
