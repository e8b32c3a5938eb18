"""The benchmark of data_prep/fineweb.py: the pages that it makes, and the numbers that it derives."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pq = pytest.importorskip("pyarrow.parquet")

from benchmarks import bench_data_prep, fineweb_like, usual_pattern
from benchmarks.bench_data_prep import Round, Seen
from common.errors import InputError


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences and lines of several forms, followed by blanks, indents and empty lines."""
    ends = [". ", "!  ", "?\n", "\n", "\n\n", ":\n    ", "\u2014and so on.\n"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    sentences = [f"Sentence {n} says {n * n}, e.g. this{ends[n % len(ends)]}" for n in range(300)]
    path.write_text("".join(sentences), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def options(text: Path, tmp_path_factory: pytest.TempPathFactory) -> fineweb_like.Options:
    out = tmp_path_factory.mktemp("made") / "pages"
    return fineweb_like.Options(out, megabytes=5, files=3, rows_per_group=100, text=(text,), seed=7)


@pytest.fixture(scope="module")
def made(options: fineweb_like.Options) -> fineweb_like.Made:
    return fineweb_like.make(options)


def texts_in(folder: Path) -> list[str | None]:
    return [text for path in sorted(folder.iterdir()) for text in pq.read_table(path)["text"].to_pylist()]


def test_files_have_the_hubs_names_columns_and_row_groups(
    options: fineweb_like.Options, made: fineweb_like.Made
) -> None:
    paths = sorted(options.out.iterdir())
    assert [path.name for path in paths] == [f"00{number}_00000.parquet" for number in range(3)]
    rows = groups = 0
    for path in paths:
        opened = pq.ParquetFile(path)
        schema, metadata = opened.schema_arrow, opened.metadata
        assert {name: str(kind) for name, kind in zip(schema.names, schema.types, strict=True)} == {
            **dict.fromkeys(("text", "id", "dump", "url", "file_path", "language"), "string"),
            **dict.fromkeys(("language_score", "score"), "double"),
            **dict.fromkeys(("token_count", "int_score"), "int64"),
        }
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        assert len(sizes) > 2 and set(sizes[:-1]) == {100} and sizes[-1] <= 100
        assert metadata.row_group(0).column(0).compression == "SNAPPY"
        rows, groups = rows + metadata.num_rows, groups + len(sizes)
        columns = opened.read().to_pydict()
        assert len(set(columns["id"])) == len(columns["id"])
        assert None not in [value for name, values in columns.items() if name != "text" for value in values]
    assert (rows, groups, made.files) == (made.rows, made.row_groups, 3)


def test_pages_have_the_planted_copies_and_gaps_and_no_others(
    options: fineweb_like.Options, made: fineweb_like.Made
) -> None:
    texts = texts_in(options.out)
    with_text = [text for text in texts if text]
    counts = Counter(with_text)
    assert texts.count(None) == made.null_texts == max(1, round(len(with_text) / 2000))
    assert texts.count("") == made.empty_texts == made.null_texts
    assert sum(counts.values()) - len(counts) == made.duplicates == round(0.0418 * len(with_text))
    sizes = [len(text.encode("utf-8")) for text in with_text]
    assert (sum(sizes), max(sizes)) == (made.text_bytes, made.longest_bytes)
    assert 0.9 * 5e6 < sum(sizes) < 1.2 * 5e6
    assert 0.8 * 4860 < sum(sizes) / len(sizes) < 1.2 * 4860
    files = [set(filter(None, pq.read_table(path)["text"].to_pylist())) for path in sorted(options.out.iterdir())]
    assert files[0] & files[1] and files[0] & files[2] and files[1] & files[2], "no copies across files"


@pytest.mark.usefixtures("made")
def test_documents_are_sentences_of_the_text(options: fineweb_like.Options, text: Path) -> None:
    original = text.read_text(encoding="utf-8")
    sentences = fineweb_like.read_sentences((text,))
    assert "".join(sentences) == original.rstrip() + "\n"
    assert all(sentence in original or sentence == sentences[-1] for sentence in sentences)
    stripped = {sentence.rstrip() for sentence in sentences}
    for document in filter(None, texts_in(options.out)):
        *whole, last = fineweb_like.sentences_of(document)
        assert set(whole) <= set(sentences) and last in stripped
        assert len(whole) + 1 >= fineweb_like.MIN_SENTENCES


def test_the_seed_decides_the_pages(options: fineweb_like.Options, tmp_path: Path) -> None:
    small = dataclasses.replace(options, megabytes=0.5)
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        fineweb_like.make(dataclasses.replace(small, out=tmp_path / name, seed=seed))
    one, again = ([path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("one", "again"))
    assert one == again
    assert not {*filter(None, texts_in(tmp_path / "one"))} & {*filter(None, texts_in(tmp_path / "other"))}


def test_wrong_options_are_refused(options: fineweb_like.Options, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("One. Two. Three.", encoding="utf-8")
    pages: list[tuple[dict[str, Any], str]] = [
        ({"megabytes": 0.0}, "--megabytes 0.0 must be above 0"),
        ({"files": 0}, "--files 0 must be"),
        ({"files": 10**6}, "--files 1000000: 5 MB are only"),
        ({"text": (few,)}, "3 sentences are too few"),
        ({"out": tmp_path}, "not empty"),
    ]
    for change, message in pages:
        with pytest.raises(InputError, match=message):
            fineweb_like.make(dataclasses.replace(options, **({"out": tmp_path / "new"} | change)))
    measuring: list[tuple[dict[str, Any], str]] = [
        ({"workers": 0}, "--workers 0 must be above 0"),
        ({"rounds": -1}, "--rounds -1 must be above 0"),
        ({"slice_megabytes": 0.0}, "--slice-megabytes 0.0 must be"),
        ({"backends": ()}, "--backends: give one or more"),
    ]
    for change, message in measuring:
        with pytest.raises(InputError, match=message):
            bench_data_prep.check(bench_data_prep.Options(**change))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no parquet file in it"):
        bench_data_prep.measure(bench_data_prep.Options(), tmp_path / "empty", tmp_path)


def test_the_usual_pattern_leaves_out_documents_without_text() -> None:
    assert usual_pattern.tokens_of({"text": "Hello world"}).tolist() == [50256, 15496, 995]
    assert not len(usual_pattern.tokens_of({"text": None})) and not len(usual_pattern.tokens_of({"text": ""}))


def rounds_of(*seconds: tuple[float, float, float]) -> list[Round]:
    """Return rounds from the seconds of (usual, tiktoken, gigatoken).

    Each command starts up in 1 s, and one bare encoder does 10 MB/s.
    """
    cases = ("usual", "tiktoken", "gigatoken")
    return [
        Round(
            bare=[9.0, 10.0, 12.0],
            bare_gigatoken=[100.0],
            together=18.0,
            commands={
                case: Seen(seconds, 500, first_part=0.5, last_part=1.5, packed=2.0)
                for case, seconds in zip(cases, times, strict=True)
            },
            startups={case: Seen(1.0) for case in cases},
        )
        for times in seconds
    ]


def test_ratios_are_taken_within_rounds_and_without_start_up() -> None:
    rounds = rounds_of((11.0, 6.0, 2.0), (21.0, 6.0, 3.0), (11.0, 11.0, 6.0))
    report = bench_data_prep.summary(rounds, 100_000_000, bench_data_prep.Options(workers=2))
    assert report["commands"]["usual"]["megabytes_per_second"] == {"median": 10.0, "low": 5.0, "high": 10.0}
    assert report["commands"]["tiktoken"]["pack_seconds"]["median"] == 0.5
    assert report["commands"]["tiktoken"]["verify_seconds"]["median"] == 4.0
    assert report["together_over_w_bare"]["median"] == 0.9
    limits = {(limit["ours"], limit["over"]): limit for limit in report["limits"]}
    assert limits["tiktoken", "W x bare"] == {
        **{"ours": "tiktoken", "over": "W x bare", "needed": 0.85},
        **{"median": 1.0, "low": 0.5, "high": 1.0, "holds": True, "rounds": [1.0, 1.0, 0.5]},
    }
    assert (limits["tiktoken", "usual"]["median"], limits["tiktoken", "usual"]["holds"]) == (2.0, True)
    assert (limits["gigatoken", "usual"]["median"], limits["gigatoken", "usual"]["low"]) == (10.0, 2.0)
    table = "\n".join(bench_data_prep.table(report))
    assert table.count("holds") == 3 and "2 bare together: 0.90 x 2 x bare" in table


def test_commands_that_make_different_tokens_are_not_compared() -> None:
    same = {"usual": Seen(tokens=5), "tiktoken": Seen(tokens=5, fingerprint="a")}
    bench_data_prep.check_results(same)
    for other in (Seen(tokens=6, fingerprint="a"), Seen(tokens=5, fingerprint="b")):
        with pytest.raises(InputError, match="do not make the same"):
            bench_data_prep.check_results(same | {"gigatoken": other})
