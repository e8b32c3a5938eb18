"""Cutting at separators against bytes.split, wherever blocks end, and its time and memory on long pieces."""

import random
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.pipeline import split_bytes
from data_prep.pipeline.split_bytes import find_cut, occurs, split_blocks

MOST = 10**9


def blocks_of(data: bytes, rng: random.Random) -> list[bytes]:
    """Return the data in blocks of random sizes."""
    cuts = sorted(rng.choices(range(len(data) + 1), k=rng.randrange(8)))
    return [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@pytest.mark.parametrize("separator", [b"\n", b"ab", b"aba", b"aa", b"<|end|>"])
def test_pieces_are_those_of_bytes_split(separator: bytes) -> None:
    rng = random.Random(separator)
    for _ in range(300):
        data = b"".join(rng.choices([separator, separator[:1], separator[-1:], b"x", b"ab"], k=rng.randrange(30)))
        blocks = blocks_of(data, rng)
        *expected, last = data.split(separator)
        expected += [last] * bool(last)
        pieces = list(split_blocks(blocks, separator, offset=7, most_bytes=MOST))
        assert [bytes(piece or b"") for _, piece in pieces] == expected
        for (offset, _), piece in zip(pieces, expected, strict=True):
            assert data[offset - 7 :].startswith(piece)
        assert occurs(blocks, separator) == (separator in data)
        limited = list(split_blocks(blocks, separator, offset=7, most_bytes=3))
        assert [offset for offset, _ in limited] == [offset for offset, _ in pieces]
        assert [piece is None for _, piece in limited] == [len(piece) > 3 for piece in expected]
        kept = [bytes(piece) for _, piece in limited if piece is not None]
        assert kept == [piece for piece in expected if len(piece) <= 3]


def repeated(block: bytes, count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield block


def test_a_long_piece_takes_linear_time_and_no_more_memory_than_allowed() -> None:
    block = b"hello wor\n" * 100_000
    started = time.process_time()
    [(_, piece)] = split_blocks(repeated(block, 64), b"ABSENT", offset=0, most_bytes=MOST)
    assert piece is not None and len(piece) == 64_000_000
    assert time.process_time() - started < 1.5  # a second and more per 40 MB, squared, when it was quadratic
    tracemalloc.start()
    pieces = split_blocks(repeated(block, 10**9), b"ABSENT", offset=0, most_bytes=5_000_000)
    assert next(pieces) == (0, None)  # at once, not at its end
    assert [*split_blocks(repeated(block, 64), b"ABSENT", offset=0, most_bytes=5_000_000)] == [(0, None)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000


@pytest.mark.parametrize("separator", [b"\n\n", b"aba", b"<>", b"\n"])
def test_a_cut_is_where_reading_from_the_start_cuts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: bytes
) -> None:
    monkeypatch.setattr(split_bytes, "WINDOW_BYTES", 5)
    rng = random.Random(separator)
    for _ in range(40):
        data = b"".join(rng.choices([separator, separator[:1], separator[-1:], b"x"], k=30))
        (tmp_path / "text").write_bytes(data)
        ends = [offset for offset, _ in split_blocks([data], separator, offset=0, most_bytes=MOST)][1:]
        with (tmp_path / "text").open("rb") as file:
            for position in range(1, len(data)):
                cut = find_cut(file, separator, position)
                assert cut is None or (cut in ends and cut > position)
        # A separator that stands alone always is a cut.
        (tmp_path / "text").write_bytes(b"x" * 11 + separator + b"y" * 20)
        with (tmp_path / "text").open("rb") as file:
            assert [find_cut(file, separator, position) for position in (1, 11, 12)] == [11 + len(separator)] * 2 + [
                None
            ]


def test_a_cut_that_is_far_away_or_nowhere_is_searched_in_linear_time(tmp_path: Path) -> None:
    """Line ends alone hold a separator at every byte, each overlapped by the one before."""
    (tmp_path / "ends").write_bytes(b"\n" * 8_000_000)
    (tmp_path / "far").write_bytes(b"hello wor\n" * 3_000_000 + b"<>end")
    started = time.process_time()
    with (tmp_path / "ends").open("rb") as file:
        assert find_cut(file, b"\n\n", 10) is None
    with (tmp_path / "far").open("rb") as file:
        assert find_cut(file, b"<>", 10) == 30_000_002
    assert time.process_time() - started < 1.5
