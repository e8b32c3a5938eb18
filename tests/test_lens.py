"""Looking inside a model: every number against a pass that is written out here, every switch, and the model untouched."""

import hashlib
import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from data_prep.codec import ByteCodec
from data_prep.errors import InputError
from data_prep.textfiles import Options as TextOptions
from data_prep.textfiles import prepare
from model import hf_bridge, induction, lens, taps
from model.gpt import GPT
from model.trained import load_trained
from tests.runs import ROOT, called, tiny_config, with_save
from tests.test_kv_cache import FLEX
from tests.test_readme import help_of
from tests.test_switches import ONE_BY_ONE, TINY, moved, named, some_tokens, switched
from train.config import parse
from train.main import run
from train.mesh import Mesh
from train.presets import PRESETS

SWITCHES = [{}, *ONE_BY_ONE, FLEX | {"positions": "rope"}]
every_switch = pytest.mark.parametrize("switches", SWITCHES, ids=named)
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
L, H, V = TINY.num_layers, TINY.num_heads, TINY.vocab_size

Change = Callable[[int, Tensor], Tensor]


def unchanged(_: int, x: Tensor) -> Tensor:
    return x


class Written:
    """What a pass holds, computed from the weights by their names alone; `change_...` has each stream or each layer's
    heads on the way."""

    def __init__(
        self, model: GPT, tokens_BT: Tensor, change_stream: Change = unchanged, change_heads: Change = unchanged
    ) -> None:
        self.weights = {name: value.detach() for name, value in model.state_dict().items()}
        self.config = config = model.config
        (B, T), K = tokens_BT.shape, config.head_size
        x = self.weights["transformer.wte.weight"][tokens_BT]
        if config.positions == "learned":
            x = x + self.weights["transformer.wpe.weight"][:T]
        is_hidden = torch.ones(T, T, dtype=torch.bool).triu(1).expand(B, 1, T, T)
        if config.attention == "flex":
            document_BT = (tokens_BT == config.eot_id).cumsum(dim=1)
            is_hidden = is_hidden | (document_BT[:, None, :, None] != document_BT[:, None, None, :])
        self.streams, self.attention = list[Tensor](), list[Tensor]()
        first_values = None
        for layer in range(config.num_layers):
            x = change_stream(layer, x)
            self.streams.append(x)
            at = f"transformer.h.{layer}."
            read = x if config.norm_place == "post" else self.norm(x, at + "ln_1")
            q, k, v = (
                y.view(B, T, -1, K).transpose(1, 2) for y in self.linear(read, at + "attn.c_attn").chunk(3, dim=2)
            )
            if config.qk_norm:
                q, k = (
                    F.rms_norm(y, (K,), self.weights[f"{at}attn.{n}_norm.weight"], 1e-5)
                    for y, n in ((q, "q"), (k, "k"))
                )
            if config.positions == "rope":
                q, k = self.turned(q), self.turned(k)
            if config.value_residual and first_values is not None:
                mix = self.weights[at + "attn.value_mix"]
                v = mix * first_values + (1 - mix) * v
            first_values = v if first_values is None else first_values
            scores = torch.einsum("bhqk,bhsk->bhqs", q, k) / math.sqrt(K)
            self.attention.append(scores.masked_fill(is_hidden, -math.inf).exp())
            self.attention[-1] = self.attention[-1] / self.attention[-1].sum(dim=3, keepdim=True)
            heads = change_heads(layer, (self.attention[-1] @ v).transpose(1, 2).reshape(B, T, -1))
            x = x + self.linear(heads, at + "attn.c_proj")
            x = self.norm(x, at + "ln_1") if config.norm_place == "post" else x
            read = x if config.norm_place == "post" else self.norm(x, at + "ln_2")
            x = x + self.linear(self.activated(read, at), at + "mlp.c_proj")
            x = self.norm(x, at + "ln_2") if config.norm_place == "post" else x
        self.streams.append(change_stream(config.num_layers, x))
        self.logits = [self.logits_of(stream) for stream in self.streams]

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.weights[name + ".weight"].T
        return y + self.weights[name + ".bias"] if self.config.bias else y

    def norm(self, x: Tensor, name: str) -> Tensor:
        if self.config.norm == "none":
            return x
        x = x - x.mean(dim=-1, keepdim=True) if self.config.norm == "layernorm" else x
        x = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * self.weights[name + ".weight"]
        return x + self.weights[name + ".bias"] if self.config.norm == "layernorm" and self.config.bias else x

    def activated(self, x: Tensor, at: str) -> Tensor:
        y = self.linear(x, at + "mlp.c_fc")
        if self.config.mlp == "swiglu":
            return F.silu(self.linear(x, at + "mlp.c_gate")) * y
        return {
            "gelu": lambda: F.gelu(y, approximate="tanh"),
            "relu2": lambda: y.relu() ** 2,
            "silu": lambda: F.silu(y),
        }[self.config.mlp]()

    def turned(self, x: Tensor) -> Tensor:
        """As complex numbers, element i the real part and i + K / 2 the imaginary one."""
        T, K = x.shape[2:]
        angle = torch.arange(T)[:, None] * 10_000.0 ** (-2 * torch.arange(K // 2) / K)
        z = torch.complex(x[..., : K // 2], x[..., K // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], dim=3)

    def logits_of(self, x: Tensor) -> Tensor:
        config = self.config
        x = self.norm(x, "transformer.ln_f") if config.norm_place == "pre" else x
        logits = (x @ self.weights["lm_head.weight"].T)[..., : config.vocab_size]
        cap = config.logit_softcap
        return logits if cap is None else cap * (logits / cap).tanh()


def fingerprint(model: nn.Module) -> tuple[str, int]:
    """Its weights, and how many hooks hang on it."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    hooks = [module._forward_hooks | module._forward_pre_hooks | module._backward_hooks for module in model.modules()]
    return digest.hexdigest(), sum(map(len, hooks))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def attention_of(model: GPT, tokens_BT: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []

    def see(layer: int, weights_BHTT: Tensor) -> None:
        assert layer == len(kept)
        kept.append(weights_BHTT)

    taps.see_attention(model, tokens_BT, see)
    return kept


# --- Each number, for every switch ------------------------------------------------------------------------------------


@every_switch
def test_attention_is_what_the_pass_takes_of_each_value(switches: dict[str, Any]) -> None:
    model, tokens_BT = moved(switched(**switches)), some_tokens()
    found, expected = attention_of(model, tokens_BT), Written(model, tokens_BT)
    assert len(found) == L
    for weights_BHTT, expected_BHTT in zip(found, expected.attention, strict=True):
        close(weights_BHTT, expected_BHTT)
        close(weights_BHTT.sum(dim=3), torch.ones(2, H, 16))
        assert not weights_BHTT.triu(1).any()
    with torch.no_grad():
        close(model(tokens_BT)[..., :V], expected.logits[-1])  # the reference is the model


@every_switch
def test_the_lens_of_the_last_layer_is_the_models_output(switches: dict[str, Any]) -> None:
    model, tokens_BT = moved(switched(**switches)), some_tokens()
    streams = taps.streams(model, tokens_BT)
    expected = Written(model, tokens_BT)
    for stream_BTD, written_BTD, logits_BTV in zip(streams, expected.streams, expected.logits, strict=True):
        close(stream_BTD, written_BTD)
        found_BTV = taps.lens_logits(model, stream_BTD)
        assert found_BTV.shape == (2, 16, V), "the padding is cut"
        close(found_BTV, logits_BTV)
    with torch.no_grad():
        assert torch.equal(taps.lens_logits(model, streams[-1]), model(tokens_BT)[..., :V])


@every_switch
def test_a_part_left_out_is_one_whose_weights_are_zero(switches: dict[str, Any]) -> None:
    config = switched(**switches)
    model, windows_BS = moved(config), some_tokens()
    found = {
        (layer, head): losses for layer, head, losses in taps.losses_without_each(model, windows_BS, taps.zeros(model))
    }
    assert list(found) == [(layer, head) for layer in range(L) for head in (*range(H), None)]
    for layer, head in ((0, 1), (L - 1, 0), (1, None)):
        cut = moved(config)
        attention, mlp = taps.parts_of(cut, layer)
        with torch.no_grad():
            if head is None:
                for parameter in mlp.c_proj.parameters():  # type: ignore[union-attr,operator]
                    parameter.zero_()
            else:
                attention.c_proj.weight[:, head * 16 : (head + 1) * 16] = 0
            logits_BTV = cut(windows_BS[:, :-1])[..., :V]
        expected_BT = F.cross_entropy(logits_BTV.transpose(1, 2), windows_BS[:, 1:], reduction="none")
        close(found[layer, head], expected_BT)


def test_by_mean_a_part_gives_its_mean_over_the_text() -> None:
    model, windows_BS = moved(TINY), some_tokens()
    heads, mlps = {}, {}

    def keep(layer: int, y: Tensor) -> Tensor:
        heads[layer] = y.mean(dim=(0, 1))
        return y

    Written(model, windows_BS[:, :-1], change_heads=keep)
    streams = Written(model, windows_BS[:, :-1])
    instead = taps.means(model, windows_BS)
    for layer in range(L):
        close(instead.heads_LD[layer], heads[layer])
        mlp = taps.parts_of(model, layer).mlp
        seen: list[Tensor] = []
        with torch.no_grad(), mlp.register_forward_hook(lambda _, __, y, seen=seen: seen.append(y)):
            model(windows_BS[:, :-1])
        mlps[layer] = seen[0].mean(dim=(0, 1))
        close(instead.mlp_LD[layer], mlps[layer])
    assert len(streams.streams) == L + 1

    def replaced(layer: int, y: Tensor) -> Tensor:
        if layer != 1:
            return y
        return torch.cat([y[..., :16], heads[1][16:].expand(*y.shape[:2], 16)], dim=2)

    expected = Written(model, windows_BS[:, :-1], change_heads=replaced).logits[-1]
    with taps.without_head(model, 1, 1, instead):
        found_BT = taps.losses(model, windows_BS)
    close(found_BT, F.cross_entropy(expected.transpose(1, 2), windows_BS[:, 1:], reduction="none"))
    assert taps.PASS_TOKENS > windows_BS.numel()


@every_switch
def test_patches_are_those_of_a_written_out_pass(switches: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At every layer and token, in passes of some rows; also of tokens that are the same, of which nothing comes."""
    monkeypatch.setattr(taps, "PASS_TOKENS", 40)
    model = moved(switched(**switches))
    clean_T, corrupt_T = some_tokens(1, 12)[0], some_tokens(1, 12)[0].clone()
    corrupt_T[4] = (corrupt_T[4] + 1) % 90 + 5
    clean, corrupt = Written(model, clean_T[None]), Written(model, corrupt_T[None])
    found = taps.patch_stream(model, clean_T, corrupt_T)
    assert found.shape == (L + 1, 12, V)
    for l, t in ((0, 4), (1, 4), (1, 7), (2, 11), (L, 11), (L, 3)):

        def patched(layer: int, x: Tensor, l: int = l, t: int = t) -> Tensor:
            if layer != l:
                return x
            x = x.clone()
            x[:, t] = clean.streams[l][:, t]
            return x

        close(found[l, t], Written(model, corrupt_T[None], change_stream=patched).logits[-1][0, -1])
    close(found[0, 4], clean.logits[-1][0, -1])
    close(found[L, 11], clean.logits[-1][0, -1])
    before = corrupt.logits[-1][0, -1].expand(4, V)
    for l in range(L + 1):
        close(found[l, :4], before)
    by_head = taps.patch_heads(model, clean_T, corrupt_T)
    assert by_head.shape == (L, H, V)
    heads_of_clean: dict[int, Tensor] = {}

    def keep(layer: int, y: Tensor) -> Tensor:
        heads_of_clean[layer] = y
        return y

    Written(model, clean_T[None], change_heads=keep)

    def one_head(layer: int, y: Tensor) -> Tensor:
        return torch.cat([y[..., :16], heads_of_clean[1][..., 16:]], dim=2) if layer == 1 else y

    close(by_head[1, 1], Written(model, corrupt_T[None], change_heads=one_head).logits[-1][0, -1])


def test_every_token_patched_before_the_first_block_is_the_clean_prompt() -> None:
    for switches in ({}, {"value_residual": True}):
        model = moved(switched(**switches))
        clean_BT, corrupt_BT = some_tokens(1), some_tokens(2)[1:]
        clean_LBTD = taps.streams(model, clean_BT)
        with torch.no_grad(), taps.reading(taps.stream_readers(model)[0], lambda _: clean_LBTD[0]):
            assert torch.equal(model(corrupt_BT), model(clean_BT))
        last_V = taps.last_logits(model, clean_BT)[0]
        for found in (
            taps.patch_stream(model, clean_BT[0], clean_BT[0]),
            taps.patch_heads(model, clean_BT[0], clean_BT[0]),
        ):
            close(found, last_V.expand_as(found))


@every_switch
def test_the_model_is_left_as_it_was(switches: dict[str, Any]) -> None:
    """Its bits, its weights and no hook more, also where a pass breaks off."""
    model, tokens_BT = moved(switched(**switches)), some_tokens()
    with torch.no_grad():
        before = fingerprint(model), model(tokens_BT)
    assert before[0][1] == 0
    attention_of(model, tokens_BT)
    taps.streams(model, tokens_BT)
    list(taps.losses_without_each(model, tokens_BT, taps.means(model, tokens_BT)))
    taps.patch_stream(model, tokens_BT[0], tokens_BT[1])
    taps.patch_heads(model, tokens_BT[0], tokens_BT[1])
    induction.see_repeats(model, tokens_BT)

    def fails(layer: int, weights_BHTT: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taps.see_attention(model, tokens_BT, fails)
    with pytest.raises(ValueError, match="exceed"), taps.without_head(model, 0, 0, taps.zeros(model)):
        taps.losses(model, some_tokens(1, 30))
    with torch.no_grad():
        assert fingerprint(model) == before[0] and torch.equal(model(tokens_BT), before[1])
    assert all(parameter.grad is None for parameter in model.parameters())


# --- Induction --------------------------------------------------------------------------------------------------------


def test_repeats_are_two_halves_of_different_usable_tokens() -> None:
    tokens_BT = induction.repeated_tokens(50, 7, half=20, num_rows=40, seed=1)
    assert tokens_BT.shape == (40, 40) and torch.equal(tokens_BT[:, :20], tokens_BT[:, 20:])
    assert all(len(set(row)) == 20 for row in tokens_BT[:, :20].tolist())
    assert set(tokens_BT.flatten().tolist()) == set(range(50)) - {7}
    assert torch.equal(induction.repeated_tokens(50, 7, half=20, num_rows=3, seed=1), tokens_BT[:3])
    assert not torch.equal(induction.repeated_tokens(50, 7, half=20, num_rows=40, seed=2), tokens_BT)
    assert set(induction.repeated_tokens(4, None, half=4, num_rows=1, seed=1)[0].tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("switches", [{}, {"positions": "rope", "qk_norm": True}, FLEX], ids=named)
def test_the_induction_score_is_a_mean_over_its_definition(
    switches: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taps, "PASS_TOKENS", 40)
    model = moved(switched(**switches))
    tokens_BT = induction.repeated_tokens(V, 3, half=8, num_rows=5, seed=1)
    found, written = induction.see_repeats(model, tokens_BT), Written(model, tokens_BT)
    for layer in range(L):
        for head in range(H):
            weights_BTT = written.attention[layer][:, head]
            after = [
                weights_BTT[b, i, row[:8].index(row[i]) + 1].item()
                for b, row in enumerate(tokens_BT.tolist())
                for i in range(8, 16)
            ]
            assert found.induction_LH[layer, head].item() == pytest.approx(sum(after) / len(after), rel=1e-4)
            before = [weights_BTT[:, i, i - 1].mean().item() for i in range(1, 16)]
            assert found.previous_LH[layer, head].item() == pytest.approx(sum(before) / 15, rel=1e-4)
    losses_BT = F.cross_entropy(written.logits[-1][:, :-1].transpose(1, 2), tokens_BT[:, 1:], reduction="none")
    close(found.losses_BT, losses_BT)
    halves = losses_BT[:, :7].mean().item(), losses_BT[:, 8:].mean().item()
    assert induction.loss_of_halves(found.losses_BT) == pytest.approx(halves)


def test_a_head_built_to_repeat_scores_one() -> None:
    """Two layers by hand: one that carries each token to the next place, one that looks for the token it stands on."""
    half, vocab_size = 8, 24
    config = switched(num_layers=2, num_heads=1, width=64, vocab_size=vocab_size, norm="none", bias=False, tie=False)
    model = moved(config)
    token, place, carried = slice(0, 24), slice(24, 40), slice(40, 64)  # what the stream's elements are for
    sharp = 100.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        weights = dict(model.named_parameters())
        weights["transformer.wte.weight"][:24, token] = torch.eye(24)
        weights["transformer.wpe.weight"][:, place] = torch.eye(16)
        first, second = (weights[f"transformer.h.{layer}.attn.c_attn.weight"].chunk(3) for layer in (0, 1))
        first[0][:15, slice(25, 40)] = sharp * torch.eye(15)  # place t asks for
        first[1][:15, slice(24, 39)] = torch.eye(15)  # place t - 1,
        first[2][:24, token] = torch.eye(24)  # and takes its token
        weights["transformer.h.0.attn.c_proj.weight"][carried, :24] = torch.eye(24)
        second[0][:24, token] = sharp * torch.eye(24)  # a token asks for a place
        second[1][:24, carried] = torch.eye(24)  # to which its like was carried,
        second[2][:24, token] = torch.eye(24)  # and takes the token there
        weights["transformer.h.1.attn.c_proj.weight"][token, :24] = sharp * torch.eye(24)
        weights["lm_head.weight"][:24, token] = torch.eye(24)
    tokens_BT = induction.repeated_tokens(vocab_size, None, half=half, num_rows=4, seed=1)
    found = induction.see_repeats(model, tokens_BT)
    assert found.previous_LH[0, 0] > 0.99 and found.induction_LH[0, 0] < 0.01
    # All but one of 8: the first token has none before it, carries itself, and is looked at beside the one after it.
    assert found.induction_LH[1, 0].item() == pytest.approx(7.5 / 8, abs=1e-3)
    first_loss, second_loss = induction.loss_of_halves(found.losses_BT)
    assert second_loss == pytest.approx(math.log(2) / 7, abs=1e-3) and first_loss > 1
    for layer, _, losses_BT in taps.losses_without_each(model, tokens_BT, taps.zeros(model), mlps=False):
        assert induction.loss_of_halves(losses_BT)[1] > 1, f"both heads are needed, without that of layer {layer}"
