"""Validation against a plain loop over the split, one sequence at a time."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import InputError
from data_prep.manifest import open_split
from data_prep.shards import TokenStream, open_shard
from data_prep.tokenizer import load_tokenizer
from model.config import ModelConfig
from model.gpt import GPT, build_model
from train.evals.validation import Scoring, ValidationSet, sequence_sums, standard_error, validate
from train.losses import LossModel
from train.processes.group import ProcessGroup
from train.processes.stop_requests import StopRequests

ALONE = ProcessGroup(0, 1, torch.device("cpu"))
T = 32


@pytest.fixture
def model(tiny_data: Path) -> GPT:
    vocab_size = load_tokenizer(tiny_data).vocab_size
    return build_model(ModelConfig(2, 2, 32, vocab_size=vocab_size, context_len=T), seed=1)


@pytest.mark.parametrize("num_tokens", [None, 1000, 31, 960])
@pytest.mark.parametrize("micro_batch", [1, 7])
def test_equals_a_plain_loop(tiny_data: Path, model: GPT, micro_batch: int, num_tokens: int | None) -> None:
    stream = open_split(tiny_data, "val")
    tokens = torch.from_numpy(stream.read(0, len(stream)).astype(np.int64))
    scored = min(num_tokens or len(tokens), len(tokens) - 1)
    text = load_tokenizer(tiny_data).decode_bytes(tokens[1 : scored + 1].tolist())
    sequence_losses = []
    with torch.no_grad():
        for start in range(0, scored, T):
            stop = min(start + T, scored)
            logits = model(tokens[None, start:stop])[0, :, : model.config.vocab_size]
            targets = tokens[start + 1 : stop + 1]
            sequence_losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item())
    loss_sum = math.fsum(sequence_losses)

    byte_lengths = load_tokenizer(tiny_data).byte_lengths()
    data = ValidationSet(stream, seq_len=T, micro_batch=micro_batch, num_tokens=num_tokens, byte_lengths=byte_lengths)
    heartbeats: list[str] = []
    scoring = Scoring(ALONE, StopRequests(None, is_main=True), heartbeats.append)
    result = validate(LossModel(model, chunk_tokens=100 if micro_batch == 7 else None), data, scoring)
    assert result is not None and result.tokens == scored
    assert len(heartbeats) == data.num_batches
    assert result.loss == pytest.approx(loss_sum / scored, abs=1e-6)
    assert result.bits_per_byte == pytest.approx(loss_sum / math.log(2) / len(text), abs=1e-6)
    assert model.training
    if len(sequence_losses) < 2:
        assert result.stderr is None
    elif scored % T == 0:
        means = np.array(sequence_losses) / T
        assert result.stderr == pytest.approx(means.std(ddof=1) / math.sqrt(len(means)), rel=1e-4)
    else:
        assert result.stderr is not None and 0 < result.stderr < 0.1


def test_the_standard_error_is_how_far_samples_of_sequences_spread() -> None:
    """Against many draws from a population whose sequences differ in loss and in length."""
    generator = np.random.default_rng(1)
    tokens = np.where(generator.random((4000, 50)) < 0.1, 8.0, 32.0)
    losses = tokens * generator.normal(3.0, 0.5, (4000, 50))
    errors = [
        standard_error(*sequence_sums(torch.from_numpy(ls), torch.from_numpy(ns)).tolist())
        for ls, ns in zip(losses, tokens, strict=True)
    ]
    means = losses.sum(axis=1) / tokens.sum(axis=1)
    assert np.mean(np.array(errors, dtype=float)) == pytest.approx(means.std(), rel=0.03)


def test_an_empty_split_is_refused(tiny_data: Path) -> None:
    shard = open_shard(next(iter(sorted(tiny_data.glob("val_*.bin")))))
    lone = TokenStream([type(shard)(shard.path, shard.tokens[:1], shard.vocab_size, None, 1)])
    with pytest.raises(InputError, match="--val-fraction"):
        ValidationSet(lone, seq_len=T, micro_batch=1, num_tokens=None, byte_lengths=np.ones(33, dtype=np.int64))
