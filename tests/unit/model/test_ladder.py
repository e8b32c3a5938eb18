"""The rungs below GPT against torch's own modules and against counting; the command; the course's page."""

import dataclasses
import math
import re
import shlex
from collections import Counter
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
from model import ladder
from model.base import LanguageModel, init_weights
from model.config import Kind, ModelConfig
from model.cost import count_forward_flops, model_cost
from tests.helpers.runs import ROOT, called
from tests.unit.test_readme import help_of
from train.command_line import parse
from train.presets import PRESETS

BELOW = tuple(RUNGS)[:-1]
B, T, D, V = 3, 12, 32, 50
each_rung_below = pytest.mark.parametrize("name", BELOW)


def kind(name: Any, seed: int = 1, **changes: Any) -> LanguageModel:
    config = ModelConfig(kind=name, num_heads=4, width=D, vocab_size=V, context_len=T)
    model = ladder.make_model(dataclasses.replace(config, **changes))
    init_weights(model, seed)
    return model


def some_tokens(seed: int = 0) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


# --- Against torch's modules ------------------------------------------------------------------------------------------


def attended(weights: dict[str, Tensor], x_BTD: Tensor, out_DD: Tensor) -> Tensor:
    """Return nn.MultiheadAttention's output with the matrices of a rung's heads, one head after the other."""
    num_heads = sum(name.endswith("query.weight") for name in weights)
    reference = nn.MultiheadAttention(D, num_heads, bias=False, batch_first=True)
    in_proj = [weights[f"heads.{i}.{name}.weight"] for name in ("query", "key", "value") for i in range(num_heads)]
    reference.load_state_dict({"in_proj_weight": torch.cat(in_proj), "out_proj.weight": out_DD})
    mask_TT = nn.Transformer.generate_square_subsequent_mask(T)
    y_BTD: Tensor = reference(x_BTD, x_BTD, x_BTD, attn_mask=mask_TT, is_causal=True, need_weights=False)[0]
    return y_BTD


def reference_logits(name: str, weights: dict[str, Tensor], tokens_BT: Tensor) -> Tensor:
    """Compute a rung's logits by torch's modules."""
    head_VD = weights["lm_head.weight"]
    if name == "bigram":
        return F.embedding(tokens_BT, head_VD.T)
    x_BTD = F.embedding(tokens_BT, weights["token_embedding.weight"]) + weights["position_embedding.weight"]
    if name != "block":
        return attended(weights, x_BTD, torch.eye(D)) @ head_VD.T
    norm_1, norm_2, norm_3 = (weights[f"norm_{i}.weight"] for i in (1, 2, 3))
    x_BTD = x_BTD + attended(weights, F.layer_norm(x_BTD, (D,), norm_1), weights["mix.weight"])
    y_BTF = F.gelu(F.layer_norm(x_BTD, (D,), norm_2) @ weights["up.weight"].T, approximate="tanh")
    return F.layer_norm(x_BTD + y_BTF @ weights["down.weight"].T, (D,), norm_3) @ head_VD.T


@each_rung_below
def test_a_rung_equals_torchs_modules_and_reads_only_the_past(name: str) -> None:
    model, tokens_BT = kind(name), some_tokens()
    with torch.no_grad():  # larger weights, so that each counts
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.5, generator=torch.Generator().manual_seed(7))
        logits_BTV = model(tokens_BT)
        expected_BTV = reference_logits(name, model.state_dict(), tokens_BT)
        torch.testing.assert_close(logits_BTV, expected_BTV, rtol=1e-4, atol=1e-4)
        changed_BT = tokens_BT.clone()
        changed_BT[:, 6] = (changed_BT[:, 6] + 1) % V
        is_same_T = torch.isclose(logits_BTV, model(changed_BT), rtol=0, atol=1e-6).all(dim=2).all(dim=0)
    assert is_same_T[:6].all() and not is_same_T[6]
    assert is_same_T[7:].all() == (name == "bigram"), "a bigram reads the last token only"
    with pytest.raises(ValueError, match="13 tokens exceed the model's context of 12"):
        model(torch.zeros(1, 13, dtype=torch.int64))


@each_rung_below
def test_a_rungs_parameters_and_flops_are_torchs_counts(name: str) -> None:
    model = kind(name)
    cost = model_cost(model.config)
    assert cost.num_parameters == sum(p.numel() for p in model.parameters()) and cost.num_padding_parameters == 0
    with FlopCounterMode(display=False) as counter:
        logits_BTV = model(some_tokens())
        forward = counter.get_total_flops()
        logits_BTV.sum().backward()
    assert sum(count_forward_flops(model.config, batch=B, seq_len=T).values()) == forward
    assert cost.flops_per_token * B * T == counter.get_total_flops()


def test_every_rung_starts_at_the_loss_of_a_uniform_guess() -> None:
    assert get_args(Kind) == tuple(ladder.MODELS) == tuple(RUNGS)
    for name in RUNGS:
        logits_BTV = kind(name)(some_tokens())
        loss = F.cross_entropy(logits_BTV[..., :V].flatten(0, 1), some_tokens(1).flatten())
        assert loss.item() == pytest.approx(math.log(V), abs=0.05), name


# --- Characters, and the counted bigram -------------------------------------------------------------------------------


def test_pairs_are_counted() -> None:
    ids = np.array([0, 1, 0, 1, 2, 0], dtype=np.uint16)
    counts = ladder.count_pairs(ids, 3)
    assert counts.tolist() == [[0, 2, 0], [1, 0, 1], [1, 0, 0]]
    pairs = Counter(zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True))
    first_ids = Counter(ids[:-1].tolist())
    by_hand = -sum(n * math.log((pairs[p] + 1) / (first_ids[p[0]] + 3)) for p, n in pairs.items()) / 5
    assert ladder.counted_loss(counts, counts) == pytest.approx(by_hand)


def test_training_a_bigram_approaches_the_counted_one(tiny_data: Path) -> None:
    """No table has a lower loss on its own pairs than counting without the added 1."""
    stream = open_split(tiny_data, "train")
    ids = stream.read(0, len(stream)).astype(np.int64)
    vocab_size = read_manifest(tiny_data).vocab_size
    counts = ladder.count_pairs(ids, vocab_size)
    with np.errstate(divide="ignore", invalid="ignore"):
        pair_losses = np.where(counts > 0, -np.log(counts / counts.sum(axis=1, keepdims=True)), 0.0)
    lowest = float((pair_losses * counts).sum() / counts.sum())
    model = kind("bigram", vocab_size=vocab_size, context_len=len(ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    inputs, targets = torch.from_numpy(ids[None, :-1]), torch.from_numpy(ids[1:])
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs)[0], targets)
        loss.backward()
        optimizer.step()
    assert lowest < loss.item() < lowest + 0.01


def test_the_command_shows_characters_as_numbers_and_refuses_other_data(tiny_data: Path, tmp_path: Path) -> None:
    shown = called(ladder.main, str(tiny_data))
    assert shown.returncode == 0, shown.stderr
    tokenizer: Any = load_tokenizer(tiny_data)
    first_ids = open_split(tiny_data, "train").read(0, 24).tolist()
    texts = [f"{len(tokenizer.itos)} characters", str(first_ids), repr(tokenizer.decode_bytes(first_ids).decode())]
    texts += [f"{character!r}: {tokenizer.stoi[character]}" for character in tokenizer.itos[:8]]
    assert all(text in shown.stdout for text in [*texts, f"{math.log(len(tokenizer.itos)):.4f}"])
    (tmp_path / "text.txt").write_text("as bytes, please\n" * 100)
    prepare(Options(input=(str(tmp_path / "text.txt"),), out=tmp_path / "bytes", tokenizer="byte"))
    for folder, message in (
        ("bytes", " has no character tokenizer; prepare it with --tokenizer char"),
        ("gone", ": no such data directory"),
    ):
        refused = called(ladder.main, str(tmp_path / folder))
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert refused.stderr.startswith(f"ladder: {tmp_path / folder}{message}")


# --- The course -------------------------------------------------------------------------------------------------------

COURSE = (ROOT / "docs" / "ladder.md").read_text(encoding="utf-8")
COMMANDS = [
    line.strip().split("#")[0]
    for line in COURSE.splitlines()
    if line.startswith("    .venv/bin/") and "launch/" not in line  # tests/unit/launch/test_sweep.py has those
]


def test_the_course_shows_what_the_command_prints(shared_data: Path, tmp_path: Path) -> None:
    prepare(Options(input=(str(shared_data / "tinyshakespeare.txt"),), out=tmp_path / "data", tokenizer="char"))
    printed = called(ladder.main, str(tmp_path / "data")).stdout
    shown = COURSE.split("<!-- ladder data/tinyshakespeare -->\n")[1].split("<!-- end -->")[0]
    assert shown == "".join(f"    {line}".rstrip() + "\n" for line in printed.splitlines())


@pytest.mark.parametrize("line", COMMANDS)
def test_the_courses_commands_have_existing_flags(line: str) -> None:
    words = shlex.split(line)
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    if words[script] == "train/main.py":
        parse(words[script + 1 :], PRESETS)
    else:
        assert all(word in help_of(words[script]) for word in words if word.startswith("--"))


def test_the_course_and_the_module_name_existing_files_and_every_rung() -> None:
    for name in re.findall(r"`((?:model|train|data_prep|tests|launch)/\w+\.py)`", COURSE):
        assert (ROOT / name).is_file(), name
    assert all(f"\n    {name} " in str(ladder.__doc__) for name in RUNGS)
