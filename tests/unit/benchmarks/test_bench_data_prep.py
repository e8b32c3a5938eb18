"""The benchmark of data_prep/fineweb.py: its data set holds what it says, and its numbers add up."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pq = pytest.importorskip("pyarrow.parquet")

from benchmarks import bench_data_prep, fineweb_like, usual_pattern
from benchmarks.bench_data_prep import Round, Seen
from common.errors import InputError
from tests.conftest import ROOT

SENTENCES = 300


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences and lines of several forms, with blanks, indents and empty lines after them."""
    ends = [". ", "!  ", "?\n", "\n", "\n\n", ":\n    ", "\u2014and so on.\n"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    sentences = [f"Sentence {n} says {n * n}, e.g. this{ends[n % len(ends)]}" for n in range(SENTENCES)]
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


def test_files_are_laid_out_as_the_hubs(options: fineweb_like.Options, made: fineweb_like.Made) -> None:
    paths = sorted(options.out.iterdir())
    assert [path.name for path in paths] == ["000_00000.parquet", "001_00000.parquet", "002_00000.parquet"]
    rows = groups = 0
    for path in paths:
        opened = pq.ParquetFile(path)
        kinds = {
            name: str(kind) for name, kind in zip(opened.schema_arrow.names, opened.schema_arrow.types, strict=True)
        }
        assert kinds == {
            **dict.fromkeys(("text", "id", "dump", "url", "file_path", "language"), "string"),
            **dict.fromkeys(("language_score", "score"), "double"),
            **dict.fromkeys(("token_count", "int_score"), "int64"),
        }
        metadata = opened.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        assert len(sizes) > 2 and set(sizes[:-1]) == {100} and sizes[-1] <= 100
        assert metadata.row_group(0).column(0).compression == "SNAPPY"
        rows, groups = rows + metadata.num_rows, groups + len(sizes)
        columns = opened.read().to_pydict()
        assert len(set(columns["id"])) == len(columns["id"])
        assert None not in [value for name, values in columns.items() if name != "text" for value in values]
    assert (rows, groups, made.files) == (made.rows, made.row_groups, 3)


def test_what_is_planted_is_there_and_nothing_else(options: fineweb_like.Options, made: fineweb_like.Made) -> None:
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


def test_documents_are_sentences_of_the_text(
    options: fineweb_like.Options, made: fineweb_like.Made, text: Path
) -> None:
    original = text.read_text(encoding="utf-8")
    sentences = fineweb_like.read_sentences((text,))
    assert "".join(sentences) == original.rstrip() + "\n"
    assert all(sentence in original or sentence == sentences[-1] for sentence in sentences)
    ended = {sentence.rstrip() for sentence in sentences}
    for document in filter(None, texts_in(options.out)):
        *whole, last = fineweb_like.sentences_of(document)
        assert set(whole) <= set(sentences) and last in ended
        assert len(whole) + 1 >= fineweb_like.MIN_SENTENCES


def test_the_seed_decides(options: fineweb_like.Options, made: fineweb_like.Made, tmp_path: Path) -> None:
    small = dataclasses.replace(options, megabytes=0.5)
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        fineweb_like.make(dataclasses.replace(small, out=tmp_path / name, seed=seed))
    assert [path.read_bytes() for path in sorted((tmp_path / "one").iterdir())] == [
        path.read_bytes() for path in sorted((tmp_path / "again").iterdir())
    ]
    assert not {*filter(None, texts_in(tmp_path / "one"))} & {*filter(None, texts_in(tmp_path / "other"))}


def test_what_cannot_be_made_is_refused(options: fineweb_like.Options, text: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("One. Two. Three.", encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for change, message in (
        ({"megabytes": 0.0}, "--megabytes 0.0 must be above 0"),
        ({"files": 0}, "--files 0 must be"),
        ({"files": 10**6}, "--files 1000000: 5 MB are only"),
        ({"text": (few,)}, "3 sentences are too few"),
        ({"out": tmp_path / "full"}, "not empty"),
    ):
        changed: dict[str, Any] = {"out": tmp_path / "new"} | change
        with pytest.raises(InputError, match=message):
            fineweb_like.make(dataclasses.replace(options, **changed))


def test_the_usual_pattern_leaves_out_what_has_no_text() -> None:
    assert usual_pattern.tokens_of({"text": "Hello world"}).tolist() == [50256, 15496, 995]
    assert not len(usual_pattern.tokens_of({"text": None})) and not len(usual_pattern.tokens_of({"text": ""}))


@pytest.mark.long(reason="a script of nobody's training, end to end; its parts are tested above and below")
def test_the_script_at_a_tiny_size(text: Path) -> None:
    sizes = ["--megabytes", "2", "--files", "2", "--rounds", "1", "--workers", "1", "--slice-megabytes", "0.2"]
    command = [sys.executable, "benchmarks/bench_data_prep.py", *sizes, "--text", str(text), "--backends", "tiktoken"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    told = json.loads(lines[-1])
    assert (told["workers"], told["rounds"], told["files"]) == (1, 1, 2)
    assert 1.8e6 < told["text_bytes"] < 2.5e6 and told["tokens"] > 100_000
    assert told["bare_gigatoken_megabytes_per_second"] is None
    rates = {}
    for name, case in told["commands"].items():
        assert case["seconds"]["median"] > 0 and case["startup_seconds"]["median"] > 0
        assert 0 < case["cpu_seconds"]["median"] < 60
        assert case["parent_peak_mb"] > 50
        rates[name] = case["megabytes_per_second"]["median"]
    assert set(rates) == {"usual", "tiktoken"} and told["commands"]["usual"]["worker_peak_mb"] > 20
    stages = [told["commands"]["tiktoken"][f"{stage}_seconds"] for stage in ("before_first_part", "encode", "pack")]
    seconds = told["commands"]["tiktoken"]["seconds"]["median"]
    assert all(stage is not None for stage in stages) and sum(stage["median"] for stage in stages) < seconds + 0.1
    over = {limit["over"]: limit for limit in told["limits"]}
    assert over["W x bare"]["needed"] == 0.85 and over["usual"]["needed"] == 2.0
    assert over["usual"]["median"] == pytest.approx(rates["tiktoken"] / rates["usual"], rel=0.05)
    for limit in over.values():
        assert limit["holds"] == (limit["median"] >= limit["needed"])
        assert sum("needed" in line and limit["over"] in line for line in lines[:-1]) == 1


def rounds_of(*seconds: tuple[float, float, float]) -> list[Round]:
    """(usual, tiktoken, gigatoken) in every round; each starts up in 1 s, and one bare encoder does 10 MB/s."""
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
    options = bench_data_prep.Options(workers=2)
    told = bench_data_prep.summary(rounds, 100_000_000, options)
    assert told["commands"]["usual"]["megabytes_per_second"] == {"median": 10.0, "low": 5.0, "high": 10.0}
    assert told["commands"]["tiktoken"]["pack_seconds"]["median"] == 0.5
    assert told["commands"]["tiktoken"]["verify_seconds"]["median"] == 4.0
    assert told["together_over_w_bare"]["median"] == 0.9
    found = {(limit["ours"], limit["over"]): limit for limit in told["limits"]}
    assert found["tiktoken", "W x bare"] == {
        **{"ours": "tiktoken", "over": "W x bare", "needed": 0.85},
        **{"median": 1.0, "low": 0.5, "high": 1.0, "holds": True, "rounds": [1.0, 1.0, 0.5]},
    }
    assert (found["tiktoken", "usual"]["median"], found["tiktoken", "usual"]["holds"]) == (2.0, True)
    assert (found["gigatoken", "usual"]["median"], found["gigatoken", "usual"]["low"]) == (10.0, 2.0)
    table = "\n".join(bench_data_prep.table(told))
    assert table.count("holds") == 3 and "2 bare together: 0.90 x 2 x bare" in table


def test_cases_that_make_something_else_are_not_compared() -> None:
    same = {"usual": Seen(tokens=5), "tiktoken": Seen(tokens=5, fingerprint="a")}
    bench_data_prep.check_results(same)
    for other in (Seen(tokens=6, fingerprint="a"), Seen(tokens=5, fingerprint="b")):
        with pytest.raises(InputError, match="do not make the same"):
            bench_data_prep.check_results(same | {"gigatoken": other})


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc")
def test_memory_of_a_process_and_of_its_children() -> None:
    with subprocess.Popen([sys.executable, "-c", "b = b'x' * 60_000_000; input()"], stdin=subprocess.PIPE) as child:
        until = time.monotonic() + 20
        while bench_data_prep.peak_bytes(child.pid) < 60_000_000 and time.monotonic() < until:
            time.sleep(0.02)
        assert 60_000_000 <= bench_data_prep.peak_bytes(child.pid) < 200_000_000
        assert child.pid in bench_data_prep.children_of(os.getpid())
        child.communicate(b"\n")
    assert bench_data_prep.peak_bytes(child.pid) == 0
    assert bench_data_prep.children_of(child.pid) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": 0}, "--workers 0 must be above 0"),
        ({"rounds": -1}, "--rounds -1 must be above 0"),
        ({"slice_megabytes": 0.0}, "--slice-megabytes 0.0 must be"),
        ({"backends": ()}, "--backends: give one or more"),
    ],
)
def test_impossible_options_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench_data_prep.check(bench_data_prep.Options(**change))


def test_a_folder_without_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no parquet file in it"):
        bench_data_prep.measure(bench_data_prep.Options(), tmp_path, tmp_path)


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data_prep/fineweb\.py failed: .*no .parquet file there"):
        bench_data_prep.run_ours([tmp_path / "none.parquet"], 1, tmp_path / "out", "tiktoken")
