"""Looking inside a model: every number against a pass that is written out here, for every switch; nothing is left."""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.textfiles import Options as TextOptions
from data_prep.textfiles import prepare
from data_prep.tokenizer import ByteTokenizer
from model import hf_bridge, lens
from model.checkpoint import load_model
from model.gpt import GPT
from model.interp import hooks, induction
from model.interp.common import View
from tests.helpers.runs import ROOT, called, tiny_config, with_save
from tests.unit.model.test_kv_cache import FLEX
from tests.unit.model.test_ladder import BELOW, kind
from tests.unit.model.test_switches import MODERN, ONE_BY_ONE, TINY, moved, named, some_tokens, switched
from tests.unit.test_readme import help_of
from train.config import parse
from train.main import run
from train.presets import PRESETS
from train.processes.group import ProcessGroup

SWITCHES = [{}, *ONE_BY_ONE, FLEX | {"position_embedding": "rope"}]
every_switch = pytest.mark.parametrize("switches", SWITCHES, ids=named)
# In eager flex compiles a mask for each pass, of which there are a dozen here.
flex_is_long = pytest.param(SWITCHES[-1], marks=pytest.mark.long(reason="seconds; flex in the shorter tests above"))
every_switch_but_flex_is_long = pytest.mark.parametrize("switches", [*SWITCHES[:-1], flex_is_long], ids=named)
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
        if config.position_embedding == "learned":
            x = x + self.weights["transformer.wpe.weight"][:T]
        is_hidden = torch.ones(T, T, dtype=torch.bool).triu(1).expand(B, 1, T, T)
        if config.attention == "flex":
            document_BT = tokens_BT.eq(config.eot_id or 0).cumsum(dim=1)
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
            if config.position_embedding == "rope":
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

    hooks.see_attention(model, tokens_BT, see)
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
    streams = hooks.streams(model, tokens_BT)
    expected = Written(model, tokens_BT)
    for stream_BTD, written_BTD, logits_BTV in zip(streams, expected.streams, expected.logits, strict=True):
        close(stream_BTD, written_BTD)
        found_BTV = hooks.lens_logits(model, stream_BTD)
        assert found_BTV.shape == (2, 16, V), "the padding is cut"
        close(found_BTV, logits_BTV)
    with torch.no_grad():
        assert torch.equal(hooks.lens_logits(model, streams[-1]), model(tokens_BT)[..., :V])


@every_switch_but_flex_is_long
def test_a_part_left_out_is_one_whose_weights_are_zero(switches: dict[str, Any]) -> None:
    config = switched(**switches)
    model, windows_BS = moved(config), some_tokens()
    found = {
        (layer, head): losses
        for layer, head, losses in hooks.losses_without_each(model, windows_BS, hooks.zeros(model))
    }
    assert list(found) == [(layer, head) for layer in range(L) for head in (*range(H), None)]
    for layer, head in ((0, 1), (L - 1, 0), (1, None)):
        cut = moved(config)
        attention, mlp = hooks.parts_of(cut, layer)
        with torch.no_grad():
            if head is None:
                for parameter in mlp.c_proj.parameters():  # type: ignore[union-attr]
                    parameter.zero_()
            else:
                attention.c_proj.weight[:, head * 16 : (head + 1) * 16] = 0
            logits_BTV = cut(windows_BS[:, :-1])[..., :V]
        expected_BT = F.cross_entropy(logits_BTV.transpose(1, 2), windows_BS[:, 1:], reduction="none")
        close(found[layer, head], expected_BT)


def test_by_mean_a_part_gives_its_mean_over_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "PASS_TOKENS", 10)  # a pass for each window
    model, windows_BS = moved(TINY), some_tokens()
    heads: dict[int, Tensor] = {}

    def keep(layer: int, y: Tensor) -> Tensor:
        heads[layer] = y.mean(dim=(0, 1))
        return y

    Written(model, windows_BS[:, :-1], change_heads=keep)
    instead = hooks.means(model, windows_BS)
    for layer in range(L):
        close(instead.heads_LD[layer], heads[layer])
        seen: list[Tensor] = []
        with hooks.parts_of(model, layer).mlp.register_forward_hook(lambda _, __, y, seen=seen: seen.append(y)):
            model(windows_BS[:, :-1])
        close(instead.mlp_LD[layer], seen[0].detach().mean(dim=(0, 1)))

    def replaced(layer: int, y: Tensor) -> Tensor:
        return torch.cat([y[..., :16], heads[1][16:].expand(*y.shape[:2], 16)], dim=2) if layer == 1 else y

    expected = Written(model, windows_BS[:, :-1], change_heads=replaced).logits[-1]
    with hooks.without_head(model, 1, 1, instead):
        found_BT = hooks.losses(model, windows_BS)
    close(found_BT, F.cross_entropy(expected.transpose(1, 2), windows_BS[:, 1:], reduction="none"))


@every_switch_but_flex_is_long
def test_patches_are_those_of_a_written_out_pass(switches: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At every layer and token, in passes of some rows; also of tokens that are the same, of which nothing comes."""
    monkeypatch.setattr(hooks, "PASS_TOKENS", 40)
    model = moved(switched(**switches))
    clean_T, corrupt_T = some_tokens(1, 12)[0], some_tokens(1, 12)[0].clone()
    corrupt_T[4] = (corrupt_T[4] + 1) % 90 + 5
    clean, corrupt = Written(model, clean_T[None]), Written(model, corrupt_T[None])
    found = hooks.patch_stream(model, clean_T, corrupt_T, range(V))
    assert found.shape == (L + 1, 12, V)
    for place, t in ((0, 4), (1, 4), (1, 7), (2, 11), (L, 11), (L, 3)):

        def patched(layer: int, x: Tensor, place: int = place, t: int = t) -> Tensor:
            if layer != place:
                return x
            x = x.clone()
            x[:, t] = clean.streams[place][:, t]
            return x

        close(found[place, t], Written(model, corrupt_T[None], change_stream=patched).logits[-1][0, -1])
    close(found[0, 4], clean.logits[-1][0, -1])
    close(found[L, 11], clean.logits[-1][0, -1])
    close(found[:, :4], corrupt.logits[-1][0, -1].expand(L + 1, 4, V))
    by_head = hooks.patch_heads(model, clean_T, corrupt_T, range(V))
    assert by_head.shape == (L, H, V)
    heads_of_clean: dict[int, Tensor] = {}

    def keep(layer: int, y: Tensor) -> Tensor:
        heads_of_clean[layer] = y
        return y

    Written(model, clean_T[None], change_heads=keep)

    def one_head(layer: int, y: Tensor) -> Tensor:
        return torch.cat([y[..., :16], heads_of_clean[1][..., 16:]], dim=2) if layer == 1 else y

    close(by_head[1, 1], Written(model, corrupt_T[None], change_heads=one_head).logits[-1][0, -1])


@pytest.mark.parametrize("switches", [{}, {"value_residual": True}], ids=named)
def test_every_token_patched_before_the_first_block_is_the_clean_prompt(switches: dict[str, Any]) -> None:
    """And of two prompts that are one, nothing comes."""
    model = moved(switched(**switches))
    clean_BT, corrupt_BT = some_tokens(1), some_tokens(2)[1:]
    clean_BTD = hooks.streams(model, clean_BT)[0]
    with torch.no_grad(), hooks.reading(hooks.stream_readers(model)[0], lambda _: clean_BTD):
        assert torch.equal(model(corrupt_BT), model(clean_BT))
    last_V = hooks.last_logits(model, clean_BT)[0]
    for patch in (hooks.patch_stream, hooks.patch_heads):
        found = patch(model, clean_BT[0], clean_BT[0], [7, 3])
        close(found, last_V[[7, 3]].expand_as(found))


@pytest.mark.parametrize("switches", [{}, MODERN, flex_is_long], ids=named)
def test_the_model_is_left_as_it_was(switches: dict[str, Any]) -> None:
    """Its bits, its weights and no hook more, also where a pass breaks off."""
    model, tokens_BT = moved(switched(**switches)), some_tokens()
    with torch.no_grad():
        before = fingerprint(model), model(tokens_BT)
    assert before[0][1] == 0
    attention_of(model, tokens_BT)
    hooks.streams(model, tokens_BT)
    list(hooks.losses_without_each(model, tokens_BT, hooks.means(model, tokens_BT)))
    hooks.patch_stream(model, tokens_BT[0], tokens_BT[1], [0])
    hooks.patch_heads(model, tokens_BT[0], tokens_BT[1], [0])
    induction.see_repeats(model, tokens_BT)

    def fails(layer: int, weights_BHTT: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hooks.see_attention(model, tokens_BT, fails)
    with pytest.raises(ValueError, match="exceed"), hooks.without_head(model, 0, 0, hooks.zeros(model)):
        hooks.losses(model, some_tokens(1, 30))
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


@pytest.mark.parametrize("switches", [{}, MODERN], ids=named)
def test_the_induction_score_is_a_mean_over_its_definition(
    switches: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "PASS_TOKENS", 40)
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
    halves = [losses_BT[:, :7].mean().item(), losses_BT[:, 8:].mean().item()]
    assert induction.loss_of_halves(found.losses_BT) == pytest.approx(halves, abs=1e-4)
    everywhere_TT = torch.ones(16, 16).tril() / torch.arange(1, 17)[:, None]
    assert induction.even_score(8) == pytest.approx(everywhere_TT.diagonal(-7)[1:].mean().item())


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
    assert second_loss == pytest.approx(math.log(1 + math.e) / 7, abs=1e-3)  # of the token before it, a logit of 1
    assert first_loss > 1
    for layer, _, losses_BT in hooks.losses_without_each(model, tokens_BT, hooks.zeros(model), mlps=False):
        assert induction.loss_of_halves(losses_BT)[1] > 1, f"both heads are needed, without that of layer {layer}"


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("lens") / "run"
    config = with_save(tiny_config(tiny_data, run_dir, steps=30), every=10)
    run(config, ProcessGroup(0, 1, torch.device("cpu")))
    return run_dir


@pytest.fixture(scope="module")
def bytes_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tokens are bytes: it can be a Hugging Face folder, and no prompt is unknown to it."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "text.txt").write_text("as bytes, please; the cat | the dog\n" * 60)
    prepare(TextOptions(input=(str(folder / "text.txt"),), out=folder / "data", tokenizer="byte"))
    run(tiny_config(folder / "data", folder / "run", steps=2), ProcessGroup(0, 1, torch.device("cpu")))
    return folder / "run"


PROMPT = ["model", "step", "tokens", "texts"]
ABLATED = ["model", "step", "by", "num_tokens", "loss", "parts"]
PATCHED = [*PROMPT, "part", "corrupt_tokens", "corrupt_texts", "answers", "clean", "corrupt", "patched", "restored"]
REPEATED = ["model", "step", "half", "num_sequences", "seed", "checkpoints"]
CAT_AND_DOG = ["--clean", "The cat", "--corrupt", "The dog", "--answers", "a", "b"]
LOOKS: dict[str, tuple[list[str], list[str], str]] = {  # arguments, keys of the JSON and its name
    "attention": (["attention", "RUN", "--prompt", "The cat"], [*PROMPT, "heads"], "attention"),
    "one head": (
        ["attention", "RUN", "--prompt", "The cat", "--layer", "1", "--head", "0"],
        [*PROMPT, "heads"],
        "attention-1.0",
    ),
    "logit lens": (["logit-lens", "RUN", "--prompt", "The cat", "--top-k", "3"], [*PROMPT, "layers"], "logit-lens"),
    "ablate": (["ablate", "RUN", "--prompt", "The cat and the dog"], ABLATED, "ablate"),
    "ablate by mean": (["ablate", "RUN", "--file", "FILE", "--by", "mean", "--max-tokens", "100"], ABLATED, "ablate"),
    "patch": (["patch", "RUN", *CAT_AND_DOG], PATCHED, "patch"),
    "patch heads": (["patch", "RUN", *CAT_AND_DOG, "--part", "heads"], PATCHED, "patch"),
    "induction": (["induction", "RUN", "--num-sequences", "2", "--ablate"], REPEATED, "induction"),
    "every checkpoint": (
        ["induction", "RUN", "--num-sequences", "2", "--every-checkpoint"],
        REPEATED,
        "induction-checkpoints",
    ),
}


def look(name: str, run_dir: Path, out: Path) -> tuple[str, dict[str, Any]]:
    """What a look prints and its JSON, whose keys and picture are as they should be."""
    args, keys, stem = LOOKS[name]
    (out.parent / "some.txt").write_text("The cat and the dog and the cat. " * 9)
    words = [{"RUN": str(run_dir), "FILE": str(out.parent / "some.txt")}.get(word, word) for word in args]
    done = called(lens.main, *words, "--out", str(out), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert (out / f"{stem}.png").read_bytes().startswith(b"\x89PNG") and str(out / f"{stem}.png") in done.stdout
    record = json.loads((out / f"{stem}.json").read_text())
    assert list(record) == keys
    return done.stdout, record


Looked = dict[str, tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def looked(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Looked:
    """Each look, once."""
    return {name: look(name, trained_run, tmp_path_factory.mktemp("looks") / "out") for name in LOOKS}


@pytest.mark.parametrize("name", LOOKS)
def test_every_look_prints_a_table_and_leaves_numbers_and_a_picture(name: str, looked: Looked) -> None:
    printed, record = looked[name]
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) > 3 and len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert record["step"] == 30


def test_the_numbers_of_a_look_are_the_models(trained_run: Path, looked: Looked) -> None:
    trained = load_model(trained_run)
    model = trained.model
    assert isinstance(model, GPT)
    tokens_BT = torch.tensor(trained.tokenizer.encode("The cat").astype("int64"))[None]
    _, record = looked["attention"]
    assert record["tokens"] == tokens_BT[0].tolist() and record["texts"][:4] == ["'T'", "'h'", "'e'", "' '"]
    assert [(each["layer"], each["head"]) for each in record["heads"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    written = Written(model, tokens_BT)
    for each in record["heads"]:
        close(torch.tensor(each["weights"]), written.attention[each["layer"]][0, each["head"]])
    _, one = looked["one head"]
    assert one["heads"] == [record["heads"][2]]

    printed, record = looked["logit lens"]
    assert [layer["after"] for layer in record["layers"]] == ["embedding", "block 0", "block 1"]
    with torch.no_grad():
        logits_TV = model(tokens_BT)[0, :, : trained.tokenizer.vocab_size]
    most = logits_TV.softmax(dim=1).topk(3)
    last = record["layers"][-1]
    assert last["top_tokens"] == most.indices.tolist()
    torch.testing.assert_close(torch.tensor(last["top_probabilities"]), most.values, rtol=0, atol=1e-6)
    losses_t = F.cross_entropy(logits_TV[:-1], tokens_BT[0, 1:], reduction="none")
    torch.testing.assert_close(torch.tensor(last["next_losses"]), losses_t, rtol=0, atol=2e-6)
    order = logits_TV.argsort(dim=1, descending=True).tolist()
    assert last["next_ranks"] == [row.index(token) for row, token in zip(order, record["tokens"][1:], strict=False)]
    assert f"| block 1   | {losses_t.mean():.4f} |" in printed

    _, record = looked["patch"]
    assert len(record["patched"]) == 3 and len(record["patched"][0]) == 7
    assert record["restored"][0][:4] == pytest.approx([0] * 4, abs=1e-4), "nothing differs so far"
    assert record["restored"][2][6] == pytest.approx(1, abs=1e-4)
    _, heads = looked["patch heads"]
    assert len(heads["patched"]) == 2 and len(heads["patched"][0]) == 2 and heads["clean"] == record["clean"]

    printed, record = looked["ablate by mean"]
    assert record["by"] == "mean" and record["num_tokens"] == 96, "three windows of 32"
    assert [(part["layer"], part["head"]) for part in record["parts"]] == [(i, h) for i in (0, 1) for h in (0, 1, None)]
    for part in record["parts"]:
        assert part["change"] == pytest.approx(part["loss"] - record["loss"], abs=3e-6)
        assert part["standard_error"] > 0
    assert f"Loss of 96 tokens: {record['loss']:.4f}" in printed

    printed, record = looked["every checkpoint"]
    assert [each["step"] for each in record["checkpoints"]] == [10, 20, 30]
    _, alone = looked["induction"]
    without = {f"loss_{half}_without": alone["checkpoints"][0][f"loss_{half}_without"] for half in ("first", "second")}
    assert alone["checkpoints"] == [record["checkpoints"][-1] | without]
    tokens_BT = induction.repeated_tokens(trained.tokenizer.vocab_size, None, half=record["half"], num_rows=2, seed=1)
    with hooks.without_head(model, 1, 0, hooks.zeros(model)):
        halves = induction.loss_of_halves(hooks.losses(model, tokens_BT))
    assert [each[1][0] for each in without.values()] == pytest.approx(halves, abs=2e-6)
    assert record["half"] == min(16, trained.tokenizer.vocab_size) and printed.count("\n| ") == 4
    best = max(score for row in record["checkpoints"][0]["induction"] for score in row)
    assert f"{best:.3f}" in printed.splitlines()[4]


def view(*args: str) -> View:
    return lens.view_of(lens.parse([*args, "--device", "cpu"]))


def test_checkpoints_and_hugging_face_folders_are_looked_into_too(
    trained_run: Path, bytes_run: Path, tmp_path: Path
) -> None:
    """Of the folder every look: what its run's model gives."""
    pytest.importorskip("safetensors")
    for path in (f"{trained_run}@10", str(trained_run / "checkpoints" / "step_00000010")):
        assert view("induction", path, "--num-sequences", "2").record["step"] == 10
    folder = tmp_path / "folder"
    exported = called(hf_bridge.main, "export", str(bytes_run), "--out", str(folder))
    assert exported.returncode == 0, exported.stderr
    (tmp_path / "some.txt").write_text("The cat and the dog and the cat. " * 9)
    for name, (args, *_) in LOOKS.items():
        if name == "every checkpoint":
            continue
        ours, theirs = (
            view(*({"RUN": str(path), "FILE": str(tmp_path / "some.txt")}.get(word, word) for word in args))
            for path in (bytes_run, folder)
        )
        assert theirs.record["model"] == str(folder) and theirs.text == ours.text
        for record in (ours.record, theirs.record):
            (record["checkpoints"][0] if "induction" in name else record).pop("step")
        assert theirs.record | {"model": 0, "step": 0} == ours.record | {"model": 0, "step": 0}
    done = called(lens.main, "induction", str(folder), "--every-checkpoint")
    assert done.returncode == 2 and "--every-checkpoint needs a run directory with checkpoints in it" in done.stderr


def test_odd_tokens_are_shown_in_a_table_and_a_picture(bytes_run: Path, tmp_path: Path) -> None:
    """A bar, a backquote, a line break, half a character, dollars that are no formula."""
    prompt = "a|b`c\n$\u00fc$ "
    done = called(
        lens.main,
        "attention",
        str(bytes_run),
        "--prompt",
        prompt,
        "--layer",
        "0",
        "--head",
        "0",
        "--out",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "'\\|'" in done.stdout and "'\\`'" in done.stdout and "'\\n'" in done.stdout and "\\xc3" in done.stdout
    assert all(line.replace("\\|", "").count("|") == 4 for line in done.stdout.splitlines() if line.startswith("|"))
    assert lens.shown(ByteTokenizer(), 0x41) == "'A'"
    assert called(lens.main, "logit-lens", str(bytes_run), "--prompt", prompt, "--out", str(tmp_path)).returncode == 0


def test_the_likeliest_tokens_are_the_answers_unless_they_are_the_same(trained_run: Path) -> None:
    trained = load_model(trained_run)
    model = trained.model
    assert isinstance(model, GPT)
    for clean, corrupt in (("The cat", "The dog"), ("a", "T"), ("e ", "Th")):
        args = ["patch", str(trained_run), "--clean", clean, "--corrupt", corrupt]
        tokens = [torch.tensor(trained.tokenizer.encode(text).astype("int64")) for text in (clean, corrupt)]
        done = called(lens.main, *args)
        if len(clean) < 2:
            assert "--clean has 1 tokens; the model's context takes 2 to 32" in done.stderr
            continue
        likeliest = hooks.last_logits(model, torch.stack(tokens)).argmax(dim=1).tolist()
        names = [lens.shown(trained.tokenizer, token) for token in likeliest]
        if likeliest[0] == likeliest[1]:
            assert f"both prompts are most likely continued by {names[0]}; give --answers A B" in done.stderr
        else:
            assert f"Logit of {names[0]} less that of {names[1]}" in done.stdout


PATCH = ["patch", "RUN", "--clean", "The cat", "--corrupt", "The dog"]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["attention", "nowhere", "--prompt", "a"], "nowhere: no such run directory"),
        (["attention", "RUN@7", "--prompt", "a"], "no checkpoint of step 7; there are 10, 20, 30"),
        (["attention", "RUN", "--prompt", ""], "--prompt is empty; give some text"),
        (["attention", "RUN", "--prompt", "\u00fc"], "--prompt '\u00fc': character '\u00fc' at 0 is not among"),
        (["attention", "RUN", "--prompt", "T"], "--prompt has 1 tokens; the model's context takes 2 to 32"),
        (["logit-lens", "RUN", "--prompt", "T" * 33], "--prompt has 33 tokens; the model's context takes 2 to 32"),
        (["logit-lens", "RUN", "--prompt", "The", "--top-k", "0"], "--top-k 0 must be at least 1"),
        (["logit-lens", "RUN", "--prompt", "The", "--top-k", "999"], "--top-k 999 must be at least 1 and at most"),
        (["attention", "RUN", "--prompt", "The", "--layer", "2"], "--layer 2: the model has 0 to 1"),
        (["attention", "RUN", "--prompt", "The", "--head", "-1"], "--head -1: the model has 0 to 1"),
        (["ablate", "RUN"], "give --prompt or --file, and not both"),
        (["ablate", "RUN", "--prompt", "The", "--file", "FILE"], "give --prompt or --file, and not both"),
        (["ablate", "RUN", "--prompt", "T"], "--prompt has 1 tokens; a loss needs at least 2"),
        (["ablate", "RUN", "--prompt", ""], "--prompt has 0 tokens; a loss needs at least 2"),
        (["ablate", "RUN", "--file", "gone.txt"], "gone.txt"),
        (["ablate", "RUN", "--file", "LATIN"], "not UTF-8 (invalid start byte at byte 1)"),
        (["ablate", "RUN", "--file", "FILE", "--max-tokens", "1"], "--max-tokens 1 must be at least 2"),
        (
            ["patch", "RUN", "--clean", "The cat", "--corrupt", "A dog"],
            "--clean has 7 tokens, --corrupt 5; give prompts",
        ),
        (["patch", "RUN", "--clean", "The cat", "--corrupt", "The cat"], "--clean and --corrupt are the same tokens"),
        ([*PATCH, "--answers", "ab", "c"], "--answers 'ab' is 2 tokens; each must be one"),
        ([*PATCH, "--answers", "", "c"], "--answers '' is 0 tokens; each must be one"),
        ([*PATCH, "--answers", "\u00fc", "c"], "--answers '\u00fc': character"),
        ([*PATCH, "--answers", "c", "c"], "--answers must be two different tokens"),
        (["induction", "RUN", "--half", "17"], "--half 17 must be at least 2 and at most 16: half the context of 32"),
        (["induction", "RUN", "--num-sequences", "0"], "--num-sequences 0 must be at least 1"),
        (["induction", "RUN@10", "--every-checkpoint"], "--every-checkpoint needs a run directory with checkpoints"),
        (["induction", "RUN", "--every-checkpoint", "--ablate"], "--ablate is of one checkpoint"),
        (["induction", "RUN", "--device", "cuda"], "--device cuda: torch"),
        (["induction", "RUN", "--into", "gone.md"], "gone.md: --into needs one <!-- lens induction -->"),
    ],
)
def test_what_cannot_be_looked_at_is_one_line(trained_run: Path, tmp_path: Path, args: list[str], line: str) -> None:
    (tmp_path / "some.txt").write_text("The cat")
    (tmp_path / "latin.txt").write_bytes("a\u00fc".encode("latin-1"))
    positions = {"FILE": str(tmp_path / "some.txt"), "LATIN": str(tmp_path / "latin.txt")}
    words = [positions.get(word, word.replace("RUN", str(trained_run))) for word in args]
    done = called(lens.main, *words)
    assert done.returncode == 2 and done.stderr.startswith("lens: ") and done.stderr.count("\n") == 1, done.stderr
    assert line in done.stderr and done.stdout == ""


def test_what_is_no_gpt_or_no_number_is_refused_by_name(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = load_model(trained_run)
    broken = load_model(trained_run)
    with torch.no_grad():
        broken.model.lm_head.weight[0, 0] = math.nan
    loaded = {name: dataclasses.replace(trained, model=kind(name)) for name in BELOW}
    for name, found in {**loaded, "nan": broken}.items():
        monkeypatch.setattr("model.interp.common.load_model", lambda *_, found=found, **__: found)
        for args in (["logit-lens", "--prompt", "The"], ["ablate", "--prompt", "The"], ["induction"]):
            done = called(lens.main, args[0], str(trained_run), *args[1:])
            expected = (
                "the model's numbers are not finite; take another checkpoint"
                if name == "nan"
                else f"--model.kind {name} has no blocks to look into; give a run of --model.kind gpt"
            )
            assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1


def test_without_matplotlib_there_are_numbers_but_no_picture(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is computed."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    args = ["attention", str(trained_run), "--prompt", "The"]
    assert called(lens.main, *args).returncode == 0
    done = called(lens.main, *args, "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and done.stderr == "lens: the picture needs matplotlib: pip install -e '.[plots]'\n"
    assert done.stdout == "" and not (tmp_path / "out").exists()


def test_answers_that_tell_nothing_apart_are_refused(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lens, "LEAST_DIFFERENCE", 1e6)
    done = called(lens.main, "patch", str(trained_run), *CAT_AND_DOG)
    assert done.returncode == 2
    assert done.stderr == "lens: --answers: the logits of 'a' and 'b' differ alike after both; name others\n"


def test_more_numbers_than_a_file_should_hold_are_refused(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lens, "MAX_NUMBERS", 35)
    args = ["attention", str(trained_run), "--prompt", "The"]
    done = called(lens.main, *args)
    assert done.returncode == 2 and "36 weights are more than 35; give --layer, --head or a shorter" in done.stderr
    assert called(lens.main, *args, "--head", "1").returncode == 0


def test_what_is_printed_goes_into_a_page(trained_run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- lens attention-1.0 -->\nold\n<!-- end -->\nafter\n")
    args = ["attention", str(trained_run), "--prompt", "The", "--layer", "1", "--head", "0"]
    done = called(lens.main, *args, "--into", str(page))
    assert page.read_text() == f"before\n<!-- lens attention-1.0 -->\n{done.stdout.rstrip()}\n<!-- end -->\nafter\n"


def test_bf16_is_near_fp32(trained_run: Path) -> None:
    records = [
        view("attention", str(trained_run), "--prompt", "The cat", "--dtype", dtype).record
        for dtype in ("fp32", "bf16")
    ]
    exact, near = (torch.tensor([each["weights"] for each in record["heads"]]) for record in records)
    assert 0 < (exact - near).abs().max() < 0.05


# --- What is shown of it ----------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")
SHOWN = [
    line.strip().split(" #")[0]
    for text in ((ROOT / "README.md").read_text(encoding="utf-8"), PAGE, str(lens.__doc__))
    for line in text.splitlines()
    if re.match(r" +(\.venv/bin/)?python model/lens\.py ", line)
]


@pytest.mark.parametrize("line", SHOWN)
def test_the_command_lines_that_are_shown_parse(line: str) -> None:
    options = lens.parse(shlex.split(line)[2:])
    assert options.into in (None, Path("docs/inspect.md"))
    if options.into is not None:
        assert f"<!-- lens {options.name} -->" in PAGE.split(line)[1].split("    .venv/bin/")[0]


@pytest.mark.parametrize("line", [line.strip() for line in PAGE.splitlines() if line.startswith("    .venv/bin/")])
def test_the_pages_other_commands_name_what_there_is(line: str) -> None:
    words = shlex.split(line.split(" #")[0])
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    if words[script] == "train/main.py":
        parse(words[script + 1 :], PRESETS)
    else:
        assert all(word in help_of(words[script]) for word in words if word.startswith("--") and "lens" not in line)


def test_every_table_of_the_page_was_made_by_its_command() -> None:
    """The look's own columns, and a row for each head, checkpoint or token."""
    blocks = dict(re.findall(r"<!-- lens ([\w.-]+) -->\n(.*?)<!-- end -->", PAGE, re.DOTALL))
    assert len(blocks) == PAGE.count("<!-- end -->") >= 3
    made = {lens.parse(shlex.split(line)[2:]).name for line in SHOWN if "--into" in line}
    assert made == set(blocks)
    for name, block in blocks.items():
        header = next(line for line in block.splitlines() if line.startswith("|"))
        cells = [cell.strip() for cell in header.strip("|").split("|")]
        columns = {
            "induction": induction.COLUMNS,
            "induction-checkpoints": induction.COLUMNS_OVER_STEPS,
            "attention-1.2": lens.COLUMNS_OF_A_HEAD,
            "ablate": lens.COLUMNS_OF_PARTS,
            "patch": ("layer", "head 0", "head 1", "head 2", "head 3"),
        }
        assert cells == list(columns[name]), name
        assert block.count("\n| ") >= 3
    finding = blocks["induction-checkpoints"].splitlines()
    assert [line.split("|")[4].strip() for line in finding[-5:]] == ["1.2"] * 5, "the head that the page follows"


def test_the_pages_lines_of_python_run(trained_run: Path) -> None:
    block = PAGE.split("\n\n    from model.interp.induction")[1].split("\n\nIt prints")[0]
    code = textwrap.dedent("    from model.interp.induction" + block).replace('"runs/twice"', repr(str(trained_run)))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace("[1, 2]", "[1, 1]"), {})
    assert re.fullmatch(r"0 0\.\d+\n1 0\.\d+\n", printed.getvalue())


def test_what_the_page_names_is_there() -> None:
    for name in re.findall(r"`((?:model|train|data_prep|tests|launch)/\w+\.py)`", PAGE):
        assert (ROOT / name).is_file(), name
