"""HellaSwag's scores against a plain loop over single, unpadded rows."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import InputError
from data_prep.hellaswag import Item, open_items
from data_prep.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer, make_tokenizer
from model.base import LanguageModel, init_weights
from model.config import ModelConfig
from model.ladder import make_model
from tests.helpers.hellaswag_items import make_rows, plain_scores, write_items
from train.evals.hellaswag import HellaSwag, ending_losses, make_questions, open_hellaswag, score
from train.evals.validation import Scoring
from train.losses import LossModel
from train.processes.group import ProcessGroup
from train.processes.stop_requests import StopRequests

ALONE = ProcessGroup(0, 1, torch.device("cpu"))
CONTEXT = 96
SMALL = ModelConfig(2, 2, 16, vocab_size=256, context_len=CONTEXT, eot_id=None)
OTHERS = {
    "bigram": {"kind": "bigram"},
    "block": {"kind": "block"},
    "flex": {"attention": "flex", "eot_id": 65},
    "naive": {"attention": "naive"},
    "rope, softcap": {"position_embedding": "rope", "logit_softcap": 0.5, "tie": False, "value_residual": True},
    "post norm": {"norm": "rmsnorm", "norm_place": "post", "position_embedding": "none", "mlp": "swiglu"},
    "padded vocabulary": {"vocab_multiple": 500},
}


def make(config: ModelConfig) -> LanguageModel:
    """Return a model with initial weights so large that it prefers some endings clearly."""
    model = make_model(config)
    init_weights(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def items_of(tmp_path: Path, num_items: int = 40) -> list[Item]:
    return open_items(write_items(tmp_path / "items.jsonl", num_items)).items


def check_against_plain(
    model: LanguageModel, tokenizer: Tokenizer, items: list[Item], batch_tokens: int, fixed_shapes: bool = True
) -> None:
    """Assert equal losses, equal choices and the score that they give."""
    context_len = model.config.context_len
    questions, _ = make_questions(items, tokenizer, context_len)
    data = HellaSwag(questions, context_len=context_len, batch_tokens=batch_tokens, fixed_shapes=fixed_shapes)
    heartbeats: list[str] = []
    scoring = Scoring(ALONE, StopRequests(None, is_main=True), heartbeats.append)
    losses_Q4 = ending_losses(LossModel(model, chunk_tokens=None), data, scoring)
    assert losses_Q4 is not None and len(heartbeats) == data.num_batches
    plain = torch.tensor(plain_scores(model, tokenizer, items), dtype=torch.float64)
    sums_Q4, num_scored_Q4 = plain.unbind(dim=2)
    assert [list(question.num_scored) for question in questions] == num_scored_Q4.tolist()
    torch.testing.assert_close(losses_Q4 / num_scored_Q4, sums_Q4 / num_scored_Q4, rtol=0, atol=1e-5)
    assert losses_Q4.argmin(dim=1).tolist() == sums_Q4.argmin(dim=1).tolist()
    assert (losses_Q4 / num_scored_Q4).argmin(dim=1).tolist() == (sums_Q4 / num_scored_Q4).argmin(dim=1).tolist()
    labels = torch.tensor([item.label for item in items])
    right = (sums_Q4.argmin(dim=1) == labels, (sums_Q4 / num_scored_Q4).argmin(dim=1) == labels)
    result = score(questions, losses_Q4)
    assert (result.acc, result.acc_norm) == tuple(each.double().mean().item() for each in right)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("changed", OTHERS.values(), ids=OTHERS)
def test_every_architecture_scores_as_one_row_at_a_time(tmp_path: Path, changed: dict[str, Any]) -> None:
    items = items_of(tmp_path, 5 if "attention" in changed else 40)
    check_against_plain(make(replace(SMALL, **changed)), ByteTokenizer(), items, batch_tokens=1000)


@pytest.mark.parametrize("fixed_shapes", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 20_000])
def test_every_batch_size_scores_the_same(tmp_path: Path, batch_tokens: int, fixed_shapes: bool) -> None:
    """One question at a time, or all of a length at once, which leaves most rows of a batch empty."""
    check_against_plain(make(SMALL), ByteTokenizer(), items_of(tmp_path), batch_tokens, fixed_shapes)


def test_real_items_score_as_one_row_at_a_time(shared_data: Path) -> None:
    """Items as bytes, some of them longer than the model's context."""
    items = open_items(shared_data / "hellaswag_val_1000.jsonl").items[::20]
    assert len(items) == 50
    check_against_plain(make(replace(SMALL, context_len=512, num_layers=1)), ByteTokenizer(), items, batch_tokens=8192)


def test_gpt2s_parts_have_the_ids_of_the_whole(shared_data: Path) -> None:
    tokenizer = make_tokenizer("gpt2", "")
    items = open_items(shared_data / "hellaswag_val_1000.jsonl").items
    questions, num_cut = make_questions(items, tokenizer, 1024)
    assert num_cut == 0
    for item, question in zip(items, questions, strict=True):
        for ending, row, num_scored in zip(item.endings, question.rows, question.num_scored, strict=True):
            assert list(row) == tokenizer.encode(f"{item.ctx} {ending}").tolist()
            assert list(row[-num_scored:]) == tokenizer.encode(f" {ending}").tolist()


def test_a_row_that_is_too_long_is_cut_on_the_left_and_counted(tmp_path: Path) -> None:
    """The cut takes the context first, then the ending."""
    row = make_rows(1)[0] | {"ctx": "c" * 10, "endings": ["e" * 3, "e" * 8, "e" * 9, "e" * 30]}
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (question,), num_cut = make_questions(open_items(path).items, ByteTokenizer(), 12)
    assert (num_cut, question.num_scored) == (1, (4, 9, 10, 12))
    rows = [b"c" * 9 + b" eee", b"cccc " + b"e" * 8, b"ccc " + b"e" * 9, b"e" * 13]
    assert [bytes(row) for row in question.rows] == rows
    data = open_hellaswag(path, ByteTokenizer(), context_len=12, batch_tokens=100, fixed_shapes=True)
    assert [remark.split(": ", 1)[1] for remark in data.remarks] == [
        "1 items, not the whole pinned set, so the score is not comparable",
        "1 items are longer than the model's context of 12: cut on the left",
    ]
    assert make_questions(open_items(path).items, ByteTokenizer(), 41)[1] == 0


def test_there_are_few_shapes_and_each_batch_has_one(tmp_path: Path) -> None:
    items = items_of(tmp_path, 100)
    questions, _ = make_questions(items, ByteTokenizer(), 256)
    for fixed_shapes in (True, False):
        data = HellaSwag(questions, context_len=256, batch_tokens=2048, fixed_shapes=fixed_shapes)
        shapes = [tuple(data.batch(index)[0].shape) for index in range(data.num_batches + 2)]
        assert set(shapes) == set(data.shapes)
        assert not fixed_shapes or data.shapes == [(16, 128), (32, 64), (64, 32)]
        assert sum(B * T for B, T in shapes) <= 2048 * len(shapes)
        assert sorted(n for index in range(data.num_batches + 2) for n in data.questions_of(index)) == list(range(100))
        assert (data.batch(data.num_batches)[1] == -100).all()


def test_shares_and_their_standard_errors(tmp_path: Path) -> None:
    questions, _ = make_questions(items_of(tmp_path, 5), ByteTokenizer(), CONTEXT)
    labels = torch.tensor([question.label for question in questions])
    losses = torch.ones(5, 4, dtype=torch.float64)
    losses[torch.arange(5), labels] = torch.tensor([0.0, 0.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    result = score(questions, losses)
    assert (result.acc, result.items) == (0.4, 5)
    right = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])
    assert result.acc_stderr == pytest.approx(right.std().item() / math.sqrt(5))  # the sample's, as lm-eval has it
    assert score(questions[:1], losses[:1]).acc_stderr is None
    losses[3, 1] = math.nan
    assert math.isnan(score(questions, losses).acc) and math.isnan(score(questions, losses).acc_norm)


def test_a_tokenizer_that_cannot_encode_it_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_data)
    make_questions(items_of(tmp_path), tokenizer, CONTEXT)
    with pytest.raises(InputError, match=r"40 of 40 items cannot be encoded .* first item 1: character '.' at 0"):
        make_questions(items_of(tmp_path), CharTokenizer("xyz"), CONTEXT)


def test_nothing_to_score_is_refused(tmp_path: Path) -> None:
    item = Item(0, "", "", "", "", ("", "a", "b", "c"), 0)
    with pytest.raises(InputError, match="item 1 has an ending of one token and no context"):
        make_questions([item], ByteTokenizer(), CONTEXT)
    # With more than one token there is: all but the first.
    (question,), _ = make_questions([replace(item, endings=("ab", "a", "b", "c"))], ByteTokenizer(), CONTEXT)
    assert question.num_scored == (2, 1, 1, 1)
