"""HellaSwag's form around generated text, and a plain scorer of one row at a time."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_prep.hellaswag import Item
from data_prep.tokenizer import Tokenizer
from model.base import LanguageModel
from tests.helpers.corpus import make_text


def make_rows(num_items: int, seed: int = 1) -> list[dict[str, Any]]:
    """Items of very different lengths, as the original file has them, all of letters that helpers/corpus.py uses."""
    text, chance = make_text(20_000), random.Random(seed)

    def some(longest: int) -> str:
        start = chance.randrange(len(text) - longest)
        return text[start : start + chance.randint(2, longest)].replace("\n", " ").strip() or "a"

    return [
        {
            "ind": index,
            "activity_label": "a",
            "ctx_a": "a",
            "ctx_b": "",
            "ctx": some(60),
            "endings": [some(chance.choice([8, 20, 40])) for _ in range(4)],
            "label": chance.randrange(4),
        }
        for index in range(num_items)
    ]


def write_items(path: Path, num_items: int, seed: int = 1) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(num_items, seed)), encoding="utf-8")
    return path


@torch.no_grad()
def plain_scores(model: LanguageModel, tokenizer: Tokenizer, items: Sequence[Item]) -> list[list[tuple[float, int]]]:
    """(summed loss, tokens scored) of every ending: each row by itself, unpadded, as far as the model sees."""
    found = []
    for item in items:
        endings = []
        for ending in item.endings:
            before, after = tokenizer.encode(item.ctx).tolist(), tokenizer.encode(" " + ending).tolist()
            row = torch.tensor((before + after)[-(model.config.context_len + 1) :])
            num_scored = min(len(after), len(row) - 1)
            logits = model.logits(model.hidden_states(row[None, :-1])[0, -num_scored:])[:, : model.config.vocab_size]
            losses = -logits.float().log_softmax(dim=1)[torch.arange(num_scored), row[-num_scored:]]
            endings.append((losses.double().sum().item(), num_scored))
        found.append(endings)
    return found
