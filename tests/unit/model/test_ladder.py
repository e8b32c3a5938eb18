"""The rungs below GPT: each against torch's own modules and against counting; trained, stopped, sampled, refused."""

import dataclasses
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data_prep.manifest import open_split, read_manifest
from data_prep.textfiles import Options, prepare
from data_prep.tokenizer import load_tokenizer
from launch.sweeps import RUNGS
from model import generate, ladder
from model.base import LanguageModel, init_weights
from model.checkpoint import load_model
from model.config import Kind, ModelConfig
from model.cost import count_forward_flops, model_cost
from model.cost import main as cost_command
from model.hf.format import to_hugging_face
from tests.distributed.test_exact import cut_back
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import (
    ROOT,
    assert_same_tensors,
    called,
    curve,
    final_tensors,
    losses,
    status,
    tiny_config,
    tiny_flags,
    validations,
)
from tests.unit.test_readme import help_of
from train import main as trainer
from train.config import Config, parse, with_vocabulary
from train.config_checks import settings_without_effect
from train.main import run
from train.presets import PRESETS
from train.processes.group import ProcessGroup

BELOW = tuple(RUNGS)[:-1]
B, T, D, V = 3, 12, 32, 50


def kind(name: Any, seed: int = 1, **changes: Any) -> LanguageModel:
    config = ModelConfig(kind=name, num_heads=4, width=D, vocab_size=V, context_len=T)
    model = ladder.make_model(dataclasses.replace(config, **changes))
    init_weights(model, seed)
    return model


def some_tokens(seed: int = 0) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def test_the_rungs_are_the_ones_that_can_be_asked_for() -> None:
    assert get_args(Kind) == tuple(ladder.MODELS) == tuple(RUNGS)


# --- Against torch's own modules --------------------------------------------------------------------------------------


def weight(model: LanguageModel, name: str) -> Tensor:
    return model.state_dict()[name]


def bigram_reference(model: LanguageModel, tokens_BT: Tensor) -> Tensor:
    return F.embedding(tokens_BT, weight(model, "lm_head.weight").T)


def embedded(model: LanguageModel, tokens_BT: Tensor) -> Tensor:
    tokens_BTD = F.embedding(tokens_BT, weight(model, "token_embedding.weight"))
    return tokens_BTD + weight(model, "position_embedding.weight")[: tokens_BT.shape[1]]


def attended(model: LanguageModel, x_BTD: Tensor, out_DD: Tensor, num_heads: int) -> Tensor:
    """nn.MultiheadAttention with the rung's matrices, a row of each head after the other."""
    parts = [
        [weight(model, f"heads.{i}.{name}.weight") for i in range(num_heads)] for name in ("query", "key", "value")
    ]
    reference = nn.MultiheadAttention(D, num_heads, bias=False, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([torch.cat(part) for part in parts]))
        reference.out_proj.weight.copy_(out_DD)
        mask_TT = nn.Transformer.generate_square_subsequent_mask(x_BTD.shape[1])
        y_BTD: Tensor = reference(x_BTD, x_BTD, x_BTD, attn_mask=mask_TT, is_causal=True, need_weights=False)[0]
    return y_BTD


def heads_reference(model: LanguageModel, tokens_BT: Tensor, num_heads: int) -> Tensor:
    y_BTD = attended(model, embedded(model, tokens_BT), torch.eye(D), num_heads)
    return y_BTD @ weight(model, "lm_head.weight").T


def block_reference(model: LanguageModel, tokens_BT: Tensor) -> Tensor:
    def normed(x_BTD: Tensor, name: str) -> Tensor:
        return F.layer_norm(x_BTD, (D,), weight(model, f"{name}.weight"))

    x_BTD = embedded(model, tokens_BT)
    x_BTD = x_BTD + attended(model, normed(x_BTD, "norm_1"), weight(model, "mix.weight"), 4)
    y_BTF = F.gelu(normed(x_BTD, "norm_2") @ weight(model, "up.weight").T, approximate="tanh")
    x_BTD = x_BTD + y_BTF @ weight(model, "down.weight").T
    return normed(x_BTD, "norm_3") @ weight(model, "lm_head.weight").T


REFERENCES: dict[str, Callable[[LanguageModel, Tensor], Tensor]] = {
    "bigram": bigram_reference,
    "head": partial(heads_reference, num_heads=1),
    "heads": partial(heads_reference, num_heads=4),
    "block": block_reference,
}


@pytest.mark.parametrize("name", BELOW)
def test_a_rung_computes_what_torchs_modules_do(name: str) -> None:
    model = kind(name)
    with torch.no_grad():  # so that every weight counts
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.5, generator=torch.Generator().manual_seed(7))
        found_BTV = model(some_tokens())
    assert found_BTV.shape == (B, T, V)
    torch.testing.assert_close(found_BTV, REFERENCES[name](model, some_tokens()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BELOW)
def test_a_rung_reads_only_the_past(name: str) -> None:
    model, tokens_BT = kind(name), some_tokens()
    changed_BT = tokens_BT.clone()
    changed_BT[:, 6] = (changed_BT[:, 6] + 1) % V
    with torch.no_grad():
        is_same_T = (
            torch.isclose(model(tokens_BT), model(changed_BT), rtol=0, atol=1e-7).flatten(2).all(dim=2).all(dim=0)
        )
    assert is_same_T[:6].all() and not is_same_T[6]
    assert is_same_T[7:].all() == (name == "bigram"), "a bigram forgets at once"


@pytest.mark.parametrize("name", RUNGS)
def test_the_first_loss_is_that_of_knowing_nothing(name: str) -> None:
    logits_BTV = kind(name)(some_tokens())
    loss = F.cross_entropy(logits_BTV[..., :V].flatten(0, 1), some_tokens(1).flatten())
    assert loss.item() == pytest.approx(math.log(V), abs=0.05)


@pytest.mark.parametrize("name", BELOW)
def test_too_long_a_context_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="13 tokens exceed the model's context of 12"):
        kind(name)(torch.zeros(1, 13, dtype=torch.int64))


# --- Accounting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BELOW)
def test_a_rung_is_counted_as_it_is(name: str) -> None:
    model = kind(name)
    cost = model_cost(model.config)
    assert cost.num_parameters == sum(p.numel() for p in model.parameters()) and cost.num_padding_parameters == 0
    with FlopCounterMode(display=False) as counter:
        logits_BTV = model(some_tokens())
        forward = counter.get_total_flops()
        logits_BTV.sum().backward()
    assert sum(count_forward_flops(model.config, batch=B, seq_len=T).values()) == forward
    assert cost.flops_per_token * B * T == counter.get_total_flops()


# --- Characters, and the bigram by counting ---------------------------------------------------------------------------


def test_pairs_are_counted() -> None:
    ids = np.array([0, 1, 0, 1, 2, 0], dtype=np.uint16)
    counts = ladder.count_pairs(ids, 3)
    assert counts.sum() == 5 and counts[0, 1] == 2 and counts[1, 0] == counts[1, 2] == counts[2, 0] == 1
    pairs = Counter(zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True))
    given = Counter(ids[:-1].tolist())
    by_hand = -sum(n * math.log((pairs[p] + 1) / (given[p[0]] + 3)) for p, n in pairs.items()) / 5
    assert ladder.counted_loss(counts, counts) == pytest.approx(by_hand)


def test_a_trained_bigram_comes_to_the_counted_one(tiny_data: Path) -> None:
    """By steepest descent on the very pairs, whose loss no table can push below what counting gives (without the one
    that is added to each count)."""
    stream = open_split(tiny_data, "train")
    ids = stream.read(0, len(stream)).astype(np.int64)
    vocab_size = read_manifest(tiny_data).vocab_size
    counts = ladder.count_pairs(ids, vocab_size)
    with np.errstate(divide="ignore", invalid="ignore"):
        per_pair = np.where(counts > 0, -np.log(counts / counts.sum(axis=1, keepdims=True)), 0.0)
    lowest = float((per_pair * counts).sum() / counts.sum())
    model = kind("bigram", vocab_size=vocab_size, context_len=len(ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    inputs, targets = torch.from_numpy(ids[None, :-1]), torch.from_numpy(ids[1:])
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs)[0], targets)
        loss.backward()
        optimizer.step()
    assert lowest < loss.item() < lowest + 0.01


def test_the_command_shows_characters_as_numbers(tiny_data: Path, tmp_path: Path) -> None:
    done = called(ladder.main, str(tiny_data))
    assert done.returncode == 0, done.stderr
    tokenizer: Any = load_tokenizer(tiny_data)
    stream = open_split(tiny_data, "train")
    first = stream.read(0, 24).tolist()
    assert f"{len(tokenizer.itos)} characters" in done.stdout and str(first) in done.stdout
    assert repr(tokenizer.decode_bytes(first).decode()) in done.stdout
    for character in tokenizer.itos[:8]:
        assert f"{character!r}: {tokenizer.stoi[character]}" in done.stdout
    assert f"{math.log(len(tokenizer.itos)):.4f}" in done.stdout
    gone = called(ladder.main, str(tmp_path / "gone"))
    assert gone.returncode == 2 and gone.stderr.startswith(f"ladder: {tmp_path / 'gone'}: no such data directory")


def test_the_command_wants_characters(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("as bytes, please\n" * 100)
    prepare(Options(input=(str(tmp_path / "text.txt"),), out=tmp_path / "bytes", tokenizer="byte"))
    done = called(ladder.main, str(tmp_path / "bytes"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "has no character tokenizer; prepare it with --tokenizer char" in done.stderr


# --- Trained by train/main.py -----------------------------------------------------------------------------------------


def configured(data: Path, run_dir: Path, name: Any, **train: Any) -> Config:
    config = with_vocabulary(tiny_config(data, run_dir, steps=30, **train), read_manifest(data).vocab_size)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, kind=name))


def train_here(group: ProcessGroup, config: Config) -> None:
    run(config, group)


@pytest.mark.parametrize("name", BELOW)
def test_a_rung_learns_stops_and_goes_on(tiny_data: Path, tmp_path: Path, name: str) -> None:
    alone = ProcessGroup(0, 1, torch.device("cpu"))
    run(configured(tiny_data, tmp_path / "whole", name), alone)
    first, *_, last = (loss for _, loss, _ in validations(tmp_path / "whole"))
    assert last < first - 0.1
    cut_back(tmp_path / "whole", tmp_path / "parts", 20)
    run(configured(tiny_data, tmp_path / "parts", name), alone)
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    assert_same_tensors(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "parts"))
    trained = load_model(tmp_path / "parts")
    assert type(trained.model) is ladder.MODELS[name]
    said = called(generate.main, str(tmp_path / "parts"), "--max-tokens", "20", "--device", "cpu")
    assert said.returncode == 0 and len(said.stdout) >= 20


@pytest.mark.parametrize("name", ["bigram", "block"])
def test_two_processes_train_the_same_rung(tiny_data: Path, tmp_path: Path, name: str) -> None:
    run(configured(tiny_data, tmp_path / "one", name), ProcessGroup(0, 1, torch.device("cpu")))
    run_on_ranks(2, train_here, configured(tiny_data, tmp_path / "two", name))
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["heads", "block"])
def test_the_chunked_loss_serves_a_rung_too(tiny_data: Path, tmp_path: Path, name: str) -> None:
    for loss in ("plain", "chunked"):
        run(configured(tiny_data, tmp_path / loss, name, loss=loss), ProcessGroup(0, 1, torch.device("cpu")))
    torch.testing.assert_close(losses(tmp_path / "chunked"), losses(tmp_path / "plain"), rtol=0, atol=1e-5)


def test_what_a_rung_has_not_is_refused_by_name(tiny_data: Path, tmp_path: Path) -> None:
    flags = [*tiny_flags(tiny_data, tmp_path / "run"), "--model.kind", "head"]
    for more, line in (
        (["--model.mlp", "swiglu", "--model.no-bias"], "--model.mlp, --model.bias: of --model.kind gpt only"),
        (["--parallel.mode", "fsdp"], "--parallel.mode fsdp shares out blocks, --model.kind head has none; use ddp"),
        (
            ["--model.kind", "heads", "--model.num-heads", "5"],
            "--model.width 32 is not divisible by --model.num-heads 5",
        ),
        (["--model.kind", "table"], "--model.kind"),
    ):
        done = called(trainer.main, *flags, *more, "--dry-run")
        assert done.returncode == 2 and line in done.stderr, done.stderr
    dry = called(trainer.main, *flags, "--train.activation-checkpointing", "--dry-run")
    assert "32 wide, context 32: " in dry.stdout and "memory" not in dry.stdout
    assert "--train.activation-checkpointing has no effect with --model.kind head" in dry.stdout
    assert not (tmp_path / "run").exists()
    cost = called(cost_command, "gpt2-small", "--model.kind", "head")
    assert cost.returncode == 2 and "--model.kind head: train/main.py --dry-run tells what it costs" in cost.stderr
    with pytest.raises(ValueError, match="kind"):
        to_hugging_face(kind("head").state_dict(), kind("head").config)


def test_a_rungs_weights_are_not_anothers(tiny_data: Path, tmp_path: Path) -> None:
    run(configured(tiny_data, tmp_path / "head", "head"), ProcessGroup(0, 1, torch.device("cpu")))
    flags = tiny_flags(tiny_data, tmp_path / "heads")
    done = called(trainer.main, *flags, "--model.kind", "heads", "--from-checkpoint", str(tmp_path / "head"))
    assert done.returncode == 2 and "its model does not fit this run: kind head (this run: heads)" in done.stderr
    again = called(trainer.main, *tiny_flags(tiny_data, tmp_path / "head"), "--model.kind", "heads")
    assert again.returncode == 2 and "--model.kind heads (was head)" in again.stderr
    assert status(tmp_path / "head")["state"] == "done"


def test_the_module_says_what_the_rungs_are() -> None:
    text = (ROOT / "model" / "ladder.py").read_text(encoding="utf-8")
    assert all(f"\n    {name} " in text for name in RUNGS)
    assert not settings_without_effect(Config(), "cuda", 1, "none")


def test_the_course_shows_what_the_command_prints(shared_data: Path, tmp_path: Path) -> None:
    prepare(Options(input=(str(shared_data / "tinyshakespeare.txt"),), out=tmp_path / "data", tokenizer="char"))
    printed = called(ladder.main, str(tmp_path / "data")).stdout
    course = (ROOT / "docs" / "ladder.md").read_text(encoding="utf-8")
    shown = course.split("<!-- ladder data/tinyshakespeare -->\n")[1].split("<!-- end -->")[0]
    assert shown == "".join(f"    {line}".rstrip() + "\n" for line in printed.splitlines())


COMMANDS = [
    line.strip().split("#")[0]
    for line in (ROOT / "docs" / "ladder.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("    .venv/bin/") and "launch/" not in line  # tests/unit/launch/test_sweep.py has those
]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_courses_commands_name_what_there_is(line: str) -> None:
    words = shlex.split(line)
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    if words[script] == "train/main.py":
        parse(words[script + 1 :], PRESETS)
    else:
        shown = help_of(words[script])
        assert all(word in shown for word in words if word.startswith("--"))


def test_what_the_course_names_is_there() -> None:
    course = (ROOT / "docs" / "ladder.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:model|train|data_prep|tests|launch)/\w+\.py)`", course):
        assert (ROOT / name).is_file(), name
