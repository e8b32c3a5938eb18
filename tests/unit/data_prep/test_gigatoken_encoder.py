"""gigatoken's ids are tiktoken's, or gigatoken is refused."""

import random
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from data_prep.pipeline import gigatoken_encoder
from data_prep.pipeline.gigatoken_encoder import LONG_CHARACTERS, PROBE, GigaEncoder
from data_prep.pipeline.sources import Document
from data_prep.tokenizer import FOLDER, RANKS_FILE, BpeTokenizer, ByteTokenizer, Ids, Tokenizer, make_tokenizer

pytest.importorskip("gigatoken")


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path) -> Tokenizer:
    return make_tokenizer(str(shared_data / "gpt2.tiktoken"), "")


@pytest.fixture
def encoder(tokenizer: Tokenizer, tmp_path: Path) -> GigaEncoder:
    tokenizer.save(tmp_path)
    return GigaEncoder(tokenizer, tmp_path / FOLDER / RANKS_FILE)


def documents(texts: list[str]) -> list[Document]:
    return [Document.of(position, text) for position, text in enumerate(texts)]


def assert_same(encoder: GigaEncoder, tokenizer: Tokenizer, texts: list[str]) -> None:
    for text, ids in zip(texts, encoder.encode(documents(texts)), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text), err_msg=repr(text[:80]))


def test_real_text_and_noise(shared_data: Path, encoder: GigaEncoder, tokenizer: Tokenizer) -> None:
    texts = [*PROBE, "=" * 300_000, "lone \ud800 surrogate \udcff", " " * 200_000]
    for name in ("fineweb_edu_sample.txt", "tinystories_2mb.txt", "wikitext2_valid.txt"):
        texts += [text for text in (shared_data / name).read_text(encoding="utf-8").split("\n\n") if text]
    rng = random.Random(0)
    pieces = ["<|endoftext|>", "\r\n", " ", "\u00e9", "\U0001f600", "a", "'ll", "\ud800", "7", "\u2028", "\0", "==="]
    texts += ["".join(rng.choices(pieces, k=rng.randrange(1, 40))) for _ in range(500)]
    encoder.begin_unit()
    assert_same(encoder, tokenizer, texts)
    assert_same(encoder, tokenizer, [])


@pytest.mark.parametrize("character", [*" \n\u3000a7=\u0301\u4e2d\u0639", "\U0001f600"], ids=ascii)
def test_the_longest_runs_that_it_encodes_and_longer_ones(
    encoder: GigaEncoder, tokenizer: Tokenizer, character: str
) -> None:
    longest = "x" + character * (LONG_CHARACTERS - 2) + "y"
    assert len(longest) == LONG_CHARACTERS
    assert_same(encoder, tokenizer, [longest, "fine", longest + character * 1_000_000 + "z"])


def test_a_new_instance_gives_the_same_ids(
    encoder: GigaEncoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    instances = [encoder._fast_tokenizer]
    monkeypatch.setattr(gigatoken_encoder, "UNITS_PER_INSTANCE", 2)
    for _ in range(6):
        encoder.begin_unit()
        instances.append(encoder._fast_tokenizer)
        assert_same(encoder, tokenizer, ["hello world"])
    assert len({id(instance) for instance in instances}) == 4


class Other(BpeTokenizer):
    """The same ranks, with other ids for one word."""

    def encode(self, text: str) -> Ids:
        ids = super().encode(text)
        return ids[::-1] if "odd" in text else ids


def test_other_ids_and_other_tokenizers_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert isinstance(tokenizer, BpeTokenizer)
    other = Other(tokenizer.ranks, name="other")
    other.save(tmp_path)
    encoder = GigaEncoder(other, tmp_path / FOLDER / RANKS_FILE)
    encoder.begin_unit()
    with pytest.raises(InputError, match="--backend gigatoken: its ids for 'an odd text' are not tiktoken's"):
        list(encoder.encode(documents(["an odd text"])))
    with pytest.raises(InputError, match="use --backend tiktoken"):
        GigaEncoder(ByteTokenizer(), tmp_path / "none")
