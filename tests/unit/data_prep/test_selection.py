"""The choice of documents against a few lines of plain Python, for any partition of the hashes and any parts."""

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from data_prep.pipeline import pack, selection
from data_prep.pipeline.encode import Part, Tally, write_part
from data_prep.pipeline.pack import documents_in_order
from data_prep.pipeline.selection import Order, Rules, mix_keys, select

ROUNDS = 12


def make_documents(rng: random.Random, count: int) -> list[tuple[bytes, list[int]]]:
    """(hash, ids), many of them several times; ids begin with 0, which nothing else in them is."""
    distinct = [(n, [0, *(1 + (n * 7 + k) % 999 for k in range(rng.randrange(30)))]) for n in range(count)]
    chosen = rng.choices(distinct, k=count)
    return [(hashlib.sha256(str(n).encode()).digest()[:16], ids) for n, ids in chosen]


def make_parts(folder: Path, documents: list[tuple[bytes, list[int]]], rng: random.Random) -> list[Part]:
    """Parts of any size, empty ones too."""
    folder.mkdir()
    cuts = sorted(rng.choices(range(len(documents) + 1), k=5))
    bounds = list(zip([0, *cuts], [*cuts, len(documents)], strict=True))
    return [
        write_part(
            folder / str(number),
            {},
            [(np.array(ids, dtype=np.uint16), [len(ids)], [text_hash]) for text_hash, ids in documents[begin:end]],
            Tally(),
        )
        for number, (begin, end) in enumerate(bounds)
    ]


def stream(order: Order, parts: list[Part]) -> tuple[list[int], list[int]]:
    """(all ids, places at which documents begin) of the order."""
    ids: list[int] = []
    starts: list[int] = []
    for tokens, places in documents_in_order(order, parts):
        starts += [len(ids) + int(place) for place in places]
        ids += tokens.tolist()
    return ids, starts


def oracle(documents: list[tuple[bytes, list[int]]], rules: Rules) -> tuple[list[list[int]], list[list[int]]]:
    """(train, val) as lists of documents."""
    kept: list[tuple[bytes, list[int]]] = []
    for text_hash, ids in documents:
        if rules.drop_duplicates and text_hash in {other for other, _ in kept}:
            continue
        if rules.max_tokens is not None and sum(len(i) for _, i in kept) + len(ids) > rules.max_tokens:
            break
        kept.append((text_hash, ids))
    val: set[bytes] = set()
    for text_hash in sorted({text_hash for text_hash, _ in kept}):
        if sum(len(ids) for other, ids in kept if other in val) < (rules.val_tokens or 0):
            val.add(text_hash)
    if rules.shuffle_seed is not None:
        keys = np.array([int.from_bytes(text_hash[:8], "big") for text_hash, _ in kept], dtype=np.uint64)
        by_key = mix_keys(keys, rules.shuffle_seed).tolist()
        kept = [kept[index] for index in sorted(range(len(kept)), key=by_key.__getitem__)]
    train = [ids for text_hash, ids in kept if text_hash not in val]
    return train, [ids for text_hash, ids in kept if text_hash in val]


def joined(documents: list[list[int]]) -> list[int]:
    return [index for ids in documents for index in ids]


@pytest.mark.parametrize("partition", [5, 1_000])
@pytest.mark.parametrize("shuffle_seed", [None, 3])
@pytest.mark.parametrize("drop_duplicates", [True, False])
def test_split_by_hash_is_what_plain_python_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition: int, shuffle_seed: int | None, drop_duplicates: bool
) -> None:
    monkeypatch.setattr(selection, "PARTITION_DOCUMENTS", partition)
    monkeypatch.setattr(selection, "BLOCK_DOCUMENTS", 7)
    for number in range(ROUNDS):
        rng = random.Random(f"{partition}{shuffle_seed}{drop_duplicates}{number}")
        monkeypatch.setattr(pack, "BLOCK_TOKENS", rng.choice([1, 50, 10_000]))
        documents = make_documents(rng, 60)
        folder = tmp_path / str(number)
        parts = make_parts(folder, documents, rng)
        rules = Rules(drop_duplicates, rng.choice([None, 300, 500]), "hash", rng.choice([1, 40, 150]), shuffle_seed)
        chosen = select(parts, rules, folder)
        train, val = oracle(documents, rules)
        for order, expected in ((chosen.train, train), (chosen.val, val)):
            ids, starts = stream(order, parts)
            assert ids == joined(expected)
            assert starts == [place for place, index in enumerate(ids) if index == 0]
            assert (order.documents, order.tokens) == (len(expected), len(ids))
        looked_at = documents[: len(documents) - chosen.documents_beyond]
        assert chosen.duplicates == (len(looked_at) - len(set(hashes_of(looked_at))) if drop_duplicates else 0)
        total = chosen.train.documents + chosen.val.documents + chosen.duplicates + chosen.documents_beyond
        assert total == len(documents)


def hashes_of(documents: list[tuple[bytes, list[int]]]) -> list[bytes]:
    return [text_hash for text_hash, _ in documents]


def test_the_first_shard_is_cut_at_its_very_token(tmp_path: Path) -> None:
    rng = random.Random(1)
    documents = make_documents(rng, 40)
    parts = make_parts(tmp_path / "parts", documents, rng)
    whole = joined([ids for _, ids in documents])
    ends = set(np.cumsum([len(ids) for _, ids in documents]).tolist())
    for count in sorted({*range(1, len(whole), 11), *ends, *(end + 1 for end in ends)} - {len(whole), len(whole) + 1}):
        rules = Rules(False, None, "first-shard", count, None)
        chosen = select(parts, rules, tmp_path)
        val, val_starts = stream(chosen.val, parts)
        train, train_starts = stream(chosen.train, parts)
        assert (val, train) == (whole[:count], whole[count:])
        assert (chosen.train.skip > 0) == (count not in ends)
        assert val_starts == [place for place, index in enumerate(val) if index == 0]
        assert train_starts == [place for place, index in enumerate(train) if index == 0]


def test_the_shuffle_depends_on_texts_and_seed_alone(tmp_path: Path) -> None:
    rng = random.Random(2)
    documents = list({text_hash: (text_hash, ids) for text_hash, ids in make_documents(rng, 300)}.values())
    streams = []
    for number, seed in enumerate((0, 0, 1)):
        rng.shuffle(documents)
        parts = make_parts(tmp_path / str(number), documents, rng)
        chosen = select(parts, Rules(True, None, "hash", 100, seed), tmp_path)
        streams.append((stream(chosen.train, parts)[0], stream(chosen.val, parts)[0]))
    assert streams[0] == streams[1]
    assert streams[0] != streams[2]
    assert sorted(streams[0][0]) == sorted(streams[2][0])


def test_mixing_is_a_permutation_that_scatters_neighbours() -> None:
    keys = np.arange(100_000, dtype=np.uint64)
    found = mix_keys(keys, 5)
    assert len(np.unique(found)) == len(keys)
    assert abs(float(found.mean()) / 2**63 - 1) < 0.01
    rises = (found[1:] > found[:-1]).mean()
    assert 0.49 < rises < 0.51
    assert not np.array_equal(np.argsort(found), np.argsort(mix_keys(keys, 6)))


@pytest.mark.parametrize(("split", "count", "flag"), [("hash", 10_000, "--val-tokens"), ("first-shard", 10_000, "")])
def test_a_split_that_would_be_empty_is_refused(tmp_path: Path, split: str, count: int, flag: str) -> None:
    rng = random.Random(3)
    parts = make_parts(tmp_path / "parts", make_documents(rng, 20), rng)
    with pytest.raises(InputError, match=flag or "--shard-tokens"):
        select(parts, Rules(True, None, split, count, 0), tmp_path)  # type: ignore[arg-type]
