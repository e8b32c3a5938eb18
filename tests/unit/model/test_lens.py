"""model/lens.py: its numbers against passes of the model with plain hooks, for every architecture switch."""

import contextlib
import dataclasses
import functools
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
from model import hf_bridge, lens
from model.checkpoint import load_model
from model.gpt import GPT
from model.interp import hooks, induction
from model.interp.common import Result
from tests.helpers.runs import ROOT, assert_same_tensors, called, tiny_config, with_save
from tests.unit.model.test_kv_cache import FLEX
from tests.unit.model.test_ladder import BELOW, kind
from tests.unit.model.test_switches import MODERN, ONE_BY_ONE, TINY, moved, named, some_tokens, switched
from tests.unit.test_readme import help_of
from train.command_line import parse
from train.main import run
from train.presets import PRESETS
from train.processes.group import ProcessGroup

SWITCHES = [{}, *ONE_BY_ONE, FLEX | {"position_embedding": "rope"}]
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
L, H, V = TINY.num_layers, TINY.num_heads, TINY.vocab_size


@torch.no_grad()
def run_with_hook(
    model: GPT, module: nn.Module, tokens_BT: Tensor, change: Callable[[Tensor], Tensor] = torch.Tensor.clone
) -> tuple[Tensor, Tensor]:
    """Return the input of `module` in a pass, and the logits of the pass if `change` replaces this input."""
    inputs: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs.append(args[0])
        return (change(args[0]), *args[1:])

    with module.register_forward_pre_hook(hook):
        logits = model(tokens_BT)[..., :V]
    return inputs[0], logits


def attention_of(model: GPT, tokens_BT: Tensor) -> list[Tensor]:
    """Return the attention weights of every layer; check that the pass is not changed by reading them."""
    weights: dict[int, Tensor] = {}
    with torch.no_grad():
        close(
            hooks.read_attention(model, tokens_BT, weights.__setitem__),
            hooks.vocab_logits(model, model.hidden_states(tokens_BT)),
        )
    assert list(weights) == list(range(model.config.num_layers))
    return list(weights.values())


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none")


# --- Each number, for every switch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", SWITCHES, ids=named)
def test_attention_weights_are_those_of_the_heads_outputs(switches: dict[str, Any]) -> None:
    """Of any attention: written out, fused or flex, the outputs are the weights times the values."""
    model, tokens_BT = moved(switched(**switches)), some_tokens()
    tokens_BT[:, 6] = FLEX["eot_id"]  # Flex attends within documents, so there must be two.
    for layer, weights_BHTT in enumerate(attention_of(model, tokens_BT)):
        attention, values = hooks.parts_of(model, layer).attention, list[Tensor]()
        with attention.register_forward_pre_hook(
            lambda module, args, kept=values: kept.append(module.queries_keys_values(*args)[2])
        ):
            outputs_BTD, _ = run_with_hook(model, attention.c_proj, tokens_BT)
        close((weights_BHTT @ values[0]).transpose(1, 2).reshape(2, 16, -1), outputs_BTD)
        close(weights_BHTT.sum(dim=3), torch.ones(2, H, 16))
        assert not weights_BHTT.triu(1).any()


@pytest.mark.parametrize("switches", SWITCHES[:-1], ids=named)
def test_the_logit_lens_is_the_output_of_a_model_that_ends_there(switches: dict[str, Any]) -> None:
    config = switched(**switches)
    model, tokens_BT = moved(config), some_tokens()
    streams = hooks.residual_streams(model, tokens_BT)
    assert streams.shape == (L + 1, 2, 16, 32)
    for num_layers, stream_BTD in enumerate(streams):
        shorter = moved(config)
        del shorter.blocks[num_layers:]
        with torch.no_grad():
            assert torch.equal(hooks.lens_logits(model, stream_BTD), shorter(tokens_BT)[..., :V])


@pytest.mark.parametrize("switches", SWITCHES[:-1], ids=named)
def test_an_ablated_part_is_one_whose_weights_are_zero(switches: dict[str, Any]) -> None:
    config = switched(**switches)
    model, sequences_BS = moved(config), some_tokens()
    each = hooks.losses_without_each(model, sequences_BS, hooks.zero_replacements(model))
    losses = {(layer, head): losses_BT for layer, head, losses_BT in each}
    assert list(losses) == [(layer, head) for layer in range(L) for head in (*range(H), None)]
    for layer, head in ((0, 1), (L - 1, 0), (1, None)):
        zeroed = moved(config)
        attention, mlp = hooks.parts_of(zeroed, layer)
        with torch.no_grad():
            if head is None:
                for parameter in mlp.c_proj.parameters():  # type: ignore[union-attr]
                    parameter.zero_()
            else:
                attention.c_proj.weight[:, head * 16 : (head + 1) * 16] = 0
            logits_BTV = zeroed(sequences_BS[:, :-1])[..., :V]
        close(losses[layer, head], token_losses(logits_BTV, sequences_BS[:, 1:]))


def test_a_part_ablated_by_mean_gives_its_mean_over_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "PASS_TOKENS", 10)  # one pass for each sequence
    model, sequences_BS = moved(TINY), some_tokens()
    inputs_BT, targets_BT = sequences_BS[:, :-1], sequences_BS[:, 1:]
    replacements = hooks.mean_replacements(model, sequences_BS)
    for layer in range(L):
        attention, mlp = hooks.parts_of(model, layer)
        outputs: list[Tensor] = []
        with mlp.register_forward_hook(lambda _, __, y, kept=outputs: kept.append(y)):
            heads_BTD, _ = run_with_hook(model, attention.c_proj, inputs_BT)
        close(replacements.heads_LD[layer], heads_BTD.mean(dim=(0, 1)))
        close(replacements.mlp_LD[layer], outputs[0].mean(dim=(0, 1)))

        def by_mean(y: Tensor) -> Tensor:
            return torch.cat([y[..., :16], y[..., 16:].mean(dim=(0, 1)).expand_as(y[..., 16:])], dim=2)

        _, expected_BTV = run_with_hook(model, attention.c_proj, inputs_BT, by_mean)
        with hooks.without_head(model, layer, 1, replacements):
            close(hooks.losses(model, sequences_BS), token_losses(expected_BTV, targets_BT))


@pytest.mark.parametrize("switches", SWITCHES[:-1], ids=named)
def test_a_patch_is_a_pass_with_one_activation_of_the_clean_prompt(
    switches: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several passes for each layer; patches before the first difference change nothing."""
    monkeypatch.setattr(hooks, "PASS_TOKENS", 40)
    model = moved(switched(**switches))
    clean_T, corrupt_T = some_tokens(1, 12)[0], some_tokens(1, 12)[0].clone()
    corrupt_T[4] = (corrupt_T[4] + 1) % 90 + 5
    clean_V, corrupt_V = hooks.last_logits(model, torch.stack([clean_T, corrupt_T]))
    patched = hooks.patch_stream(model, clean_T, corrupt_T, range(V))
    assert patched.shape == (L + 1, 12, V)
    for stream, t in ((0, 4), (1, 4), (1, 7), (2, 11), (L, 11), (L, 3)):
        reader = hooks.stream_readers(model)[stream]
        clean_BTD, _ = run_with_hook(model, reader, clean_T[None])
        is_patched_T1 = (torch.arange(12) == t)[:, None].float()
        _, expected = run_with_hook(
            model, reader, corrupt_T[None], functools.partial(torch.lerp, end=clean_BTD, weight=is_patched_T1)
        )
        close(patched[stream, t], expected[0, -1])
    if not (model.config.embedding_shortcut or model.config.value_embeddings):  # these read the tokens once more
        close(patched[0, 4], clean_V)
    close(patched[L, 11], clean_V)
    close(patched[:, :4], corrupt_V.expand(L + 1, 4, V))
    by_head = hooks.patch_heads(model, clean_T, corrupt_T, range(V))
    assert by_head.shape == (L, H, V)
    c_proj = hooks.parts_of(model, 1).attention.c_proj
    clean_BTD, _ = run_with_hook(model, c_proj, clean_T[None])
    _, expected = run_with_hook(
        model, c_proj, corrupt_T[None], lambda y: torch.cat([y[..., :16], clean_BTD[..., 16:]], dim=2)
    )
    close(by_head[1, 1], expected[0, -1])


def test_the_model_is_left_as_it_was() -> None:
    """No weight changes and no hook stays, also if a pass raises."""
    model, tokens_BT = moved(switched(**MODERN)), some_tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks.residual_streams(model, tokens_BT)
    list(hooks.losses_without_each(model, tokens_BT, hooks.mean_replacements(model, tokens_BT)))
    hooks.patch_stream(model, tokens_BT[0], tokens_BT[1], [0])
    hooks.patch_heads(model, tokens_BT[0], tokens_BT[1], [0])
    induction.measure_repeats(model, tokens_BT)

    def interrupt(layer: int, weights_BHTT: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hooks.read_attention(model, tokens_BT, interrupt)
    with pytest.raises(ValueError, match="exceed"), hooks.without_head(model, 0, 0, hooks.zero_replacements(model)):
        hooks.losses(model, some_tokens(1, 30))
    assert_same_tensors(before, model.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- Induction --------------------------------------------------------------------------------------------------------


def test_repeated_tokens_are_two_equal_halves_of_different_tokens() -> None:
    tokens_BT = induction.repeated_tokens(50, 7, half=20, num_rows=40, seed=1)
    assert tokens_BT.shape == (40, 40) and torch.equal(tokens_BT[:, :20], tokens_BT[:, 20:])
    assert all(len(set(row)) == 20 for row in tokens_BT[:, :20].tolist())
    assert set(tokens_BT.flatten().tolist()) == set(range(50)) - {7}
    assert torch.equal(induction.repeated_tokens(50, 7, half=20, num_rows=3, seed=1), tokens_BT[:3])
    assert not torch.equal(induction.repeated_tokens(50, 7, half=20, num_rows=40, seed=2), tokens_BT)


def test_scores_and_losses_of_repeats_follow_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "PASS_TOKENS", 40)
    model = moved(switched(**MODERN))
    tokens_BT = induction.repeated_tokens(V, 3, half=8, num_rows=5, seed=1)
    repeats, attention = induction.measure_repeats(model, tokens_BT), attention_of(model, tokens_BT)
    rows = [row.tolist() for row in tokens_BT]
    for layer in range(L):
        for head in range(H):
            weights_BTT = attention[layer][:, head]
            after = [weights_BTT[b, i, rows[b].index(rows[b][i]) + 1].item() for b in range(5) for i in range(8, 16)]
            assert repeats.induction_LH[layer, head].item() == pytest.approx(sum(after) / len(after), rel=1e-4)
            before = [weights_BTT[:, i, i - 1].mean().item() for i in range(1, 16)]
            assert repeats.previous_LH[layer, head].item() == pytest.approx(sum(before) / 15, rel=1e-4)
    with torch.no_grad():
        losses_BT = token_losses(model(tokens_BT)[:, :-1, :V], tokens_BT[:, 1:])
    close(repeats.losses_BT, losses_BT)
    halves = [losses_BT[:, :7].mean().item(), losses_BT[:, 8:].mean().item()]
    assert induction.loss_of_halves(repeats.losses_BT) == pytest.approx(halves, abs=1e-4)
    uniform_TT = torch.ones(16, 16).tril() / torch.arange(1, 17)[:, None]
    assert induction.uniform_score(8) == pytest.approx(uniform_TT.diagonal(-7)[1:].mean().item())


def test_a_head_built_to_repeat_scores_one() -> None:
    """Layer 0 carries each token to the next position; layer 1 looks for the position to which its own token came."""
    vocab_size = 24
    config = switched(num_layers=2, num_heads=1, width=64, vocab_size=vocab_size, norm="none", bias=False, tie=False)
    model = moved(config)
    token, position, carried = slice(0, 24), slice(24, 40), slice(40, 64)  # the parts of the residual stream
    sharp = 100.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        weights = dict(model.named_parameters())
        weights["transformer.wte.weight"][:24, token] = torch.eye(24)
        weights["transformer.wpe.weight"][:, position] = torch.eye(16)
        first, second = (weights[f"transformer.h.{layer}.attn.c_attn.weight"].chunk(3) for layer in (0, 1))
        first[0][:15, slice(25, 40)] = sharp * torch.eye(15)  # Position t queries
        first[1][:15, slice(24, 39)] = torch.eye(15)  # position t - 1
        first[2][:24, token] = torch.eye(24)  # and copies its token.
        weights["transformer.h.0.attn.c_proj.weight"][carried, :24] = torch.eye(24)
        second[0][:24, token] = sharp * torch.eye(24)  # A token queries the position
        second[1][:24, carried] = torch.eye(24)  # to which the same token was carried
        second[2][:24, token] = torch.eye(24)  # and copies the token there.
        weights["transformer.h.1.attn.c_proj.weight"][token, :24] = sharp * torch.eye(24)
        weights["lm_head.weight"][:24, token] = torch.eye(24)
    tokens_BT = induction.repeated_tokens(vocab_size, None, half=8, num_rows=4, seed=1)
    repeats = induction.measure_repeats(model, tokens_BT)
    assert repeats.previous_LH[0, 0] > 0.99 and repeats.induction_LH[0, 0] < 0.01
    # The first token has no predecessor and carries itself, so its repeat splits its weight between two positions.
    assert repeats.induction_LH[1, 0].item() == pytest.approx(7.5 / 8, abs=1e-3)
    first_loss, second_loss = induction.loss_of_halves(repeats.losses_BT)
    assert second_loss == pytest.approx(math.log(1 + math.e) / 7, abs=1e-3)  # from that split alone, a logit of 1
    assert first_loss > 1
    for layer, _, losses_BT in hooks.losses_without_each(model, tokens_BT, hooks.zero_replacements(model), mlps=False):
        assert induction.loss_of_halves(losses_BT)[1] > 1, f"the head of layer {layer} must be needed"


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def char_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("lens") / "run"
    run(with_save(tiny_config(tiny_data, run_dir, steps=30), every=10), ProcessGroup(0, 1, torch.device("cpu")))
    return run_dir


@pytest.fixture(scope="module")
def byte_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on bytes, so that the run can be a Hugging Face folder and takes any prompt."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "text.txt").write_text("as bytes, please; the cat | the dog\n" * 60)
    prepare(TextOptions(input=(str(folder / "text.txt"),), out=folder / "data", tokenizer="byte"))
    run(tiny_config(folder / "data", folder / "run", steps=2), ProcessGroup(0, 1, torch.device("cpu")))
    return folder / "run"


PROMPT = ["model", "step", "tokens", "texts"]
ABLATION = ["model", "step", "by", "num_tokens", "loss", "parts"]
PATCHES = [*PROMPT, "part", "corrupt_tokens", "corrupt_texts", "answers", "clean", "corrupt", "patched", "restored"]
REPEATS = ["model", "step", "half", "num_sequences", "seed", "checkpoints"]
INSPECTIONS: dict[str, tuple[str, list[str]]] = {  # its command line, where RUN and FILE are paths, and its JSON's keys
    "attention": ("attention RUN --prompt 'The cat'", [*PROMPT, "heads"]),
    "attention-1.0": ("attention RUN --prompt 'The cat' --layer 1 --head 0", [*PROMPT, "heads"]),
    "logit-lens": ("logit-lens RUN --prompt 'The cat' --top-k 3", [*PROMPT, "layers"]),
    "ablate": ("ablate RUN --file FILE --by mean --max-tokens 100", ABLATION),
    "patch": ("patch RUN --clean 'The cat' --corrupt 'The dog' --answers a b", PATCHES),
    "patch heads": ("patch RUN --clean 'The cat' --corrupt 'The dog' --answers a b --part heads", PATCHES),
    "induction": ("induction RUN --num-sequences 2 --ablate", REPEATS),
    "induction-checkpoints": ("induction RUN --num-sequences 2 --every-checkpoint", REPEATS),
}


def words(line: str, run_dir: Path, file: Path) -> list[str]:
    return [str(file) if word == "FILE" else word.replace("RUN", str(run_dir)) for word in shlex.split(line)]


def inspect(line: str, run_dir: Path, file: Path, *args: str) -> Result:
    return lens.inspect(lens.parse([*words(line, run_dir, file), "--device", "cpu", *args]))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text("The cat and the dog and the cat. " * 9)
    return path


def test_every_inspection_prints_a_table_and_writes_the_models_numbers_and_a_picture(
    char_run: Path, text_file: Path, tmp_path: Path
) -> None:
    results: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, (line, keys) in INSPECTIONS.items():
        stem = name.split()[0]
        done = called(lens.main, *words(line, char_run, text_file), "--out", str(tmp_path), "--device", "cpu")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert str(tmp_path / f"{stem}.png") in done.stdout
        table = [line for line in done.stdout.splitlines() if line.startswith("|")]
        assert len(table) > 3 and len({line.replace("\\|", "").count("|") for line in table}) == 1
        record = json.loads((tmp_path / f"{stem}.json").read_text())
        assert list(record) == keys and record["step"] == 30
        results[name] = done.stdout, record

    trained = load_model(char_run)
    model = trained.model
    assert isinstance(model, GPT)
    tokens_BT = torch.tensor(trained.tokenizer.encode("The cat").astype("int64"))[None]
    _, record = results["attention"]
    assert record["tokens"] == tokens_BT[0].tolist() and record["texts"][:4] == ["'T'", "'h'", "'e'", "' '"]
    assert [(each["layer"], each["head"]) for each in record["heads"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    attention = attention_of(model, tokens_BT)
    for each in record["heads"]:
        close(torch.tensor(each["weights"]), attention[each["layer"]][0, each["head"]])
    assert results["attention-1.0"][1]["heads"] == [record["heads"][2]]

    printed, record = results["logit-lens"]
    assert [layer["after"] for layer in record["layers"]] == ["embedding", "block 0", "block 1"]
    with torch.no_grad():
        logits_TV = model(tokens_BT)[0, :, : trained.tokenizer.vocab_size]
    top = logits_TV.softmax(dim=1).topk(3)
    last = record["layers"][-1]
    assert last["top_tokens"] == top.indices.tolist()
    torch.testing.assert_close(torch.tensor(last["top_probabilities"]), top.values, rtol=0, atol=1e-6)
    losses_t = F.cross_entropy(logits_TV[:-1], tokens_BT[0, 1:], reduction="none")
    torch.testing.assert_close(torch.tensor(last["next_losses"]), losses_t, rtol=0, atol=2e-6)
    order = logits_TV.argsort(dim=1, descending=True).tolist()
    assert last["next_ranks"] == [row.index(token) for row, token in zip(order, record["tokens"][1:], strict=False)]
    assert f"| block 1   | {losses_t.mean():.4f} |" in printed

    _, record = results["patch"]
    assert len(record["patched"]) == 3 and len(record["patched"][0]) == 7
    assert record["restored"][0][:4] == pytest.approx([0] * 4, abs=1e-4), "the prompts begin with the same tokens"
    assert record["restored"][2][6] == pytest.approx(1, abs=1e-4)
    _, heads = results["patch heads"]
    assert len(heads["patched"]) == 2 and len(heads["patched"][0]) == 2 and heads["clean"] == record["clean"]

    printed, record = results["ablate"]
    assert record["by"] == "mean" and record["num_tokens"] == 96, "three sequences of 32"
    assert [(part["layer"], part["head"]) for part in record["parts"]] == [(i, h) for i in (0, 1) for h in (0, 1, None)]
    for part in record["parts"]:
        assert part["change"] == pytest.approx(part["loss"] - record["loss"], abs=3e-6)
        assert part["standard_error"] > 0
    assert f"Loss of 96 tokens: {record['loss']:.4f}" in printed

    printed, record = results["induction-checkpoints"]
    assert [each["step"] for each in record["checkpoints"]] == [10, 20, 30]
    single = results["induction"][1]["checkpoints"][0]
    without = {key: single[key] for key in ("loss_first_without", "loss_second_without")}
    assert single == record["checkpoints"][-1] | without
    tokens_BT = induction.repeated_tokens(trained.tokenizer.vocab_size, None, half=record["half"], num_rows=2, seed=1)
    with hooks.without_head(model, 1, 0, hooks.zero_replacements(model)):
        halves = induction.loss_of_halves(hooks.losses(model, tokens_BT))
    assert [each[1][0] for each in without.values()] == pytest.approx(halves, abs=2e-6)
    assert record["half"] == min(16, trained.tokenizer.vocab_size) and printed.count("\n| ") == 4
    best = max(score for row in record["checkpoints"][0]["induction"] for score in row)
    assert f"{best:.3f}" in printed.splitlines()[4]


def test_a_hugging_face_folder_gives_the_results_of_its_run(
    char_run: Path, byte_run: Path, text_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    for suffix in ("@10", "/checkpoints/step_00000010"):
        assert inspect(f"induction RUN{suffix} --num-sequences 2", char_run, text_file).record["step"] == 10
    folder = tmp_path / "folder"
    exported = called(hf_bridge.main, "export", str(byte_run), "--out", str(folder))
    assert exported.returncode == 0, exported.stderr
    for name, (line, _) in INSPECTIONS.items():
        if name == "induction-checkpoints":
            continue
        ours, theirs = (inspect(line, path, text_file) for path in (byte_run, folder))
        assert theirs.record["model"] == str(folder) and theirs.text == ours.text
        for record in (ours.record, theirs.record):
            (record["checkpoints"][0] if name == "induction" else record).pop("step")
        assert theirs.record | {"model": 0, "step": 0} == ours.record | {"model": 0, "step": 0}
    done = called(lens.main, "induction", str(folder), "--every-checkpoint")
    assert done.returncode == 2 and "--every-checkpoint needs a run directory with checkpoints in it" in done.stderr


def test_unusual_tokens_are_escaped_in_tables_and_pictures(byte_run: Path, tmp_path: Path) -> None:
    """A bar, a backquote, a line break, half a character, and dollars that are no formula."""
    args = ["--prompt", "a|b`c\n$\u00fc$ ", "--out", str(tmp_path)]
    done = called(lens.main, "attention", str(byte_run), "--layer", "0", "--head", "0", *args)
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in ("'a'", "'\\|'", "'\\`'", "'\\n'", "\\xc3"))
    assert all(line.replace("\\|", "").count("|") == 4 for line in done.stdout.splitlines() if line.startswith("|"))
    assert called(lens.main, "logit-lens", str(byte_run), *args).returncode == 0


def test_the_answers_are_the_likeliest_tokens_unless_these_are_the_same(char_run: Path) -> None:
    for clean, corrupt in (("The cat", "The dog"), ("e ", "Th")):
        records = [
            lens.inspect(lens.parse(["logit-lens", str(char_run), "--prompt", p])).record for p in (clean, corrupt)
        ]
        first, second = (record["layers"][-1]["top_texts"][-1][0] for record in records)
        done = called(lens.main, "patch", str(char_run), "--clean", clean, "--corrupt", corrupt)
        if first == second:
            assert f"{first} is the likeliest token after both prompts; give --answers A B" in done.stderr
        else:
            assert f"Logit of {first} less that of {second}" in done.stdout


def assert_refused(message: str, *args: str) -> None:
    done = called(lens.main, *args)
    assert done.returncode == 2 and done.stdout == "", args
    assert done.stderr.startswith("lens: ") and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("attention RUN --prompt ''", "--prompt is empty; give some text"),
        ("attention RUN --prompt \u00fc", "--prompt '\u00fc': character '\u00fc' at 0 is not among"),
        ("attention RUN --prompt T", "--prompt has 1 tokens; the model's context takes 2 to 32"),
        (f"logit-lens RUN --prompt {'T' * 33}", "--prompt has 33 tokens; the model's context takes 2 to 32"),
        ("logit-lens RUN --prompt The --top-k 999", "--top-k 999 must be at least 1 and at most "),
        ("attention RUN --prompt The --layer 2", "--layer 2: the model has 0 to 1"),
        ("ablate RUN --prompt The --file FILE", "give --prompt or --file, and not both"),
        ("ablate RUN --prompt T", "--prompt has 1 tokens; a loss needs at least 2"),
        ("ablate RUN --file FILE", "not UTF-8 (invalid start byte at byte 1)"),
        ("ablate RUN --file FILE --max-tokens 1", "--max-tokens 1 must be at least 2"),
        ("patch RUN --clean 'The cat' --corrupt 'A dog'", "--clean has 7 tokens, --corrupt 5; give prompts"),
        ("patch RUN --clean 'The cat' --corrupt 'The cat'", "--clean and --corrupt have the same tokens"),
        ("patch RUN --clean The --corrupt Thy --answers ab c", "--answers 'ab' is 2 tokens; each must be one"),
        ("patch RUN --clean The --corrupt Thy --answers c c", "--answers must be two different tokens"),
        ("induction RUN --half 17", "--half 17 must be at least 2 and at most 16: half the context of 32"),
        ("induction RUN --num-sequences 0", "--num-sequences 0 must be at least 1"),
        ("induction RUN@10 --every-checkpoint", "--every-checkpoint needs a run directory with checkpoints"),
        ("induction RUN --every-checkpoint --ablate", "--ablate needs a single checkpoint"),
        ("induction RUN --device cuda", "--device cuda: torch"),
        ("induction RUN --into gone.md", "gone.md: --into needs one <!-- lens induction -->"),
    ],
)
def test_what_cannot_be_inspected_is_refused_in_one_line(
    char_run: Path, tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "latin.txt").write_bytes("a\u00fc".encode("latin-1"))
    assert_refused(message, *words(line, char_run, tmp_path / "latin.txt"))


def test_other_kinds_of_models_and_broken_numbers_are_refused(char_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, broken = load_model(char_run), load_model(char_run)
    with torch.no_grad():
        broken.model.lm_head.weight[0, 0] = math.nan
    message = "--model.kind {} has no blocks to inspect; give a run of --model.kind gpt"
    models = [(dataclasses.replace(trained, model=kind(name)), message.format(name)) for name in BELOW]
    for model, text in [*models, (broken, "the model's numbers are not finite; give another checkpoint")]:
        monkeypatch.setattr("model.interp.common.load_model", lambda *_, model=model, **__: model)
        for command, *args in (["logit-lens", "--prompt", "The"], ["ablate", "--prompt", "The"], ["induction"]):
            assert_refused(text, command, str(char_run), *args)


def test_limits_of_numbers_differences_and_pictures(
    char_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["attention", str(char_run), "--prompt", "The"]
    monkeypatch.setattr(lens, "MAX_NUMBERS", 35)
    assert_refused("36 weights are more than 35; give --layer, --head or a shorter", *args)
    args += ["--head", "1"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert called(lens.main, *args).returncode == 0
    assert_refused("the picture needs matplotlib: pip install -e '.[plots]'", *args, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(lens, "MIN_LOGIT_CHANGE", 1e6)
    assert_refused(
        "--answers: the logits of 'a' and 'b' differ by the same after both prompts; give other answers",
        *words(INSPECTIONS["patch"][0], char_run, tmp_path),
    )


def test_the_printed_text_goes_into_a_page(char_run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- lens attention-1.0 -->\nold\n<!-- end -->\nafter\n")
    done = called(lens.main, *words(INSPECTIONS["attention-1.0"][0], char_run, tmp_path), "--into", str(page))
    assert page.read_text() == f"before\n<!-- lens attention-1.0 -->\n{done.stdout.rstrip()}\n<!-- end -->\nafter\n"


def test_bf16_is_near_fp32(char_run: Path, text_file: Path) -> None:
    line = INSPECTIONS["attention-1.0"][0]
    exact, near = (
        torch.tensor(inspect(line, char_run, text_file, "--dtype", dtype).record["heads"][0]["weights"])
        for dtype in ("fp32", "bf16")
    )
    assert 0 < (exact - near).abs().max() < 0.05


# --- The commands and tables of README, docs/inspect.md and --help ----------------------------------------------------

PAGE = (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")
COMMANDS = [
    line.strip().split(" #")[0]
    for text in ((ROOT / "README.md").read_text(encoding="utf-8"), PAGE, str(lens.__doc__))
    for line in text.splitlines()
    if re.match(r" +(\.venv/bin/)?python model/lens\.py ", line)
]


def test_the_documented_commands_parse() -> None:
    assert len(COMMANDS) > 10
    for line in COMMANDS:
        options = lens.parse(shlex.split(line)[2:])
        assert options.into in (None, Path("docs/inspect.md"))
        if options.into is not None:
            assert f"<!-- lens {options.name} -->" in PAGE.split(line)[1].split("    .venv/bin/")[0]
    for line in [line.strip() for line in PAGE.splitlines() if line.startswith("    .venv/bin/")]:
        args = shlex.split(line.split(" #")[0])
        script = next(index for index, word in enumerate(args) if word.endswith(".py"))
        if args[script] == "train/main.py":
            parse(args[script + 1 :], PRESETS)
        elif args[script] != "model/lens.py":
            assert all(word in help_of(args[script]) for word in args if word.startswith("--"))


def test_every_table_of_the_page_has_the_columns_of_its_command() -> None:
    blocks = dict(re.findall(r"<!-- lens ([\w.-]+) -->\n(.*?)<!-- end -->", PAGE, re.DOTALL))
    columns = {
        "induction": induction.COLUMNS,
        "induction-checkpoints": induction.COLUMNS_OVER_STEPS,
        "attention-1.2": lens.COLUMNS_OF_A_HEAD,
        "ablate": lens.COLUMNS_OF_PARTS,
        "patch": ("layer", "head 0", "head 1", "head 2", "head 3"),
    }
    options = [lens.parse(shlex.split(line)[2:]) for line in COMMANDS if "--into" in line]
    assert {each.name for each in options} == set(blocks) == set(columns) and PAGE.count("<!-- end -->") == len(blocks)
    for name, block in blocks.items():
        header = next(line for line in block.splitlines() if line.startswith("|"))
        assert [cell.strip() for cell in header.strip("|").split("|")] == list(columns[name]), name
        assert block.count("\n| ") >= 3
    rows = blocks["induction-checkpoints"].splitlines()
    assert [row.split("|")[4].strip() for row in rows[-5:]] == ["1.2"] * 5, "the head that the page follows"


def test_the_python_lines_of_the_page_run(char_run: Path) -> None:
    block = PAGE.split("\n\n    from model.interp.induction")[1].split("\n\nThe lines print")[0]
    code = textwrap.dedent("    from model.interp.induction" + block).replace('"runs/twice"', repr(str(char_run)))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace("[1, 2]", "[1, 1]"), {})
    assert re.fullmatch(r"0 0\.\d+\n1 0\.\d+\n", printed.getvalue())
