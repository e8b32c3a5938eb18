"""Selection against plain Python, for any partition of the hashes and any division into parts."""

import hashlib
import random
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from data_prep.pipeline import pack, selection
from data_prep.pipeline.encode import Part, Tally, write_part
from data_prep.pipeline.pack import documents_in_order
from data_prep.pipeline.selection import Order, Rules, mix_keys, select

Documents = list[tuple[bytes, list[int]]]  # (text hash, ids)


def make_documents(rng: random.Random, count: int) -> Documents:
    """Return documents with many copies. Ids begin with 0, which occurs nowhere else."""
    distinct = [(n, [0, *(1 + (n * 7 + k) % 999 for k in range(rng.randrange(30)))]) for n in range(count)]
    return [(hashlib.sha256(str(n).encode()).digest()[:16], ids) for n, ids in rng.choices(distinct, k=count)]


def make_parts(folder: Path, documents: Documents, rng: random.Random) -> list[Part]:
    """Write the documents as parts of random sizes, some of them empty."""
    folder.mkdir()
    cuts = sorted(rng.choices(range(len(documents) + 1), k=5))
    parts = []
    for number, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(documents)], strict=True)):
        batches = [(np.array(ids, np.uint16), [len(ids)], [text_hash]) for text_hash, ids in documents[begin:end]]
        parts.append(write_part(folder / str(number), {}, batches, Tally()))
    return parts


def stream(order: Order, parts: list[Part]) -> list[int]:
    """Return all ids of the order, having checked where its documents begin."""
    ids: list[int] = []
    starts: list[int] = []
    for tokens, offsets in documents_in_order(order, parts):
        starts += [len(ids) + int(offset) for offset in offsets]
        ids += tokens.tolist()
    assert starts == [offset for offset, index in enumerate(ids) if index == 0]
    assert len(ids) == order.tokens
    return ids


def oracle(documents: Documents, rules: Rules) -> tuple[list[list[int]], list[list[int]]]:
    """Return (train, val) as lists of documents, by plain Python."""
    kept: Documents = []
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
    return [ids for text_hash, ids in kept if text_hash not in val], [ids for h, ids in kept if h in val]


@pytest.mark.parametrize("partition", [5, 1_000])
@pytest.mark.parametrize("shuffle_seed", [None, 3])
@pytest.mark.parametrize("drop_duplicates", [True, False])
def test_split_by_hash_equals_plain_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition: int, shuffle_seed: int | None, drop_duplicates: bool
) -> None:
    monkeypatch.setattr(selection, "PARTITION_DOCUMENTS", partition)
    monkeypatch.setattr(selection, "BLOCK_DOCUMENTS", 7)
    for number in range(8):
        rng = random.Random(f"{partition}{shuffle_seed}{drop_duplicates}{number}")
        monkeypatch.setattr(pack, "BLOCK_TOKENS", rng.choice([1, 50, 10_000]))
        documents = make_documents(rng, 60)
        parts = make_parts(tmp_path / str(number), documents, rng)
        rules = Rules(drop_duplicates, rng.choice([None, 300, 500]), "hash", rng.choice([1, 40, 150]), shuffle_seed)
        selected = select(parts, rules, tmp_path)
        for order, expected in zip((selected.train, selected.val), oracle(documents, rules), strict=True):
            assert stream(order, parts) == list(chain(*expected))
            assert order.documents == len(expected)
        read = [text_hash for text_hash, _ in documents[: len(documents) - selected.documents_beyond]]
        assert selected.duplicates == (len(read) - len(set(read)) if drop_duplicates else 0)
        assert selected.train.documents + selected.val.documents + selected.duplicates == len(read)


def test_the_first_shard_is_cut_at_exactly_its_token(tmp_path: Path) -> None:
    rng = random.Random(1)
    documents = make_documents(rng, 40)
    parts = make_parts(tmp_path / "parts", documents, rng)
    whole = list(chain(*(ids for _, ids in documents)))
    ends = set(np.cumsum([len(ids) for _, ids in documents]).tolist())
    for count in sorted({*range(1, len(whole), 11), *ends, *(end + 1 for end in ends)} - {len(whole), len(whole) + 1}):
        selected = select(parts, Rules(False, None, "first-shard", count, None), tmp_path)
        assert (stream(selected.val, parts), stream(selected.train, parts)) == (whole[:count], whole[count:])
        assert (selected.train.skip > 0) == (count not in ends)


def test_the_shuffle_depends_on_texts_and_seed_alone(tmp_path: Path) -> None:
    rng = random.Random(2)
    documents = list(dict(make_documents(rng, 300)).items())
    streams = []
    for number, seed in enumerate((0, 0, 1)):
        rng.shuffle(documents)
        parts = make_parts(tmp_path / str(number), documents, rng)
        selected = select(parts, Rules(True, None, "hash", 100, seed), tmp_path)
        streams.append((stream(selected.train, parts), stream(selected.val, parts)))
    assert streams[0] == streams[1] != streams[2]
    assert sorted(streams[0][0]) == sorted(streams[2][0])


def test_mix_keys_is_a_permutation_that_scatters_neighbours() -> None:
    keys = np.arange(100_000, dtype=np.uint64)
    mixed = mix_keys(keys, 5)
    assert len(np.unique(mixed)) == len(keys)
    assert abs(float(mixed.mean()) / 2**63 - 1) < 0.01
    assert 0.49 < (mixed[1:] > mixed[:-1]).mean() < 0.51
    assert not np.array_equal(np.argsort(mixed), np.argsort(mix_keys(keys, 6)))


@pytest.mark.parametrize(("split", "flag"), [("hash", "--val-tokens"), ("first-shard", "--shard-tokens")])
def test_an_empty_split_is_refused(tmp_path: Path, split: selection.Split, flag: str) -> None:
    rng = random.Random(3)
    parts = make_parts(tmp_path / "parts", make_documents(rng, 20), rng)
    with pytest.raises(InputError, match=flag):
        select(parts, Rules(True, None, split, 10_000, 0), tmp_path)
