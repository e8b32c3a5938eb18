"""What the switches of recent recipes add to a model, against their equations: in blocks, tables, head and soft cap."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.base import softcap_slope, softcapped
from model.config import Softcap
from model.gpt import Block, build_model
from tests.unit.model.test_switches import RECIPE, TINY, moved, some_tokens, switched


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("norm_place", ["pre", "post"])
def test_embedding_norm_shortcut_value_embeddings_and_skips_by_their_equations(
    norm_place: str, num_layers: int
) -> None:
    """The stack of a U-Net: each block of the first half pushes its output, each of the second half pops one."""
    switches: dict[str, Any] = {"norm_place": norm_place, "embedding_norm": True, "embedding_shortcut": True}
    num_tables = (num_layers + 1) // 2
    model = moved(switched(**switches, num_layers=num_layers, value_embeddings=num_tables, skips=True))
    tokens_BT, pushed = some_tokens(), list[Tensor]()
    weights = dict(model.named_parameters())
    x_BTD = weights["transformer.wte.weight"][tokens_BT] + weights["transformer.wpe.weight"]
    norm = weights["transformer.ln_e.weight"], weights["transformer.ln_e.bias"]
    x_BTD = embedding_BTD = F.layer_norm(x_BTD, (32,), *norm)
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        x_BTD = x_BTD + weights[f"transformer.h.{index}.shortcut_scale"] * embedding_BTD
        if index >= num_tables:
            x_BTD = x_BTD + weights[f"transformer.h.{index}.skip_scale"] * pushed.pop()
        read_BTD = x_BTD if norm_place == "post" else block.ln_1(x_BTD)
        q_BTD, k_BTD, v_BTD = block.attn.c_attn(read_BTD).chunk(3, dim=2)
        rows_BTD = weights[f"transformer.vte.{min(index, num_layers - 1 - index)}.weight"][tokens_BT]
        v_BTD = v_BTD + weights[f"transformer.h.{index}.attn.table_scale"] * rows_BTD
        q, k, v = (y_BTD.view(2, 16, 2, 16).transpose(1, 2) for y_BTD in (q_BTD, k_BTD, v_BTD))
        y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + block.attn.c_proj(y_BHTK.transpose(1, 2).flatten(2))
        if norm_place == "post":
            x_BTD = block.ln_1(x_BTD)
            x_BTD = block.ln_2(x_BTD + block.mlp(x_BTD))
        else:
            x_BTD = x_BTD + block.mlp(block.ln_2(x_BTD))
        if len(pushed) < num_layers // 2 and index < num_layers // 2:
            pushed.append(x_BTD)
    assert not pushed
    outputs = [model.hidden_states(tokens_BT), model.transformer["ln_f"](x_BTD)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    parameters = [
        parameter for name, parameter in weights.items() if "_scale" in name or "vte" in name or "wte" in name
    ]
    slope = torch.linspace(-1, 1, 32)
    gradients = [torch.autograd.grad((y_BTD * slope).sum(), parameters) for y_BTD in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["tanh", "rsqrt"])
def test_the_softcaps_slope_is_its_derivative_and_stays_finite_far_beyond_the_cap(form: Any) -> None:
    softcap = Softcap(3.0, form)
    logits = torch.cat([torch.linspace(-30, 30, 101), torch.logspace(2, 18, 200), -torch.logspace(2, 18, 200)])
    exact = logits.double().requires_grad_()
    expected = 3 * torch.tanh(exact / 3) if form == "tanh" else 3 * exact / (exact**2 + 3**2).sqrt()
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    capped = softcapped(logits, softcap)
    torch.testing.assert_close(capped, expected.float())
    torch.testing.assert_close(softcap_slope(capped, softcap), slope.float(), rtol=1e-4, atol=1e-6)


def test_initial_values_of_a_head_at_zero_of_tables_and_of_learned_numbers() -> None:
    model = build_model(switched(**RECIPE | {"value_embeddings": 2, "zero_init_projections": False}), seed=1)
    assert not model.lm_head.weight.any()
    tensors = model.state_dict()
    tables = [tensors[f"transformer.{name}.weight"] for name in ("wte", "vte.0", "vte.1")]
    for table, other in itertools.combinations(tables, 2):
        assert not torch.equal(table, other)
    assert all(table[:100].std().item() == pytest.approx(0.02, rel=0.05) and not table[100:].any() for table in tables)
    numbers = {name.removeprefix("transformer.h."): t.item() for name, t in tensors.items() if t.numel() == 1}
    assert numbers == (
        {f"{index}.attn.table_scale": 0.5 for index in (0, 1, 2)}
        | {f"{index}.attn.value_mix": 0.5 for index in (1, 2)}
        | {f"{index}.shortcut_scale": 0.0 for index in (0, 1, 2)}
        | {"2.skip_scale": 1.0}
    )
    tied = build_model(TINY, seed=1)  # at 0 the shortcut changes no bit
    assert torch.equal(tied(some_tokens()), build_model(switched(embedding_shortcut=True), seed=1)(some_tokens()))
