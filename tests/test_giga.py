"""gigatoken's ids are tiktoken's, or it is refused."""

import random
from pathlib import Path

import numpy as np
import pytest

from data_prep import giga
from data_prep.codec import FOLDER, RANKS_FILE, BpeCodec, ByteCodec, Codec, Ids, make_codec
from data_prep.errors import InputError
from data_prep.giga import PROBE, GigaEncoder
from data_prep.sources import Document

pytest.importorskip("gigatoken")


@pytest.fixture(scope="module")
def codec(shared_data: Path) -> Codec:
    return make_codec(str(shared_data / "gpt2.tiktoken"), "")


@pytest.fixture
def encoder(codec: Codec, tmp_path: Path) -> GigaEncoder:
    codec.save(tmp_path)
    return GigaEncoder(codec, tmp_path / FOLDER / RANKS_FILE)


def documents(texts: list[str]) -> list[Document]:
    return [Document.of(place, text) for place, text in enumerate(texts)]


def assert_same(encoder: GigaEncoder, codec: Codec, texts: list[str]) -> None:
    for text, ids in zip(texts, encoder.encode(documents(texts)), strict=True):
        assert not isinstance(ids, InputError)
        np.testing.assert_array_equal(ids, codec.encode(text), err_msg=repr(text[:80]))


@pytest.mark.parametrize("name", ["fineweb_edu_sample.txt", "tinystories_2mb.txt", "wikitext2_valid.txt"])
def test_real_text(shared_data: Path, encoder: GigaEncoder, codec: Codec, name: str) -> None:
    text = (shared_data / name).read_text(encoding="utf-8")
    encoder.begin_unit()
    assert_same(encoder, codec, [part for part in text.split("\n\n") if part])


def test_what_makes_trouble_is_the_same(encoder: GigaEncoder, codec: Codec) -> None:
    rng = random.Random(0)
    pieces = ["<|endoftext|>", "\r\n", " ", "\u00e9", "\U0001f600", "a", "'ll", "\ud800", "7", "\u2028", "\0", "==="]
    noise = ["".join(rng.choices(pieces, k=rng.randrange(1, 40))) for _ in range(500)]
    texts = [*PROBE, "=" * 300_000, "lone \ud800 surrogate \udcff", " " * 200_000, *noise]
    encoder.begin_unit()
    assert_same(encoder, codec, texts)
    assert_same(encoder, codec, [])


def test_both_give_up_on_the_same_text(encoder: GigaEncoder) -> None:
    found = list(encoder.encode(documents(["a" + " " * 1_000_000 + "b", "fine"])))
    assert isinstance(found[0], InputError)
    assert not isinstance(found[1], InputError)


def test_a_new_instance_takes_over_and_gives_the_same(
    encoder: GigaEncoder, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    instances = {id(encoder._tokenizer): encoder._tokenizer}
    monkeypatch.setattr(giga, "UNITS_PER_INSTANCE", 2)
    for _ in range(6):
        encoder.begin_unit()
        instances[id(encoder._tokenizer)] = encoder._tokenizer
        assert_same(encoder, codec, ["hello world"])
    assert len(instances) == 4


class Other(BpeCodec):
    """The same ranks with ids of its own for one word."""

    def encode(self, text: str) -> Ids:
        ids = super().encode(text)
        return ids[::-1] if "odd" in text else ids


def test_ids_that_differ_are_refused(shared_data: Path, tmp_path: Path) -> None:
    known = make_codec(str(shared_data / "gpt2.tiktoken"), "")
    assert isinstance(known, BpeCodec)
    other = Other(known._ranks, name="other")
    other.save(tmp_path)
    encoder = GigaEncoder(other, tmp_path / FOLDER / RANKS_FILE)
    encoder.begin_unit()
    with pytest.raises(InputError, match="--backend gigatoken: its ids for 'an odd text' are not tiktoken's"):
        list(encoder.encode(documents(["an odd text"])))


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use --backend tiktoken"):
        GigaEncoder(ByteCodec(), tmp_path / "none")
