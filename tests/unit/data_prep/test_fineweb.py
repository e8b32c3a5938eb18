"""fineweb.py in one process: tiktoken's ids, build-nanogpt's stream, the same bytes whatever made them, every fault."""

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import tiktoken

from data_prep import fineweb, fineweb_plan
from data_prep.fineweb_plan import Options, local_files, plan_all_units
from data_prep.manifest import read_manifest
from data_prep.pipeline import encode, workers
from data_prep.pipeline.partial_dir import put_in_place, unfinished_directory
from data_prep.tokenizer import load_tokenizer
from data_prep.verify import faults_of
from tests.helpers.data_dirs import EOT_ID, contents, names, tokens
from tests.helpers.pages import COPIES, TROUBLE, Text, as_texts, make_pages, write_pages, write_ranks
from tests.helpers.runs import called

FILES = 4
Pages = tuple[Path, list[Text]]
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """A folder of files with several row groups each, and all pages in order."""
    folder = tmp_path_factory.mktemp("pages") / "input"
    files = [make_pages(60, number) for number in range(FILES)]
    for number, file in enumerate(files):
        write_pages(folder / f"{number:03d}_00000.parquet", file)
    whole = [page for file in files for page in file]
    assert all(whole.count(page) == FILES for page in TROUBLE)
    assert all(whole.count(page) == 2 * FILES for page in COPIES)
    return folder, whole


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fineweb_plan, "UNIT_BYTES", 10_000)


@pytest.fixture(scope="module")
def gpt2(shared_data: Path) -> str:
    """GPT-2's rank file, for tests that compare ids with tiktoken's."""
    return str(shared_data / "gpt2.tiktoken")


@pytest.fixture(scope="module")
def ranks(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_ranks(tmp_path_factory.mktemp("ranks") / "first.tiktoken", shared_data / "gpt2.tiktoken")


@pytest.fixture(scope="module")
def finished_by_gpt2(pages: Pages, gpt2: str) -> Path:
    out = pages[0].parent / "finished_by_gpt2"
    assert prepare(pages[0], out, gpt2).returncode == 0
    return out


@pytest.fixture(scope="module")
def finished(pages: Pages, ranks: str) -> Path:
    out = pages[0].parent / "finished"
    assert prepare(pages[0], out, ranks).returncode == 0
    return out


def prepare(folder: Path, out: Path, tokenizer: str, *more: str, **env: str) -> Done:
    """Run the command in this process, with one worker unless `more` says otherwise."""
    files = ["--source", "local", "--data-files", str(folder), "--tokenizer", tokenizer, "--out", str(out)]
    sizes = ["--shard-tokens", "5000", "--val-tokens", "2000", "--workers", "1"]
    return called(fineweb.main, *files, *sizes, *more, **env)


def refusal(done: Done) -> str:
    """Return the only line of an error that a refused command printed."""
    assert done.returncode == 2, done
    lines = [line for line in done.stderr.splitlines() if not line.startswith("fineweb: warning")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("fineweb: ")
    return lines[0]


def documents_of(data: Path, split: str) -> list[tuple[int, ...]]:
    """Return a split's documents, each the ids after its EOT."""
    ids = tokens(data, split)
    starts = [offset for offset, index in enumerate(ids) if index == EOT_ID]
    assert starts[0] == 0
    return [tuple(ids[begin + 1 : end]) for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True)]


def ids_of(pages: list[Text]) -> list[tuple[int, ...]]:
    """Return the documents that tiktoken makes of the pages, each once, in order."""
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    return list(dict.fromkeys(tuple(encode(text)) for text in as_texts(pages)))


def assert_sound(data: Path) -> None:
    assert faults_of(data, read_manifest(data), load_tokenizer(data)) == []


# The output


def test_every_page_is_there_once_in_one_split(finished_by_gpt2: Path, pages: Pages) -> None:
    train, val = documents_of(finished_by_gpt2, "train"), documents_of(finished_by_gpt2, "val")
    assert sorted(train + val) == sorted(ids_of(pages[1]))
    assert 2000 <= sum(len(ids) + 1 for ids in val) < 2400
    assert train != sorted(train)
    texts = as_texts(pages[1])
    counts = read_manifest(finished_by_gpt2).source["documents"]
    assert (counts["read"], counts["empty"], counts["repaired"]) == (len(pages[1]), 2 * FILES, FILES)
    assert counts["duplicates"] == len(texts) - len(set(texts))


def test_build_nanogpts_stream(pages: Pages, gpt2: str, tmp_path: Path) -> None:
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    stream = [index for text in as_texts(pages[1]) for index in (EOT_ID, *encode(text))]
    expected = [stream[begin : begin + 5000] for begin in range(0, len(stream), 5000)]
    options = ("--split-mode", "first-shard", "--dedup", "none", "--shuffle", "none")
    done = prepare(pages[0], tmp_path / "out", gpt2, *options)
    assert done.returncode == 0
    assert "--val-tokens has no effect with --split-mode first-shard" in done.stderr
    shards = [*(tmp_path / "out").glob("val_*.bin"), *sorted((tmp_path / "out").glob("train_*.bin"))]
    assert [np.fromfile(path, dtype="<u2", offset=1024).tolist() for path in shards] == expected
    assert_sound(tmp_path / "out")


def test_max_tokens_takes_the_first_pages(pages: Pages, gpt2: str, tmp_path: Path) -> None:
    options = ("--max-tokens", "4000", "--shuffle", "none", "--val-tokens", "300")
    assert prepare(pages[0], tmp_path / "out", gpt2, *options).returncode == 0
    distinct = ids_of(pages[1])
    train, val = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "val")
    count = len(train) + len(val)
    assert set(train + val) == set(distinct[:count])
    assert [ids for ids in distinct if ids in set(train)] == train
    num_tokens = sum(len(ids) + 1 for ids in distinct[:count])
    assert num_tokens <= 4000 < num_tokens + len(distinct[count]) + 1
    files = local_files((str(pages[0]),))
    assert len(plan_all_units(files, Options(max_tokens=4000))) < len(plan_all_units(files, Options()))


def test_max_tokens_warns_if_duplicates_leave_too_few(ranks: str, tmp_path: Path) -> None:
    write_pages(tmp_path / "in" / "0.parquet", ["the same page " * 50] * 400)
    write_pages(tmp_path / "in" / "1.parquet", make_pages(60, 1))
    done = prepare(tmp_path / "in", tmp_path / "out", ranks, "--max-tokens", "20000")
    assert done.returncode == 0, done.stderr
    assert "tokens in the pages that --max-tokens 20000 reads, without their duplicates; set it higher" in done.stderr


def test_a_tokenizer_without_eot(pages: Pages, tmp_path: Path) -> None:
    assert prepare(pages[0], tmp_path / "out", "byte", "--dedup", "none").returncode == 0
    assert_sound(tmp_path / "out")
    splits = read_manifest(tmp_path / "out").splits.values()
    assert sum(split.documents for split in splits) == len(as_texts(pages[1]))


# The same bytes


def test_gigatoken_and_units_of_any_size(
    finished_by_gpt2: Path, pages: Pages, gpt2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fineweb_plan, "UNIT_BYTES", 1)
    assert prepare(pages[0], tmp_path / "out", gpt2, "--backend", "gigatoken").returncode == 0
    assert contents(tmp_path / "out") == contents(finished_by_gpt2)


def test_files_may_lie_anywhere_and_be_named_one_by_one(
    finished: Path, pages: Pages, ranks: str, tmp_path: Path
) -> None:
    shutil.copytree(pages[0], tmp_path / "glob[1] b*")
    files = sorted(str(path) for path in (tmp_path / "glob[1] b*").iterdir())
    assert prepare(tmp_path / "glob[1] b*", tmp_path / "out", ranks).returncode == 0
    assert prepare(Path(), tmp_path / "out2", ranks, "--data-files", *files[::-1]).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "out2") == contents(finished)


def test_tasks_share_the_work_and_one_packs(finished: Path, pages: Pages, ranks: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for index in (2, 1, 0):
        line = refusal(prepare(pages[0], out, ranks, "--stage", "pack"))
        assert re.match(r"fineweb: [1-9]\d* of \d+ parts are missing or damaged; --stage tokenize makes them", line)
        array = {"ID": 10 + 2 * index, "COUNT": 3, "MIN": 10, "STEP": 2, "MAX": 14}
        env = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}
        done = prepare(pages[0], out, ranks, "--stage", "tokenize", **env)
        assert done.returncode == 0, done.stderr
        assert not out.exists()
    assert prepare(pages[0], out, ranks, "--stage", "pack").returncode == 0
    assert contents(out) == contents(finished)
    assert names(tmp_path) == ["out"]
    assert "already complete" in prepare(pages[0], out, ranks, "--stage", "tokenize").stdout


def test_parts_serve_all_options_that_they_do_not_depend_on(
    finished: Path, pages: Pages, ranks: str, tmp_path: Path
) -> None:
    """Options of selection and packing may change between the stages, also on one machine."""
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    assert prepare(pages[0], out, ranks, "--stage", "tokenize", "--seed", "5").returncode == 0
    options = ("--seed", "1", "--dedup", "none", "--val-tokens", "700")
    shutil.copytree(tmp_path / ".out.partial", tmp_path / ".again.partial")
    assert prepare(pages[0], out, ranks, "--stage", "pack", *options).returncode == 0
    assert prepare(pages[0], fresh, ranks, *options).returncode == 0
    assert contents(out) == contents(fresh) != contents(finished)
    again = prepare(pages[0], tmp_path / "again", ranks)
    assert again.returncode == 0 and "parts were there from an earlier run" in again.stderr
    assert contents(tmp_path / "again") == contents(finished)


def test_tasks_of_different_options_do_not_mix(pages: Pages, ranks: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    task = ("--stage", "tokenize", "--num-tasks", "2", "--task-index")
    assert prepare(pages[0], out, ranks, *task, "0").returncode == 0
    before = contents(tmp_path / ".out.partial")
    for flag, value in (("--backend", "gigatoken"), ("--max-tokens", "5000")):
        line = refusal(prepare(pages[0], out, ranks, *task, "1", flag, value))
        assert "other tasks make other parts there" in line and f"{flag} {value} (was " in line
        assert f"{flag} {value} (was " in refusal(prepare(pages[0], out, ranks, "--stage", "pack", flag, value))
    assert "--tokenizer byte (" in refusal(prepare(pages[0], out, "byte", *task, "1"))
    line = refusal(prepare(pages[0] / "000_00000.parquet", out, ranks, *task, "1"))
    assert "--data-files" in line
    assert contents(tmp_path / ".out.partial") == before


def test_who_may_work_in_one_directory_at_once(pages: Pages, ranks: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with unfinished_directory(out):
        for stage in ("all", "tokenize", "pack"):
            line = refusal(prepare(pages[0], out, ranks, "--stage", stage))
            assert "another process is making it right now" in line
    with unfinished_directory(out, shared=True):
        assert "right now" in refusal(prepare(pages[0], out, ranks, "--stage", "pack"))
        assert prepare(pages[0], out, ranks, "--stage", "tokenize").returncode == 0
    assert prepare(pages[0], out, ranks, "--stage", "pack").returncode == 0


class Killed(BaseException):
    """A kill at one call of a function."""


@pytest.mark.parametrize("num_calls", range(4))
@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_kill_while_the_directory_gets_its_name_loses_nothing(
    pages: Pages,
    finished: Path,
    ranks: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_calls: int,
    is_replaced: bool,
) -> None:
    """A kill comes before each rename and removal in turn; the old or the new directory is always whole."""
    out, old = tmp_path / "out", tmp_path / ".out.replaced" / "old"
    if is_replaced:
        shutil.copytree(finished, out)
        (out / "old").touch()
    calls = 0

    def killed(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > num_calls:
                raise Killed
            return function(*args, **options)

        return call

    def put_and_be_killed(partial: Path, out: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed(Path.rename))
            patch.setattr(shutil, "rmtree", killed(shutil.rmtree))
            put_in_place(partial, out)

    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "put_in_place", put_and_be_killed)
        try:
            prepare(pages[0], out, ranks, "--overwrite")
        except Killed:
            assert (out / "manifest.json").exists() or old.exists() == is_replaced
    is_new = out.exists() and not (out / "old").exists()
    done = prepare(pages[0], out, ranks, *([] if is_new else ["--overwrite"]))
    assert done.returncode == 0, done.stderr
    assert "already complete" in done.stdout or "parts were there from an earlier run" in done.stderr
    assert contents(out) == contents(finished)
    assert names(tmp_path) == ["out"]


# Faults


def test_a_page_of_long_runs_is_kept(gpt2: str, tmp_path: Path) -> None:
    pages = make_pages(30, 0)
    pages[7] = "a" + " " * 1_000_000 + "b"
    pages[8] = "=" * 300_000
    write_pages(tmp_path / "in" / "0.parquet", pages)
    for backend in ("tiktoken", "gigatoken"):
        done = prepare(tmp_path / "in", tmp_path / backend, gpt2, "--val-tokens", "200", "--backend", backend)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "tiktoken") == contents(tmp_path / "gigatoken")
    kept = documents_of(tmp_path / "tiktoken", "train") + documents_of(tmp_path / "tiktoken", "val")
    assert ids_of([pages[8]])[0] in kept
    # A run is one word, but for the blank that goes with the next word.
    encoding = tiktoken.get_encoding("gpt2")
    assert (*encoding.encode_ordinary("a" + " " * 999_999), *encoding.encode_ordinary(" b")) in kept


def test_bad_input_is_one_line_and_nothing_is_lost(ranks: str, tmp_path: Path) -> None:
    for number in range(2):
        write_pages(tmp_path / "in" / f"{number}.parquet", make_pages(60, number))
    path = tmp_path / "in" / "1.parquet"
    content = path.read_bytes()
    other_column = write_pages(tmp_path / "other.parquet", make_pages(60, 1), column="content").read_bytes()
    offset = content.find(b"1.", len(content) // 3)
    for damaged, complaint in (
        (content[: len(content) // 2], "1.parquet: not a readable parquet file"),
        (b"", "1.parquet: not a readable parquet file (Parquet file size is 0 bytes)"),
        (other_column, "1.parquet: no column 'text', only 'content'"),
        (content[:offset] + bytes(200) + content[offset + 200 :], "1.parquet: row group 1 is damaged"),
    ):
        path.write_bytes(damaged)
        line = refusal(prepare(tmp_path / "in", tmp_path / "out", ranks))
        assert complaint in line and ("finished parts" in line) == ("damaged" in complaint)
        assert names(tmp_path) == [".out.partial"] * ("damaged" in complaint) + ["in", "other.parquet"]
    path.write_bytes(content)
    assert prepare(tmp_path / "in", tmp_path / "out", ranks).returncode == 0


def test_a_file_that_changes_while_it_is_read_is_refused_and_leaves_no_part(
    pages: Pages, finished: Path, ranks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pages[0], tmp_path / "in")
    path = tmp_path / "in" / "002_00000.parquet"
    content = path.read_bytes()
    write_part = encode.write_part
    written = 0

    def change_meanwhile(*args: Any) -> encode.Part:
        nonlocal written
        written += 1
        if written == 3:
            write_pages(path, make_pages(60, 77))
        return write_part(*args)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "write_part", change_meanwhile)
        line = refusal(prepare(tmp_path / "in", tmp_path / "out", ranks))
    assert "002_00000.parquet: changed while it was read; run the same command again" in line
    path.write_bytes(content)
    assert prepare(tmp_path / "in", tmp_path / "out", ranks).returncode == 0
    assert contents(tmp_path / "out") == contents(finished)


def test_files_without_rows(ranks: str, tmp_path: Path) -> None:
    path = tmp_path / "none.parquet"
    pq.ParquetWriter(path, pa.schema([("text", pa.string())])).close()
    line = refusal(prepare(path, tmp_path / "out", ranks))
    assert "none.parquet: no rows in it, nor in any other of 1 files" in line
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)  # one row group without rows
    for empty in (path, write_pages(tmp_path / "null.parquet", [None, ""])):
        line = refusal(prepare(empty, tmp_path / "out", ranks))
        assert "0 training and 0 validation tokens: a split is empty" in line


SLURM = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "2"}
WHOLE = SLURM | {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "4"}
TOKENIZE = ("--stage", "tokenize")


@pytest.mark.parametrize(
    ("more", "env", "complaint"),
    [
        (("--val-tokens", "0"), {}, "--val-tokens 0 must be at least 1"),
        (("--shard-tokens", "0"), {}, "--shard-tokens 0 must be between"),
        (("--seed", "-1"), {}, "--seed -1 must be between"),
        (("--tokenizer", "char"), {}, "--tokenizer char needs the alphabet"),
        (("--tokenizer", "nothing"), {}, "--tokenizer nothing: neither"),
        (("--data-files", __file__), {}, "test_fineweb.py is no .parquet file; data_prep/textfiles.py reads other"),
        (("--data-files", "nowhere/*.parquet"), {}, "--data-files nowhere/*.parquet: no .parquet file there"),
        (("--max-tokens", "2000"), {}, "--val-tokens 2000 leaves nothing to train on of --max-tokens 2000"),
        (("--val-tokens", "1000000"), {}, "a split is empty"),
        (("--data-files",), {}, "--source local needs --data-files and --out"),
        (("--num-tasks", "2"), {}, "--task-index and --num-tasks need each other"),
        ((*TOKENIZE, "--num-tasks", "2", "--task-index", "2"), {}, "--task-index 2 must be at least 0"),
        (("--num-tasks", "2", "--task-index", "1"), {}, "--num-tasks 2: --stage all is the work of one task"),
        (TOKENIZE, SLURM, "SLURM_ARRAY_TASK_MIN is not"),
        (TOKENIZE, SLURM | {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "7"}, "this Slurm array have gaps"),
        ((), WHOLE, "SLURM_ARRAY_TASK_COUNT 2: --stage"),
        *(
            (TOKENIZE, WHOLE | {f"SLURM_ARRAY_TASK_{name}": text}, f"SLURM_ARRAY_TASK_{name}={text!r}: ")
            for name, text in (("ID", ""), ("COUNT", "-1"), ("MIN", "x"), ("MAX", "1.5"), ("STEP", "0"))
        ),
    ],
)
def test_bad_options_are_one_line(
    pages: Pages, ranks: str, tmp_path: Path, more: tuple[str, ...], env: dict[str, str], complaint: str
) -> None:
    assert complaint in refusal(prepare(pages[0], tmp_path / "out", ranks, *more, **env))
    assert not (tmp_path / "out").exists()


# A data directory that is there already


def test_the_same_again_is_left_alone_and_other_options_need_overwrite(
    pages: Pages, ranks: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(pages[0], tmp_path / "in")
    assert prepare(tmp_path / "in", out, ranks).returncode == 0
    before = contents(out)
    assert "already complete" in prepare(tmp_path / "in", out, ranks, "--backend", "gigatoken").stdout
    line = refusal(prepare(tmp_path / "in", out, ranks, "--seed", "3"))
    assert "--seed 3 (was 0); choose another --out, or replace it with --overwrite" in line
    path = tmp_path / "in" / "002_00000.parquet"
    path.write_bytes(path.read_bytes().replace(b"2024-10", b"2024-11"))  # of the same size
    assert "already holds finished data, of other input" in refusal(prepare(tmp_path / "in", out, ranks))
    assert contents(out) == before
    assert prepare(tmp_path / "in", out, ranks, "--seed", "3", "--overwrite").returncode == 0
    assert contents(out) != before
    assert_sound(out)


def test_stage_verify_finds_damage(finished: Path, pages: Pages, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    verify = (pages[0], tmp_path / "out", "byte", "--stage", "verify")
    assert "sound" in prepare(*verify).stdout  # by its own tokenizer, not --tokenizer
    path = tmp_path / "out" / "train_000001.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert "train_000001.bin: sha256 differs" in refusal(prepare(*verify))


# What it prints


def test_a_dry_run_estimates_and_writes_nothing(pages: Pages, gpt2: str, tmp_path: Path) -> None:
    done = prepare(pages[0], tmp_path / "out", gpt2, "--dry-run", "--workers", "3")
    assert done.returncode == 0
    for word in (f"{FILES} files", "shards ", "disk ", "time ", "GB free", "MB/s each as measured now"):
        assert word in done.stdout
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    num_tokens = sum(len(encode(text)) for text in as_texts(pages[1]))
    [estimate] = re.findall(r"text .* about ([\d,]+) tokens", done.stdout)
    assert 0.7 < int(estimate.replace(",", "")) / num_tokens < 1.3
    assert names(tmp_path) == []


def test_progress_at_a_terminal_is_one_line_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(workers, "TERMINAL_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = workers.Progress("encode", 100)
    for _ in range(4):
        progress.add(25, 1)
    progress.add(1)
    workers.Progress("encode", 0).add(0)
    lines = terminal.getvalue().split("\r\x1b[K")
    assert len(lines) == 5
    assert terminal.getvalue().count("\n") == 1
    assert lines[-1].endswith("0 s left\n")


def test_names_of_data_directories() -> None:
    for options, name in (
        (Options(), "fineweb_edu_10B"),
        (Options(max_tokens=10_000_000), "fineweb_edu_10B_first_10000000"),
        (Options(name="CC-MAIN-2024-10"), "fineweb_edu_CC-MAIN-2024-10"),
        (Options(dataset="HuggingFaceFW/fineweb", name="default"), "fineweb_default"),
    ):
        assert options.directory == Path("data") / name
