"""Each switch of the model against a reference that somebody else wrote, or that is written out here.

Hugging Face's modules are the oracle where they have the part; compiled, naive and spread over processes, the model is
held against itself.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InputError
from model.config import GPT2, ModelConfig
from model.gpt import GPT, MLP, Block, Shared, build_model, make_norm, naive_attention, rope_rotation, rotated
from model.hf.format import from_hugging_face, to_hugging_face
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
    {"attention": "naive"},
    {"vocab_multiple": 1},
    MODERN,
]


def named(switches: dict[str, Any]) -> str:
    return " ".join(f"{name} {value}" for name, value in switches.items())


every_switch = pytest.mark.parametrize("switches", ONE_BY_ONE, ids=named)


def switched(**switches: Any) -> ModelConfig:
    return dataclasses.replace(TINY, **switches)


def moved(config: ModelConfig, seed: int = 1) -> GPT:
    """A model whose parameters are all away from their initial 0, 1 and 0.5."""
    model = build_model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def some_tokens(B: int = 2, T: int = 16) -> Tensor:
    return torch.randint(TINY.vocab_size, (B, T), generator=torch.Generator().manual_seed(5))


def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    return transformers


def assert_same_function(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], x: Tensor, atol: float = 1e-5
) -> None:
    """The same outputs, and the same gradient of what went in."""
    outputs, gradients = list[Tensor](), list[Tensor]()
    for function in (ours, theirs):
        given = x.clone().requires_grad_()
        outputs.append(function(given))
        weight = torch.linspace(-1, 1, outputs[-1].numel()).view_as(outputs[-1])
        gradients += torch.autograd.grad((outputs[-1] * weight).sum(), given)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=atol)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=atol)


# --- A whole model against Hugging Face's -----------------------------------------------------------------------------


def test_with_llamas_switches_it_is_llama() -> None:
    """Positions, norm, MLP, head and the order of it all, gradients too."""
    config = switched(position_embedding="rope", norm="rmsnorm", mlp="swiglu", tie=False, bias=False)
    ours = moved(config)
    theirs = transformers().LlamaForCausalLM(
        transformers().LlamaConfig(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.width,
            intermediate_size=config.resolved_mlp_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.context_len,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            pad_token_id=None,
        )
    )
    theirs.load_state_dict(as_llamas(dict(ours.named_parameters())))
    assert_same_models(ours, theirs, as_llamas)


def test_with_qk_norm_too_it_is_qwen3() -> None:
    config = switched(position_embedding="rope", norm="rmsnorm", mlp="swiglu", bias=False, qk_norm=True)
    ours = moved(config)
    theirs = transformers().Qwen3ForCausalLM(
        transformers().Qwen3Config(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.width,
            intermediate_size=config.resolved_mlp_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            head_dim=config.head_size,
            max_position_embeddings=config.context_len,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
    )
    named_as_theirs = as_llamas(dict(ours.named_parameters()))
    theirs.load_state_dict(named_as_theirs | {"lm_head.weight": named_as_theirs["model.embed_tokens.weight"]})
    assert_same_models(ours, theirs, as_llamas)


def as_llamas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under Llama's names, c_attn cut in three."""
    names = {
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
    found = {}
    for name, tensor in tensors.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "attn.c_attn" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("attn.c_attn", f"self_attn.{part}_proj")] = rows
        else:
            found[name] = tensor
    return found


def assert_same_models(ours: GPT, theirs: nn.Module, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tokens_BT = some_tokens()
    found, wanted = ours(tokens_BT), theirs(tokens_BT).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for logits in (found, wanted):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
    gradients = rename({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("switches", "theirs"),
    [
        ({"mlp": "silu"}, {"activation_function": "silu"}),
        ({"mlp": "relu2"}, {"activation_function": "relu2"}),
        ({"mlp_width": 40}, {"n_inner": 40}),
        ({"tie": False}, {"tie_word_embeddings": False}),
        ({"attention": "naive"}, {}),
    ],
    ids=lambda given: named(given) or "gpt2",
)
def test_what_gpt2lmheadmodel_can_express_it_agrees_with(switches: dict[str, Any], theirs: dict[str, Any]) -> None:
    config = switched(**switches)
    model = transformers().GPT2LMHeadModel(
        transformers().GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_len,
            n_embd=config.width,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **theirs,
        )
    )
    ours = moved(config)
    model.load_state_dict(to_hugging_face(ours.state_dict(), config))
    tokens_BT = some_tokens()
    torch.testing.assert_close(ours(tokens_BT)[..., : config.vocab_size], model(tokens_BT).logits, rtol=1e-4, atol=1e-4)


def test_what_it_cannot_express_is_refused_by_name() -> None:
    config = switched(**MODERN)
    with pytest.raises(InputError) as caught:
        to_hugging_face(build_model(config, seed=1).state_dict(), config)
    for said in (
        "--model.position-embedding rope",
        "--model.norm rmsnorm",
        "--model.mlp swiglu",
        "--model.bias False",
        "--model.qk-norm True",
        "--model.logit-softcap 5.0",
        "--model.value-residual True",
    ):
        assert said in str(caught.value)
    assert "tie" not in str(caught.value)
    with pytest.raises(InputError, match=re.escape("has no --model.norm-place post;")):
        from_hugging_face({}, switched(norm_place="post"))


# --- Part by part -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("bias", [True, False])
def test_norms_by_their_equations(norm: Any, bias: bool) -> None:
    ours = make_norm(switched(norm=norm, bias=bias))
    for index, parameter in enumerate(ours.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    gain = ours.get_parameter("weight").detach()
    shift = ours.get_parameter("bias").detach() if bias and norm == "layernorm" else 0.0
    assert len(list(ours.parameters())) == (2 if bias and norm == "layernorm" else 1)

    def written_out(x: Tensor) -> Tensor:
        if norm == "layernorm":
            x = x - x.mean(dim=-1, keepdim=True)
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * gain + shift

    assert_same_function(ours, written_out, torch.randn(3, 5, 32))


def test_norms_are_computed_in_fp32() -> None:
    x = 100 + torch.randn(4, 32).bfloat16()
    for norm in ("layernorm", "rmsnorm"):
        ours = make_norm(switched(norm=norm))
        for parameter in ours.parameters():
            nn.init.ones_(parameter)
        assert ours(x).dtype == torch.bfloat16
        assert torch.equal(ours(x), ours(x.float()).bfloat16())


@pytest.mark.parametrize("kind", ["gelu", "relu2", "silu", "swiglu"])
def test_mlps_by_their_equations(kind: Any) -> None:
    mlp = MLP(switched(mlp=kind, mlp_width=24))
    for index, parameter in enumerate(mlp.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    weights = {name: parameter.detach() for name, parameter in mlp.named_parameters()}

    def product(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def written_out(x: Tensor) -> Tensor:
        y = product(x, "c_fc")
        if kind == "gelu":
            y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        elif kind == "relu2":
            y = torch.where(y > 0, y * y, 0.0)
        elif kind == "silu":
            y = y / (1 + torch.exp(-y))
        else:
            gate = product(x, "c_gate")
            y = gate / (1 + torch.exp(-gate)) * y
        return product(y, "c_proj")

    assert_same_function(mlp, written_out, 0.1 * torch.randn(3, 5, 32), atol=1e-3)


def test_rope_is_llamas() -> None:
    llama = transformers().models.llama.modeling_llama
    x_BHTK = torch.randn(2, 3, 16, 8)
    rope = llama.LlamaRotaryEmbedding(transformers().LlamaConfig(hidden_size=24, num_attention_heads=3))
    cos, sin = rope(x_BHTK, torch.arange(16)[None])
    assert_same_function(
        lambda x: rotated(x, rope_rotation(torch.arange(16), 8)),
        lambda x: llama.apply_rotary_pos_emb(x, x, cos, sin)[0],
        x_BHTK,
    )


def test_rope_turns_pairs_as_complex_numbers_and_only_differences_count() -> None:
    x_BHTK = torch.randn(1, 1, 16, 8, dtype=torch.float32)
    turned = rotated(x_BHTK, rope_rotation(torch.arange(16), 8))
    pairs = torch.complex(x_BHTK[..., :4].double(), x_BHTK[..., 4:].double())
    angles = torch.outer(torch.arange(16).double(), 10_000.0 ** (-torch.arange(4).double() / 4))
    wanted = pairs * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned.double(), torch.cat([wanted.real, wanted.imag], dim=3), rtol=0, atol=1e-5)

    same = x_BHTK[:, :, :1].expand(1, 1, 16, 8)
    same = rotated(same, rope_rotation(torch.arange(16), 8))[0, 0]
    products = same @ same.T
    for distance in range(16):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def test_written_out_attention_equals_sdpa() -> None:
    q, k, v = torch.randn(3, 2, 4, 33, 8)
    assert_same_function(
        lambda x: naive_attention(*x),
        lambda x: F.scaled_dot_product_attention(x[0], x[1], x[2], is_causal=True),
        torch.stack([q, k, v]),
        atol=1e-6,
    )


def test_written_out_attention_stays_in_the_range_of_fp16() -> None:
    """64 products of 40 x 40 are beyond 65,504, a head's scaled score is far below it."""
    q = torch.full((1, 1, 3, 64), 40.0, dtype=torch.float16)
    torch.testing.assert_close(naive_attention(q, q, q), q)


@pytest.mark.parametrize("switches", [{}, MODERN], ids=["gpt2", "modern"])
def test_models_with_written_out_attention_are_the_same_models(switches: dict[str, Any]) -> None:
    fused, naive = (build_model(switched(**switches, attention=kind), seed=1) for kind in ("sdpa", "naive"))
    torch.testing.assert_close(naive(some_tokens()), fused(some_tokens()), rtol=0, atol=1e-6)


def test_post_norm_by_its_equation() -> None:
    config = switched(norm_place="post")
    model = moved(config)
    assert [name for name, _ in model.named_parameters() if "ln_f" in name] == []
    block = model.blocks[1]
    assert isinstance(block, Block)

    def written_out(x: Tensor) -> Tensor:
        x = block.ln_1(x + block.attn(x, Shared())[0])
        found: Tensor = block.ln_2(x + block.mlp(x))
        return found

    assert_same_function(lambda x: block(x, Shared())[0], written_out, torch.randn(2, 16, 32))
    x_BTD = model.hidden_states(some_tokens())
    last = "transformer.h.2.ln_2"
    normed = (x_BTD - model.get_parameter(f"{last}.bias")) / model.get_parameter(f"{last}.weight")
    torch.testing.assert_close(normed.mean(dim=2), torch.zeros(2, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(normed.var(dim=2, correction=0), torch.ones(2, 16), rtol=0, atol=1e-3)


def test_without_norms_a_block_adds_its_halves() -> None:
    model = moved(switched(norm="none"))
    assert not [name for name, _ in model.named_parameters() if "ln_" in name]
    block = model.blocks[0]
    assert isinstance(block, Block)

    def written_out(x: Tensor) -> Tensor:
        x = x + block.attn(x, Shared())[0]
        found: Tensor = x + block.mlp(x)
        return found

    assert_same_function(lambda x: block(x, Shared())[0], written_out, torch.randn(2, 16, 32))


def test_without_positions_only_the_causal_mask_tells_them_apart() -> None:
    """And in one block, of the tokens before it, not in which order they stand."""
    model = build_model(switched(position_embedding="none", num_layers=1), seed=1)
    assert "transformer.wpe.weight" not in model.state_dict()
    same = model(torch.full((1, 16), 7))[0]
    torch.testing.assert_close(same, same[:1].expand_as(same))
    tokens_BT = some_tokens(1)
    swapped_BT = tokens_BT[:, [1, 0, *range(2, 16)]]
    torch.testing.assert_close(model(tokens_BT)[:, 15], model(swapped_BT)[:, 15])


def test_the_value_residual_by_its_equation() -> None:
    """Three blocks; every product written out but for the attention itself and the MLP."""
    config = switched(value_residual=True)
    model = moved(config)
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
    wanted = model.transformer["ln_f"](x_BTD)
    found = model.hidden_states(tokens_BT)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    parameters = [parameter for name, parameter in weights.items() if "c_attn" in name or "value_mix" in name]
    slope = torch.linspace(-1, 1, 32)
    for ours, theirs in zip(
        *(torch.autograd.grad((x * slope).sum(), parameters) for x in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_softcap_by_its_equation(chunked: bool, is_compiled: bool) -> None:
    """In logits, loss, gradients and validation alike."""
    model = moved(switched(logit_softcap=2.0))
    inputs_BT, targets_BT = some_tokens(), some_tokens().roll(1, dims=1)
    raw_BTV = F.linear(model.hidden_states(inputs_BT), model.lm_head.weight)
    assert raw_BTV.abs().max() > 2
    capped_BTV = 2 * torch.tanh(raw_BTV / 2)
    torch.testing.assert_close(model(inputs_BT), capped_BTV)
    wanted = F.cross_entropy(capped_BTV[..., :100].flatten(0, 1), targets_BT.flatten(), reduction="sum")
    loss_model = LossModel(model, chunked=chunked, compiled=is_compiled)
    found = loss_model(inputs_BT, targets_BT, torch.ones(()))
    torch.testing.assert_close(found[0], wanted)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found[0], parameters), torch.autograd.grad(wanted, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss_model.token_losses(inputs_BT, targets_BT).sum(), wanted)


def test_an_untied_head_is_a_matrix_of_its_own() -> None:
    model = build_model(switched(tie=False), seed=1)
    head, embedding = model.lm_head.weight, model.state_dict()["transformer.wte.weight"]
    assert not torch.equal(head, embedding)
    assert head[:100].std().item() == pytest.approx(0.02, rel=0.05) and not head[100:].any()


def test_projections_that_begin_at_zero_make_blocks_the_identity() -> None:
    model = build_model(switched(zero_init_projections=True), seed=1)
    tokens_BT = some_tokens()
    x_BTD = model.transformer["wte"](tokens_BT) + model.state_dict()["transformer.wpe.weight"]
    assert torch.equal(model.hidden_states(tokens_BT), model.transformer["ln_f"](x_BTD))


# --- Documents --------------------------------------------------------------------------------------------------------


def with_documents(tokens_BT: Tensor, eot_id: int) -> Tensor:
    """GPT-2's logits, documents cut out and put through the model one by one, at the places where they stood."""
    model = build_model(switched(position_embedding="rope"), seed=1)  # which sees only distances
    logits_BTV = torch.empty(*tokens_BT.shape, model.config.padded_vocab_size)
    for row_T, logits_TV in zip(tokens_BT, logits_BTV, strict=True):
        begins = sorted({0, *(row_T == eot_id).nonzero().flatten().tolist()})
        for begin, end in zip(begins, [*begins[1:], len(row_T)], strict=True):
            logits_TV[begin:end] = model(row_T[None, begin:end])[0]
    return logits_BTV


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_sees_a_tokens_own_document_alone() -> None:
    tokens_BT = some_tokens(3)
    tokens_BT[0, [4, 5, 11]] = tokens_BT[1, 0] = 3
    model = build_model(switched(position_embedding="rope", attention="flex", eot_id=3), seed=1)
    torch.testing.assert_close(model(tokens_BT), with_documents(tokens_BT, 3), rtol=0, atol=1e-5)
    plain = build_model(switched(position_embedding="rope"), seed=1)
    assert (model(tokens_BT) - plain(tokens_BT)).abs().max() > 1e-3
    unmarked = build_model(switched(position_embedding="rope", attention="flex", eot_id=None), seed=1)
    torch.testing.assert_close(unmarked(tokens_BT), plain(tokens_BT), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.slow
def test_flex_compiled_is_flex_in_eager() -> None:
    """A minute of C++ compilation."""
    tokens_BT = some_tokens(3)
    tokens_BT[0, [4, 5, 11]] = 3
    model = build_model(switched(position_embedding="rope", attention="flex", eot_id=3), seed=1)
    for part in model.compiled_parts:
        part.forward = torch.compile(part.forward, dynamic=False)
    torch.testing.assert_close(model(tokens_BT), with_documents(tokens_BT, 3), rtol=0, atol=1e-5)


# --- All together -----------------------------------------------------------------------------------------------------


@every_switch
def test_a_switch_changes_no_other_parameter(switches: dict[str, Any]) -> None:
    before, after = (dict(build_model(config, seed=1).named_parameters()) for config in (TINY, switched(**switches)))
    shared = [name for name in before if name in after and before[name].shape == after[name].shape]
    different = [name for name in shared if not torch.equal(before[name], after[name])]
    expected = [name for name in shared if name.endswith("c_proj.weight") and switches.get("zero_init_projections")]
    assert different == expected and len(shared) > 4


@every_switch
def test_it_is_causal_and_learns(switches: dict[str, Any]) -> None:
    model = build_model(switched(**switches), seed=1)
    tokens_BT = some_tokens()
    changed_BT = tokens_BT.clone()
    changed_BT[0, 9] = (changed_BT[0, 9] + 1) % 100
    before, after = model(tokens_BT), model(changed_BT)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    assert not torch.equal(before[0, 9:], after[0, 9:])
    loss_model, optimizer = LossModel(model, chunked=False), torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = loss_model(tokens_BT[:, :-1], tokens_BT[:, 1:], torch.tensor(1 / 30))[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(100), abs=0.2) and losses[-1] < losses[0] - 1
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)],  # two minutes of C++ compilation
)
@pytest.mark.parametrize(
    "switches", [MODERN, {"norm": "rmsnorm", "norm_place": "post", "mlp": "relu2", "attention": "naive"}], ids=named
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long(reason="the same graphs"))], ids=str
)
def test_compiled_equals_eager(switches: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    torch.compiler.reset()
    found = []
    for is_compiled in (False, True):
        model = build_model(switched(**switches), seed=1, compute_dtype=dtype)
        if is_compiled:
            for part in model.compiled_parts:
                part.forward = torch.compile(part.forward, dynamic=False, backend=backend)
        logits_BTV = model(some_tokens())
        logits_BTV.float().square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found.append((logits_BTV.detach().float(), torch.cat([gradient.flatten() for gradient in gradients])))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for eager, compiled in zip(*found, strict=True):
        assert (eager - compiled).norm() <= tolerance * eager.norm()


def test_hidden_sizes_match_parameters_within_2_percent() -> None:
    for width in (*range(8, 200), 384, 512, 768, 1024, 1280, 1600, 2048, 12288):
        mlp_width = dataclasses.replace(GPT2, width=width, num_heads=1, mlp="swiglu").resolved_mlp_width
        assert 3 * mlp_width * width == pytest.approx(8 * width**2, rel=0.02), width
        if width >= 1600:
            assert mlp_width % 64 == 0
    assert switched(mlp="swiglu", width=768).resolved_mlp_width == 2048
    assert (
        switched(mlp="relu2").resolved_mlp_width == 128 and switched(mlp="relu2", mlp_width=7).resolved_mlp_width == 7
    )


@pytest.mark.parametrize(
    ("switches", "said"),
    [
        (
            {"position_embedding": "rope", "num_heads": 32},
            "--model.position-embedding rope turns pairs, but a head has 1 = --model.width 32 / "
            "--model.num-heads 32 elements; "
            "try --model.width 64",
        ),
        (
            {"norm": "none", "norm_place": "post"},
            "--model.norm-place post says where norms stand, but --model.norm none",
        ),
        ({"logit_softcap": 0.0}, "--model.logit-softcap 0.0 must be a finite number above 0, or None"),
        ({"logit_softcap": math.inf}, "--model.logit-softcap inf must be a finite number above 0, or None"),
        ({"mlp_width": 0}, "--model.mlp-width 0 must be at least 1"),
    ],
)
def test_what_contradicts_itself_is_refused(switches: dict[str, Any], said: str) -> None:
    (fault,) = switched(**switches).faults()
    assert fault.startswith(said)


def test_everything_that_is_tested_is_sound() -> None:
    assert [switches for switches in ONE_BY_ONE if switched(**switches).faults()] == []
