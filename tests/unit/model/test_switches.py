"""Each switch of the model against a reference that others wrote: transformers, torch's layers, or an equation."""

import dataclasses
import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import GPT2, ModelConfig
from model.gpt import GPT, Block, Shared, build_model, naive_attention
from model.layers import make_norm
from train.losses import LossModel

TINY = ModelConfig(num_layers=3, num_heads=2, width=32, vocab_size=100, context_len=16)
MODERN: dict[str, Any] = {
    "position_embedding": "rope",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "tie": False,
    "bias": False,
    "qk_norm": True,
    "logit_softcap": 5.0,
    "value_residual": True,
}
RECIPE: dict[str, Any] = {
    "position_embedding": "rope",
    "norm": "rmsnorm",
    "mlp": "relu2",
    "tie": False,
    "bias": False,
    "qk_norm": True,
    "logit_softcap": 5.0,
    "softcap_form": "rsqrt",
    "zero_init_projections": True,
    "zero_init_head": True,
    "embedding_norm": True,
    "embedding_shortcut": True,
    "value_residual": True,
    "value_embeddings": 1,
    "skips": True,
}
ONE_BY_ONE: list[dict[str, Any]] = [
    {"position_embedding": "rope"},
    {"position_embedding": "none"},
    {"norm": "rmsnorm"},
    {"norm": "none"},
    {"norm_place": "post"},
    {"norm": "rmsnorm", "norm_place": "post"},
    {"mlp": "relu2"},
    {"mlp": "silu"},
    {"mlp": "swiglu"},
    {"mlp": "swiglu", "mlp_width": 48},
    {"mlp_width": 40},
    {"tie": False},
    {"bias": False},
    {"qk_norm": True},
    {"logit_softcap": 2.0},
    {"zero_init_projections": True},
    {"value_residual": True},
    {"logit_softcap": 2.0, "softcap_form": "rsqrt"},
    {"tie": False, "zero_init_head": True},
    {"embedding_norm": True},
    {"embedding_shortcut": True},
    {"value_embeddings": 2},
    {"skips": True},
    {"attention": "naive"},
    {"vocab_multiple": 1},
    {"dropout": 0.1},
    {"window": 5},
    MODERN,
    RECIPE,
]


def named(switches: dict[str, Any]) -> str:
    return " ".join(f"{name} {value}" for name, value in switches.items())


def switched(**switches: Any) -> ModelConfig:
    return dataclasses.replace(TINY, **switches)


def moved(config: ModelConfig, seed: int = 1, compute_dtype: torch.dtype = torch.float32) -> GPT:
    """Return a model whose parameters are all away from their initial 0, 1 and 0.5."""
    model = build_model(config, seed=seed, compute_dtype=compute_dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def some_tokens(B: int = 2, T: int = 16) -> Tensor:
    return torch.randint(TINY.vocab_size, (B, T), generator=torch.Generator().manual_seed(5))


# --- Whole models against transformers --------------------------------------------------------------------------------

LLAMAS_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "transformer.h": "model.layers",
    "attn.c_proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    return transformers


def with_llamas_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return our tensors under Llama's names, with c_attn cut in three."""
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in LLAMAS_NAMES.items():
            name = name.replace(ours, theirs)
        if "attn.c_attn" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("attn.c_attn", f"self_attn.{part}_proj")] = rows
        else:
            renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("architecture", ["Llama", "Qwen3"])
def test_with_their_switches_it_is_llama_and_qwen3(architecture: str) -> None:
    """Logits and gradients hold rope, RMSNorm, SwiGLU, QK-norm, the untied head and the order of it all."""
    is_qwen = architecture == "Qwen3"
    config = switched(position_embedding="rope", norm="rmsnorm", mlp="swiglu", bias=False, tie=is_qwen, qk_norm=is_qwen)
    their_config = getattr(transformers(), f"{architecture}Config")(
        vocab_size=config.padded_vocab_size,
        hidden_size=config.width,
        intermediate_size=config.resolved_mlp_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        head_dim=config.head_size,
        max_position_embeddings=config.context_len,
        rms_norm_eps=1e-5,
        tie_word_embeddings=config.tie,
        pad_token_id=None,
    )
    ours, theirs = moved(config), getattr(transformers(), f"{architecture}ForCausalLM")(their_config)
    weights = with_llamas_names(dict(ours.named_parameters()))
    theirs.load_state_dict({"lm_head.weight": weights["model.embed_tokens.weight"]} | weights)
    tokens_BT = some_tokens()
    logits = [ours(tokens_BT), theirs(tokens_BT).logits]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    for logits_BTV in logits:
        F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
    gradients = with_llamas_names({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


# --- Parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "switches", [{}, {"bias": False}, {"norm_place": "post"}, {"norm_place": "post", "bias": False}, {"norm": "none"}]
)
def test_a_block_is_torchs_transformer_layer(switches: dict[str, Any]) -> None:
    config = switched(**switches)
    block = moved(config).blocks[1]
    assert isinstance(block, Block)
    is_first = config.norm_place == "pre"
    gelu = partial(F.gelu, approximate="tanh")
    layer = nn.TransformerEncoderLayer(32, 2, 128, 0.0, gelu, batch_first=True, norm_first=is_first, bias=config.bias)
    if config.norm == "none":
        layer.norm1, layer.norm2 = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    names = {"attn.c_attn.": "self_attn.in_proj_", "attn.c_proj": "self_attn.out_proj", "ln_1": "norm1"}
    names |= {"mlp.c_fc": "linear1", "mlp.c_proj": "linear2", "ln_2": "norm2"}
    weights = {}
    for name, tensor in block.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        weights[name] = tensor
    layer.load_state_dict(weights)
    mask_TT = nn.Transformer.generate_square_subsequent_mask(16)
    x_BTD = torch.randn(2, 16, 32, requires_grad=True)
    outputs = [block(x_BTD, Shared())[0], layer(x_BTD, src_mask=mask_TT)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    slope = torch.linspace(-1, 1, 32)
    gradients = [torch.autograd.grad((y_BTD * slope).sum(), x_BTD)[0] for y_BTD in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_norms_are_computed_in_fp32_and_stand_where_they_should() -> None:
    x_BD = 100 + torch.randn(4, 32).bfloat16()
    for norm in ("layernorm", "rmsnorm"):
        module = make_norm(switched(norm=norm))
        for parameter in module.parameters():
            nn.init.ones_(parameter)
        assert module(x_BD).dtype == torch.bfloat16
        assert torch.equal(module(x_BD), module(x_BD.float()).bfloat16())
    for switches, part in (({"norm_place": "post"}, "ln_f"), ({"norm": "none"}, "ln_")):
        assert not [name for name in build_model(switched(**switches), seed=1).state_dict() if part in name]


def test_naive_attention_equals_sdpa_and_stays_in_the_range_of_fp16() -> None:
    fused, naive = (build_model(switched(**MODERN, attention=kind), seed=1) for kind in ("sdpa", "naive"))
    torch.testing.assert_close(naive(some_tokens()), fused(some_tokens()), rtol=0, atol=1e-6)
    # 64 products of 40 x 40 exceed 65,504; a head's scaled score does not.
    q_BHTK = torch.full((1, 1, 3, 64), 40.0, dtype=torch.float16)
    torch.testing.assert_close(naive_attention(q_BHTK, q_BHTK, q_BHTK), q_BHTK)


def test_without_position_embedding_one_block_does_not_see_the_order() -> None:
    model = build_model(switched(position_embedding="none", num_layers=1), seed=1)
    assert "transformer.wpe.weight" not in model.state_dict()
    same_TV = model(torch.full((1, 16), 7))[0]
    torch.testing.assert_close(same_TV, same_TV[:1].expand_as(same_TV))
    tokens_BT = some_tokens(1)
    swapped_BT = tokens_BT[:, [1, 0, *range(2, 16)]]
    torch.testing.assert_close(model(tokens_BT)[:, 15], model(swapped_BT)[:, 15])


def test_the_value_residual_by_its_equation() -> None:
    model = moved(switched(value_residual=True))
    tokens_BT = some_tokens()
    weights = dict(model.named_parameters())
    assert [name for name in weights if "value_mix" in name] == [f"transformer.h.{i}.attn.value_mix" for i in (1, 2)]
    x_BTD = weights["transformer.wte.weight"][tokens_BT] + weights["transformer.wpe.weight"]
    first_BHTK = None
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        q, k, v = (y.view(2, 16, 2, 16).transpose(1, 2) for y in block.attn.c_attn(block.ln_1(x_BTD)).chunk(3, dim=2))
        if first_BHTK is None:
            first_BHTK = v
        else:
            mix = weights[f"transformer.h.{index}.attn.value_mix"]
            v = mix * first_BHTK + (1 - mix) * v
        y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + block.attn.c_proj(y_BHTK.transpose(1, 2).flatten(2))
        x_BTD = x_BTD + block.mlp(block.ln_2(x_BTD))
    outputs = [model.hidden_states(tokens_BT), model.transformer["ln_f"](x_BTD)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    parameters = [parameter for name, parameter in weights.items() if "c_attn" in name or "value_mix" in name]
    slope = torch.linspace(-1, 1, 32)
    gradients = [torch.autograd.grad((y_BTD * slope).sum(), parameters) for y_BTD in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["tanh", "rsqrt"])
@pytest.mark.parametrize("chunk_tokens", [None, 1024])
def test_the_softcap_by_its_equation_in_logits_loss_and_gradients(chunk_tokens: int | None, form: str) -> None:
    model = moved(switched(logit_softcap=2.0, softcap_form=form))
    inputs_BT, targets_BT = some_tokens(), some_tokens().roll(1, dims=1)
    raw_BTV = F.linear(model.hidden_states(inputs_BT), model.lm_head.weight)
    assert raw_BTV.abs().max() > 2
    capped_BTV = 2 * torch.tanh(raw_BTV / 2) if form == "tanh" else 2 * raw_BTV / (raw_BTV**2 + 2**2).sqrt()
    torch.testing.assert_close(model(inputs_BT), capped_BTV)
    expected = F.cross_entropy(capped_BTV[..., :100].flatten(0, 1), targets_BT.flatten(), reduction="sum")
    loss_model = LossModel(model, chunk_tokens=chunk_tokens)
    loss = loss_model(inputs_BT, targets_BT, torch.ones(()))[0]
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, list(model.parameters())) for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss_model.token_losses(inputs_BT, targets_BT).sum(), expected)


def in_own_documents(tokens_BT: Tensor, eot_id: int) -> Tensor:
    """Return the plain model's logits of each document by itself, at the positions where the document stood."""
    model = build_model(switched(position_embedding="rope"), seed=1)  # rope depends on distances only
    logits_BTV = torch.empty(*tokens_BT.shape, model.config.padded_vocab_size)
    for row_T, logits_TV in zip(tokens_BT, logits_BTV, strict=True):
        begins = sorted({0, *(row_T == eot_id).nonzero().flatten().tolist()})
        for begin, end in zip(begins, [*begins[1:], len(row_T)], strict=True):
            logits_TV[begin:end] = model(row_T[None, begin:end])[0]
    return logits_BTV


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_with_flex_a_token_sees_only_its_own_document() -> None:
    tokens_BT = some_tokens(3)
    tokens_BT[0, [4, 5, 11]] = tokens_BT[1, 0] = 3
    model, unmarked = (
        build_model(switched(position_embedding="rope", attention="flex", eot_id=eot_id), seed=1)
        for eot_id in (3, None)
    )
    plain = build_model(switched(position_embedding="rope"), seed=1)
    torch.testing.assert_close(model(tokens_BT), in_own_documents(tokens_BT, 3), rtol=0, atol=1e-5)
    assert (model(tokens_BT) - plain(tokens_BT)).abs().max() > 1e-3
    torch.testing.assert_close(unmarked(tokens_BT), plain(tokens_BT), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [1, 5, 16])
def test_a_token_sees_its_window_and_no_more(window: int) -> None:
    """In one block without positions, so that nothing else tells tokens apart; and alike in every attention."""
    switches: dict[str, Any] = {"position_embedding": "none", "num_layers": 1}
    models = {
        kind: build_model(switched(**switches, attention=kind, window=window, eot_id=None), seed=1)
        for kind in ("sdpa", "naive", "flex")
    }
    tokens_BT = some_tokens(1)
    logits_BTV = models["sdpa"](tokens_BT)
    for kind in ("naive", "flex"):
        torch.testing.assert_close(models[kind](tokens_BT), logits_BTV, rtol=0, atol=1e-5)
    for changed in range(16):
        other_BT = tokens_BT.clone()
        other_BT[0, changed] = (other_BT[0, changed] + 1) % 100
        is_changed_T = (models["sdpa"](other_BT) - logits_BTV).abs().amax(dim=2)[0] > 1e-6
        assert is_changed_T.nonzero().flatten().tolist() == list(range(changed, min(16, changed + window)))
    if window == 16:
        torch.testing.assert_close(build_model(switched(**switches), seed=1)(tokens_BT), logits_BTV, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_with_flex_a_window_ends_at_the_documents_begin() -> None:
    switches: dict[str, Any] = {"position_embedding": "none", "num_layers": 1}
    tokens_BT = torch.cat([some_tokens(1, 8), torch.tensor([[3]]), some_tokens(1, 7)], dim=1)
    model = build_model(switched(**switches, attention="flex", eot_id=3, window=5), seed=1)
    parts = [build_model(switched(**switches, window=5), seed=1)(part) for part in tokens_BT.split(8, dim=1)]
    torch.testing.assert_close(model(tokens_BT), torch.cat(parts, dim=1), rtol=0, atol=1e-5)


# --- Every switch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", [{}, *ONE_BY_ONE], ids=named)
def test_a_switch_keeps_causality_learns_and_changes_no_other_initial_value(switches: dict[str, Any]) -> None:
    config = switched(**switches)
    assert config.faults() == []
    model = build_model(config, seed=1)
    before, after = (dict(m.named_parameters()) for m in (build_model(TINY, seed=1), model))
    shared = [name for name in before if name in after and before[name].shape == after[name].shape]
    different = [name for name in shared if not torch.equal(before[name], after[name])]
    expected = [name for name in shared if name.endswith("c_proj.weight") and config.zero_init_projections]
    assert different == expected and len(shared) > 4
    tokens_BT = some_tokens()
    changed_BT = tokens_BT.clone()
    changed_BT[0, 9] = (changed_BT[0, 9] + 1) % 100
    x_BTD, changed_BTD = model.hidden_states(tokens_BT), model.hidden_states(changed_BT)  # a head may start at 0
    torch.testing.assert_close(x_BTD[:, :9], changed_BTD[:, :9], rtol=0, atol=1e-6)
    assert not torch.equal(x_BTD[0, 9:], changed_BTD[0, 9:])
    loss_model, optimizer = LossModel(model, chunk_tokens=None), torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(20):
        seeds_B = torch.tensor([2 * step, 2 * step + 1]) if config.dropout else None
        loss = loss_model(tokens_BT[:, :-1], tokens_BT[:, 1:], torch.tensor(1 / 30), seeds_B)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(100), abs=0.2) and losses[-1] < losses[0] - 1
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_initial_values_of_an_untied_head_and_of_projections_at_zero() -> None:
    model = build_model(switched(tie=False, zero_init_projections=True), seed=1)
    head, embedding = model.lm_head.weight, model.state_dict()["transformer.wte.weight"]
    assert not torch.equal(head, embedding)
    assert head[:100].std().item() == pytest.approx(0.02, rel=0.05) and not head[100:].any()
    tokens_BT = some_tokens()
    x_BTD = embedding[tokens_BT] + model.state_dict()["transformer.wpe.weight"]
    assert torch.equal(model.hidden_states(tokens_BT), model.transformer["ln_f"](x_BTD)), "blocks start as identities"


def test_swiglus_width_keeps_the_parameters_within_2_percent() -> None:
    for width in (*range(8, 200), 384, 512, 768, 1024, 1280, 1600, 2048, 12288):
        mlp_width = dataclasses.replace(GPT2, width=width, num_heads=1, mlp="swiglu").resolved_mlp_width
        assert 3 * mlp_width * width == pytest.approx(8 * width**2, rel=0.02), width
        assert width < 1600 or mlp_width % 64 == 0
    # 853.33 is 2.5 % away from a multiple of 64, so it becomes a multiple of 32.
    assert [switched(mlp="swiglu", width=width).resolved_mlp_width for width in (768, 320)] == [2048, 864]
    assert [switched(mlp="relu2", mlp_width=width).resolved_mlp_width for width in (None, 7)] == [128, 7]


def test_impossible_shapes_are_refused() -> None:
    softcap = "--model.logit-softcap {} must be a finite number above 0, or None"
    rope = "--model.position-embedding rope needs an even head size, not 1 = --model.width 32 / --model.num-heads 32"
    for switches, message in (
        ({"position_embedding": "rope", "num_heads": 32}, f"{rope}; try --model.width 64"),
        (
            {"norm": "none", "norm_place": "post"},
            "--model.norm-place post says where norms stand, but --model.norm none",
        ),
        ({"logit_softcap": 0.0}, softcap.format(0.0)),
        ({"logit_softcap": math.inf}, softcap.format("inf")),
        ({"mlp_width": 0}, "--model.mlp-width 0 must be at least 1"),
        ({"norm": "none", "embedding_norm": True}, "--model.embedding-norm applies the norm of --model.norm, which"),
        ({"zero_init_head": True}, "--model.zero-init-head needs --model.no-tie"),
        ({"value_embeddings": 3}, "--model.value-embeddings 3 must be from 0 to 2, half of --model.num-layers 3"),
        ({"value_embeddings": -1}, "--model.value-embeddings -1 must be from 0 to 2, half of --model.num-layers 3"),
        ({"window": 0}, "--model.window 0 must lie between 1 and --train.seq-len 16"),
        ({"window": 17}, "--model.window 17 must lie between 1 and --train.seq-len 16"),
    ):
        (fault,) = switched(**switches).faults()
        assert fault.startswith(message)
