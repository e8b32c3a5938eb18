"""Generated items in HellaSwag's format, and a plain scorer that takes one row at a time."""

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
    """Return items of very different lengths, as in the original file, in the letters of helpers/corpus.py."""
    text, rng = make_text(20_000), random.Random(seed)

    def random_text(longest: int) -> str:
        start = rng.randrange(len(text) - longest)
        return text[start : start + rng.randint(2, longest)].replace("\n", " ").strip() or "a"

    return [
        {
            "ind": index,
            "activity_label": "a",
            "ctx_a": "a",
            "ctx_b": "",
            "ctx": random_text(60),
            "endings": [random_text(rng.choice([8, 20, 40])) for _ in range(4)],
            "label": rng.randrange(4),
        }
        for index in range(num_items)
    ]


def write_items(path: Path, num_items: int, seed: int = 1) -> Path:
    """Write the items as JSONL and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(num_items, seed)), encoding="utf-8")
    return path


@torch.no_grad()
def plain_scores(model: LanguageModel, tokenizer: Tokenizer, items: Sequence[Item]) -> list[list[tuple[float, int]]]:
    """Return (summed loss, tokens scored) of every ending. Each row is scored alone, unpadded, cut to the context."""
    scores = []
    for item in items:
        endings = []
        for ending in item.endings:
            context, continuation = tokenizer.encode(item.ctx).tolist(), tokenizer.encode(" " + ending).tolist()
            row = torch.tensor((context + continuation)[-(model.config.context_len + 1) :])
            num_scored = min(len(continuation), len(row) - 1)
            logits = model.logits(model.hidden_states(row[None, :-1])[0, -num_scored:])[:, : model.config.vocab_size]
            losses = -logits.float().log_softmax(dim=1)[torch.arange(num_scored), row[-num_scored:]]
            endings.append((losses.double().sum().item(), num_scored))
        scores.append(endings)
    return scores
