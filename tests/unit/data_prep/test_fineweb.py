"""FineWeb-Edu's preparation: the same bytes whatever made them, build-nanogpt's stream, every fault as documented."""

import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
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
from data_prep.pipeline.partial_dir import put_in_place
from data_prep.tokenizer import load_tokenizer
from data_prep.verify import faults_of
from tests.helpers.pages import COPIES, TROUBLE, Text, as_texts, make_pages, write_pages
from tests.helpers.runs import called
from tests.unit.data_prep.test_encode import children, is_alive, wait_for_parts
from tests.unit.data_prep.test_textfiles import WITH_SMALL_FILES, contents, names, tokens

SCRIPT = str(Path(__file__).resolve().parents[3] / "data_prep" / "fineweb.py")
EOT = 50_256
FILES = 4


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Text]]:
    """A folder of files with several row groups each, and all pages in order."""
    folder = tmp_path_factory.mktemp("pages") / "input"
    found: list[Text] = []
    for number in range(FILES):
        some = make_pages(60, number)
        write_pages(folder / f"{number:03d}_00000.parquet", some)
        found += some
    return folder, found


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fineweb_plan, "UNIT_BYTES", 10_000)


@pytest.fixture(scope="module")
def gpt2(shared_data: Path) -> str:
    """GPT-2's rank file, where ids are held against tiktoken's."""
    return str(shared_data / "gpt2.tiktoken")


@pytest.fixture(scope="module")
def ranks(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its first thousand ranks, which are a tokenizer too: elsewhere 50,257 would be most of the time."""
    lines = (shared_data / "gpt2.tiktoken").read_bytes().splitlines(keepends=True)
    path = tmp_path_factory.mktemp("ranks") / "first.tiktoken"
    path.write_bytes(b"".join(lines[:1000]))
    return str(path)


@pytest.fixture(scope="module")
def finished_by_gpt2(pages: tuple[Path, list[Text]], gpt2: str) -> Path:
    """The pages, in one process and units of one size."""
    out = pages[0].parent / "finished_by_gpt2"
    assert prepare(pages[0], out, gpt2).returncode == 0
    return out


@pytest.fixture(scope="module")
def finished(pages: tuple[Path, list[Text]], ranks: str) -> Path:
    """The same by `ranks`."""
    out = pages[0].parent / "finished"
    assert prepare(pages[0], out, ranks).returncode == 0
    return out


def prepare(folder: Path, out: Path, ranks: str, *more: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """The command, in this process alone unless it is told otherwise."""
    return called(fineweb.main, *arguments(folder, out, ranks), "--workers", "1", *more, **env)


def arguments(folder: Path, out: Path, ranks: str) -> list[str]:
    inputs = ["--source", "local", "--data-files", str(folder), "--tokenizer", ranks]
    return [*inputs, "--out", str(out), "--shard-tokens", "5000", "--val-tokens", "2000"]


def refusal(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 2, done
    lines = [line for line in done.stderr.splitlines() if not line.startswith("fineweb: warning")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("fineweb: ")
    return lines[0]


def documents_of(data: Path, split: str) -> list[tuple[int, ...]]:
    """A split's documents, each its ids after EOT."""
    ids = tokens(data, split)
    starts = [place for place, index in enumerate(ids) if index == EOT]
    assert starts[0] == 0
    return [tuple(ids[begin + 1 : end]) for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True)]


def assert_sound(data: Path) -> None:
    assert faults_of(data, read_manifest(data), load_tokenizer(data)) == []


# What comes out


def test_every_page_is_there_once_in_one_split(finished_by_gpt2: Path, pages: tuple[Path, list[Text]]) -> None:
    encoding = tiktoken.get_encoding("gpt2")
    texts = as_texts(pages[1])
    train, val = documents_of(finished_by_gpt2, "train"), documents_of(finished_by_gpt2, "val")
    assert sorted(train + val) == sorted({tuple(encoding.encode_ordinary(text)) for text in texts})
    assert 2000 <= sum(len(ids) + 1 for ids in val) < 2400
    assert train != sorted(train)
    found = read_manifest(finished_by_gpt2).source["documents"]
    assert found["read"] == len(pages[1])
    assert found["empty"] == 2 * FILES
    assert found["duplicates"] == len(texts) - len(set(texts))
    assert found["repaired"] == FILES
    assert found["dropped"] == []


def test_build_nanogpts_stream(pages: tuple[Path, list[Text]], gpt2: str, tmp_path: Path) -> None:
    encoding = tiktoken.get_encoding("gpt2")
    expected: list[np.ndarray] = []
    shard = np.empty(5000, dtype=np.uint16)
    filled = 0
    for text in as_texts(pages[1]):
        ids = np.array([EOT, *encoding.encode_ordinary(text)], dtype=np.uint16)
        while len(ids):
            room = shard[filled : filled + len(ids)]
            room[:] = ids[: len(room)]
            filled, ids = filled + len(room), ids[len(room) :]
            if filled == len(shard):
                expected.append(shard.copy())
                filled = 0
    expected.append(shard[:filled])

    options = ("--split-mode", "first-shard", "--dedup", "none", "--shuffle", "none")
    done = prepare(pages[0], tmp_path / "out", gpt2, *options)
    assert done.returncode == 0
    assert "--val-tokens has no effect with --split-mode first-shard" in done.stderr
    shards = [*(tmp_path / "out").glob("val_*.bin"), *sorted((tmp_path / "out").glob("train_*.bin"))]
    assert len(shards) == len(expected) > 4
    for path, ids in zip(shards, expected, strict=True):
        np.testing.assert_array_equal(np.fromfile(path, dtype="<u2", offset=1024), ids)
    assert_sound(tmp_path / "out")


def test_max_tokens_takes_the_first_pages(
    finished_by_gpt2: Path, pages: tuple[Path, list[Text]], gpt2: str, tmp_path: Path
) -> None:
    options = ("--max-tokens", "4000", "--shuffle", "none", "--val-tokens", "300")
    assert prepare(pages[0], tmp_path / "out", gpt2, *options).returncode == 0
    encoding = tiktoken.get_encoding("gpt2")
    distinct = list(dict.fromkeys(tuple(encoding.encode_ordinary(text)) for text in as_texts(pages[1])))
    train, val = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "val")
    count = len(train) + len(val)
    assert set(train + val) == set(distinct[:count])
    assert [ids for ids in distinct if ids in set(train)] == train
    total = sum(len(ids) + 1 for ids in distinct[:count])
    assert total <= 4000 < total + len(distinct[count]) + 1
    files = local_files((str(pages[0]),))
    assert len(plan_all_units(files, Options(max_tokens=4000))) < len(plan_all_units(files, Options()))


def test_a_tokenizer_without_eot(pages: tuple[Path, list[Text]], tmp_path: Path) -> None:
    assert prepare(pages[0], tmp_path / "out", "byte", "--dedup", "none").returncode == 0
    assert_sound(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert sum(split.documents for split in manifest.splits.values()) == len(as_texts(pages[1]))


# The same bytes


LONG_WORKERS = pytest.mark.long(reason="each worker imports and loads 50,257 ranks; two of them are in `make test`")


@pytest.mark.parametrize(
    "more",
    [("--workers", "2"), pytest.param(("--workers", "3", "--backend", "gigatoken"), marks=LONG_WORKERS)],
    ids=["2", "3 gigatoken"],
)
def test_the_same_bytes_for_any_number_of_processes(
    finished_by_gpt2: Path, pages: tuple[Path, list[Text]], gpt2: str, tmp_path: Path, more: tuple[str, ...]
) -> None:
    assert prepare(pages[0], tmp_path / "out", gpt2, *more).returncode == 0
    assert contents(tmp_path / "out") == contents(finished_by_gpt2)


def test_gigatoken_and_units_of_any_size(
    finished_by_gpt2: Path, pages: tuple[Path, list[Text]], gpt2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fineweb_plan, "UNIT_BYTES", 1)
    done = prepare(pages[0], tmp_path / "out", gpt2, "--backend", "gigatoken")
    assert done.returncode == 0
    assert contents(tmp_path / "out") == contents(finished_by_gpt2)


def test_the_files_may_lie_elsewhere_and_be_named_one_by_one(
    finished: Path, pages: tuple[Path, list[Text]], ranks: str, tmp_path: Path
) -> None:
    shutil.copytree(pages[0], tmp_path / "elsewhere")
    files = sorted(str(path) for path in (tmp_path / "elsewhere").iterdir())
    given = ["--source", "local", "--data-files", *files[::-1], "--tokenizer", ranks, "--workers", "1"]
    done = called(fineweb.main, *given, *arguments(pages[0], tmp_path / "out", ranks)[6:])
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(finished)


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_tasks_share_the_work_and_one_packs(
    finished: Path, pages: tuple[Path, list[Text]], ranks: str, tmp_path: Path, num_tasks: int
) -> None:
    out = tmp_path / "out"
    for index in reversed(range(num_tasks)):
        early = prepare(pages[0], out, ranks, "--stage", "pack")
        assert num_missing(refusal(early)) > 0
        env = {"SLURM_ARRAY_TASK_ID": str(10 + 2 * index), "SLURM_ARRAY_TASK_COUNT": str(num_tasks)}
        env |= {"SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_STEP": "2"}
        env |= {"SLURM_ARRAY_TASK_MAX": str(10 + 2 * (num_tasks - 1))}
        done = prepare(pages[0], out, ranks, "--stage", "tokenize", **env)
        assert done.returncode == 0, done.stderr
        assert not out.exists()
    assert prepare(pages[0], out, ranks, "--stage", "pack").returncode == 0
    assert contents(out) == contents(finished)
    assert names(tmp_path) == ["out"]
    assert "sound" in prepare(pages[0], out, ranks, "--stage", "verify").stdout
    assert "already complete" in prepare(pages[0], out, ranks, "--stage", "tokenize").stdout


def num_missing(line: str) -> int:
    """How many parts are missing, as the refusal has it."""
    assert "parts are missing or damaged; --stage tokenize makes them" in line
    return int(line.removeprefix("fineweb: ").split(" of ")[0])


@pytest.mark.long(reason="four interpreters; tasks one after the other are in `make test`")
def test_tasks_at_the_same_time(finished: Path, pages: tuple[Path, list[Text]], ranks: str, tmp_path: Path) -> None:
    """Two tasks and a third that repeats the first's share."""
    task = ("--workers", "1", "--stage", "tokenize", "--num-tasks", "2", "--task-index")
    running = [start(pages[0], tmp_path / "out", ranks, *task, index) for index in "010"]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    packing = start(pages[0], tmp_path / "out", ranks, "--workers", "1", "--stage", "pack")
    _, said = packing.communicate(timeout=120)
    assert packing.returncode == 0, said
    assert contents(tmp_path / "out") == contents(finished)


def start(folder: Path, out: Path, ranks: str, *more: str) -> "subprocess.Popen[str]":
    """The command in a process group of its own."""
    command = [sys.executable, SCRIPT, *arguments(folder, out, ranks), *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=out.parent
    )


# Kills


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, ranks: str) -> tuple[Path, Path]:
    """Input of files enough to be killed in the midst of, and its data set."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(12):
        long: list[Text] = ["word " * 9_000 + f"{number} {place}" for place in range(10)]
        write_pages(folder / "input" / f"{number}.parquet", make_pages(50, number) + long)
    assert prepare(folder / "input", folder / "out", ranks).returncode == 0
    return folder / "input", folder / "out"


def kill_at_random(
    command: tuple[str, ...], many: tuple[Path, Path], ranks: str, out: Path, rng: random.Random, most_kills: int
) -> int:
    """Start again and again, killing the parent, a worker or all of them at some moment, until it is done."""
    kills = 0
    parts = out.with_name(f".{out.name}.partial") / "parts"
    while True:
        process = start(many[0], out, ranks, *command, "--workers", str(rng.choice([1, 2, 3])))
        # Half of the time while parts are made, or packed; half at any time.
        num_parts = rng.choice([0, rng.randrange(1, 9)])
        until = time.monotonic() + rng.uniform(0.2, 3.0)
        if kills < most_kills and num_parts:
            wait_for_parts(parts, len(list(parts.glob("*.json"))) + num_parts, process)
        while process.poll() is None and time.monotonic() < until and not num_parts:
            time.sleep(0.01)
        if process.poll() is None and kills < most_kills:
            victims = rng.choice(["parent", "worker", "all"])
            started = [pid for pid in children(process.pid) if "spawn_main" in command_of(pid)]
            if victims == "worker" and started:
                os.kill(rng.choice(started), signal.SIGKILL)
            elif victims == "all":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            kills += 1
        _, said = process.communicate(timeout=120)
        deadline = time.monotonic() + 20
        while any(is_alive(pid) for pid in children(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.returncode == 0:
            return kills
        assert process.returncode in (2, -signal.SIGKILL), said
        assert "Traceback" not in said


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return ""


WAYS: dict[str, list[tuple[str, ...]]] = {
    "one machine": [()],
    "gigatoken": [("--backend", "gigatoken")],
    "tasks": [
        ("--stage", "tokenize", "--task-index", "0", "--num-tasks", "2"),
        ("--stage", "tokenize", "--task-index", "1", "--num-tasks", "2"),
        ("--stage", "pack"),
    ],
}


LONG_SEED = pytest.mark.long(reason="a dozen starts each; test_encode.py kills one in `make test`")
SEEDS = [
    *(pytest.param(number, marks=LONG_SEED) for number in (0, 1, 2)),
    *(pytest.param(number, marks=pytest.mark.slow) for number in range(3, 23)),
]


@pytest.mark.parametrize("number", SEEDS)
def test_killed_at_random_the_same_command_ends_with_the_same_bytes(
    many: tuple[Path, Path], ranks: str, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "out"
    rng = random.Random(number)
    way = list(WAYS)[number % len(WAYS)]
    most_kills = 1 if way == "tasks" else 2
    kills = sum(kill_at_random(command, many, ranks, out, rng, most_kills) for command in WAYS[way])
    assert kills > 0
    assert contents(out) == contents(many[1])
    assert_sound(out)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("rename", range(4))
@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_kill_while_the_directory_gets_its_name_loses_nothing(
    pages: tuple[Path, list[Text]],
    finished: Path,
    ranks: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rename: int,
    is_replaced: bool,
) -> None:
    """Renaming and removing fail one after the other; what was there before, or what is new, is always whole."""
    out = tmp_path / "out"
    if is_replaced:
        shutil.copytree(finished, out)
        (out / "of before").touch()
    calls = 0

    class Killed(BaseException):
        pass

    def killed(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > rename:
                raise Killed
            return function(*args, **options)

        return call

    def put_and_be_killed(partial: Path, out: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed(Path.rename))
            patch.setattr(shutil, "rmtree", killed(shutil.rmtree))
            put_in_place(partial, out)

    command = ("--overwrite",)
    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "put_in_place", put_and_be_killed)
        try:
            prepare(pages[0], out, ranks, *command)
        except Killed:
            assert (out / "manifest.json").exists() or is_old_kept(tmp_path) == is_replaced
    done = prepare(pages[0], out, ranks, *(() if out.exists() and not (out / "of before").exists() else command))
    assert done.returncode == 0, done.stderr
    if "already complete" not in done.stdout:
        assert "parts were there from an earlier run" in done.stderr
    assert contents(out) == contents(finished)
    assert names(tmp_path) == ["out"]


def is_old_kept(folder: Path) -> bool:
    return (folder / ".out.replaced" / "of before").exists()


def test_a_killed_worker_ends_the_run_with_one_line(many: tuple[Path, Path], ranks: str, tmp_path: Path) -> None:
    for attempt in range(5):  # on a busy machine it may be done before
        process = start(many[0], tmp_path / f"out{attempt}", ranks, "--workers", "2")
        wait_for_parts(tmp_path / f".out{attempt}.partial" / "parts", 3, process)
        for pid in children(process.pid):
            if "spawn_main" in command_of(pid):
                os.kill(pid, signal.SIGKILL)
                break
        _, said = process.communicate(timeout=60)
        if process.returncode != 0:
            break
    assert process.returncode == 2
    last = said.strip().splitlines()[-1]
    assert last.startswith("fineweb: a worker process was killed")
    assert "finished parts" in last
    assert "Traceback" not in said


# Faults


def test_a_page_that_the_tokenizer_gives_up_on_is_dropped_and_named(gpt2: str, tmp_path: Path) -> None:
    pages: list[Text] = [*make_pages(30, 0)]
    pages[7] = "a" + " " * 1_000_000 + "b"
    pages[8] = "=" * 300_000
    write_pages(tmp_path / "in" / "0.parquet", pages)
    for backend in ("tiktoken", "gigatoken"):
        options = ("--val-tokens", "200", "--backend", backend)
        done = prepare(tmp_path / "in", tmp_path / backend, gpt2, *options)
        assert done.returncode == 0, done.stderr
        assert "0.parquet, row 7" in done.stdout
        assert read_manifest(tmp_path / backend).source["documents"]["dropped"] == ["0.parquet, row 7"]
    assert contents(tmp_path / "tiktoken") == contents(tmp_path / "gigatoken")
    encoding = tiktoken.get_encoding("gpt2")
    kept = documents_of(tmp_path / "tiktoken", "train") + documents_of(tmp_path / "tiktoken", "val")
    assert tuple(encoding.encode_ordinary("=" * 300_000)) in kept


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("truncated", "1.parquet: not a readable parquet file"),
        ("flipped", "1.parquet: row group 1 is damaged"),
        ("column", "1.parquet: no column 'text', only 'content'"),
        ("empty", "1.parquet: not a readable parquet file (Parquet file size is 0 bytes)"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_lost(ranks: str, tmp_path: Path, damage: str, complaint: str) -> None:
    for number in range(2):
        write_pages(tmp_path / "in" / f"{number}.parquet", make_pages(60, number))
    path = tmp_path / "in" / "1.parquet"
    content = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "flipped":
            place = content.find(b"1.", len(content) // 3)
            path.write_bytes(content[:place] + bytes(200) + content[place + 200 :])
        case "column":
            write_pages(path, make_pages(60, 1), column="content")
        case "empty":
            path.write_bytes(b"")
    done = prepare(tmp_path / "in", tmp_path / "out", ranks)
    assert complaint in refusal(done)
    assert not (tmp_path / "out").exists()
    if damage == "flipped":
        assert "finished parts" in done.stderr
    else:
        assert names(tmp_path) == ["in"]
    path.write_bytes(content)
    assert prepare(tmp_path / "in", tmp_path / "out", ranks).returncode == 0


def test_a_file_that_changes_while_it_is_read_is_refused_and_no_part_of_it_stays(
    pages: tuple[Path, list[Text]], finished: Path, ranks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pages[0], tmp_path / "in")
    path = tmp_path / "in" / "002_00000.parquet"
    content = path.read_bytes()
    really = encode.write_part
    written = 0

    def change_meanwhile(*args: Any) -> encode.Part:
        nonlocal written
        written += 1
        if written == 3:
            write_pages(path, make_pages(60, 77))
        return really(*args)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "write_part", change_meanwhile)
        line = refusal(prepare(tmp_path / "in", tmp_path / "out", ranks))
    assert "002_00000.parquet: changed while it was read; run the same command again" in line
    path.write_bytes(content)
    assert prepare(tmp_path / "in", tmp_path / "out", ranks).returncode == 0
    assert contents(tmp_path / "out") == contents(finished)


@pytest.mark.parametrize("name", ["glob[1]", "a b*"])
def test_folders_of_any_name(
    finished: Path, pages: tuple[Path, list[Text]], ranks: str, tmp_path: Path, name: str
) -> None:
    shutil.copytree(pages[0], tmp_path / name)
    assert prepare(tmp_path / name, tmp_path / "out", ranks).returncode == 0
    assert contents(tmp_path / "out") == contents(finished)


def test_files_without_rows(ranks: str, tmp_path: Path) -> None:
    pq.ParquetWriter(tmp_path / "none.parquet", pa.schema([("text", pa.string())])).close()
    line = refusal(prepare(tmp_path / "none.parquet", tmp_path / "out", ranks))
    assert "none.parquet: no rows in it, nor in any other of 1 files" in line
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")  # one group, of no rows
    line = refusal(prepare(tmp_path / "empty.parquet", tmp_path / "out1", ranks))
    assert "0 training and 0 validation tokens: a split is empty" in line
    write_pages(tmp_path / "null.parquet", [None, ""])
    line = refusal(prepare(tmp_path / "null.parquet", tmp_path / "out2", ranks))
    assert "0 training and 0 validation tokens: a split is empty" in line


def test_max_tokens_that_duplicates_leave_too_few_of_is_told(ranks: str, tmp_path: Path) -> None:
    write_pages(tmp_path / "in" / "0.parquet", ["the same page " * 500] * 400)
    write_pages(tmp_path / "in" / "1.parquet", make_pages(400, 1))
    done = prepare(tmp_path / "in", tmp_path / "out", ranks, "--max-tokens", "100000")
    assert done.returncode == 0, done.stderr
    assert (
        "tokens in the pages that --max-tokens 100000 reads, without their duplicates; set it higher if there are more"
        in done.stderr
    )


@pytest.mark.long(reason="several starts; test_disk.py has full disks in `make test`")
def test_a_full_disk_keeps_the_parts(pages: tuple[Path, list[Text]], tmp_path: Path) -> None:
    given = [*arguments(pages[0], tmp_path / "out", "byte"), "--shard-tokens", "1000000", "--workers", "1"]
    command = [sys.executable, "-B", "-c", WITH_SMALL_FILES, "60000", "-B", SCRIPT, *given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "finished parts" in done.stderr
    assert names(tmp_path / ".out.partial") == ["parts"]
    again = subprocess.run([sys.executable, SCRIPT, *given], capture_output=True, text=True)
    assert again.returncode == 0
    assert f"{FILES} of {FILES} parts were there from an earlier run" in again.stderr
    assert_sound(tmp_path / "out")
    command[command.index("60000")] = "9000"
    command[command.index(str(tmp_path / "out"))] = str(tmp_path / "early")
    early = subprocess.run(command, capture_output=True, text=True)  # while parts are written
    assert (early.returncode, early.stderr) == (2, "fineweb: [Errno 27] File too large\n")
    assert names(tmp_path) == ["out"]


def test_tasks_of_different_options_do_not_mix(pages: tuple[Path, list[Text]], ranks: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    task = ("--stage", "tokenize", "--num-tasks", "2", "--task-index")
    assert prepare(pages[0], out, ranks, *task, "0").returncode == 0
    before = contents(tmp_path / ".out.partial")
    for more in (("--backend", "gigatoken"), ("--max-tokens", "5000")):
        line = refusal(prepare(pages[0], out, ranks, *task, "1", *more))
        assert "other tasks make other parts there" in line
        assert f"{more[0]} {more[1]} (was " in line
        assert f"{more[0]} {more[1]} (was " in refusal(prepare(pages[0], out, ranks, "--stage", "pack", *more))
    assert "--tokenizer byte (" in refusal(prepare(pages[0], out, "byte", *task, "1"))
    (tmp_path / "other").mkdir()
    shutil.copy(pages[0] / "000_00000.parquet", tmp_path / "other")
    assert "--data-files" in refusal(prepare(tmp_path / "other", out, ranks, *task, "1"))
    assert contents(tmp_path / ".out.partial") == before


def test_what_parts_do_not_depend_on_is_decided_when_they_are_packed(
    pages: tuple[Path, list[Text]], ranks: str, tmp_path: Path
) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    options = ("--seed", "1", "--dedup", "none", "--val-tokens", "700")
    assert prepare(pages[0], out, ranks, "--stage", "tokenize").returncode == 0
    assert prepare(pages[0], out, ranks, "--stage", "pack", *options).returncode == 0
    assert prepare(pages[0], fresh, ranks, *options).returncode == 0
    assert contents(out) == contents(fresh)


def test_one_machine_may_change_its_mind(
    finished: Path, pages: tuple[Path, list[Text]], ranks: str, tmp_path: Path
) -> None:
    """Parts are kept over options that do not change them."""
    out = tmp_path / "out"
    done = prepare(pages[0], out, ranks, "--stage", "tokenize", "--seed", "5")
    assert done.returncode == 0
    again = prepare(pages[0], out, ranks)
    assert again.returncode == 0
    assert "parts were there from an earlier run" in again.stderr
    assert contents(out) == contents(finished)


@pytest.mark.long(reason="two commands at once, of several interpreters each")
def test_two_at_once_into_the_same_place(many: tuple[Path, Path], ranks: str, tmp_path: Path) -> None:
    first = start(many[0], tmp_path / "out", ranks, "--workers", "2")
    wait_for_parts(tmp_path / ".out.partial" / "parts", 1, first)
    os.killpg(first.pid, signal.SIGSTOP)
    assert first.poll() is None
    for stage in ("all", "tokenize", "pack"):
        line = refusal(prepare(many[0], tmp_path / "out", ranks, "--stage", stage))
        assert "another process is making it right now" in line
    os.killpg(first.pid, signal.SIGCONT)
    first.communicate(timeout=120)
    assert first.returncode == 0


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--val-tokens", "0"), "--val-tokens 0 must be at least 1"),
        (("--workers", "0"), "--workers 0 must be at least 1"),
        (("--shard-tokens", "0"), "--shard-tokens 0 must be between"),
        (("--seed", "-1"), "--seed -1 must be between"),
        (("--tokenizer", "char"), "--tokenizer char needs the alphabet"),
        (("--tokenizer", "nothing"), "--tokenizer nothing: neither"),
        (("--data-files", SCRIPT), "fineweb.py is no .parquet file; data_prep/textfiles.py reads other kinds"),
        (("--data-files", "nowhere/*.parquet"), "--data-files nowhere/*.parquet: no .parquet file there"),
        (("--max-tokens", "2000"), "--val-tokens 2000 leaves nothing to train on of --max-tokens 2000"),
        (("--num-tasks", "2"), "--task-index and --num-tasks need each other"),
        (("--num-tasks", "2", "--task-index", "2", "--stage", "tokenize"), "--task-index 2 must be at least 0"),
        (("--num-tasks", "2", "--task-index", "1"), "--num-tasks 2: --stage all is the work of one task"),
        (("--val-tokens", "1000000"), "a split is empty"),
    ],
)
def test_bad_options_are_one_line(
    pages: tuple[Path, list[Text]], ranks: str, tmp_path: Path, more: tuple[str, ...], complaint: str
) -> None:
    assert complaint in refusal(prepare(pages[0], tmp_path / "out", ranks, *more))
    assert not (tmp_path / "out").exists()


def test_source_local_needs_files_and_arrays_one_stage(
    pages: tuple[Path, list[Text]], ranks: str, tmp_path: Path
) -> None:
    for given in (["--out", str(tmp_path / "out")], ["--data-files", str(pages[0])]):
        done = called(fineweb.main, "--source", "local", *given)
        assert refusal(done) == "fineweb: --source local needs --data-files and --out"
    slurm: dict[str, Any] = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "2"}
    task = ("--stage", "tokenize")
    assert "SLURM_ARRAY_TASK_MIN is not" in refusal(prepare(pages[0], tmp_path / "out", ranks, *task, **slurm))
    slurm |= {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "7"}
    line = refusal(prepare(pages[0], tmp_path / "out", ranks, *task, **slurm))
    assert "the 2 ids of this Slurm array have gaps" in line
    slurm["SLURM_ARRAY_TASK_MAX"] = "4"
    assert "SLURM_ARRAY_TASK_COUNT 2: --stage all" in refusal(prepare(pages[0], tmp_path / "out", ranks, **slurm))
    assert names(tmp_path) == []


# What is there already


def test_the_same_again_is_left_alone_and_other_options_need_overwrite(
    pages: tuple[Path, list[Text]], ranks: str, tmp_path: Path
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


def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    pages: tuple[Path, list[Text]], gpt2: str, tmp_path: Path
) -> None:
    done = prepare(pages[0], tmp_path / "out", gpt2, "--dry-run", "--workers", "3")
    assert done.returncode == 0
    assert f"{FILES} files" in done.stdout
    for word in ("shards ", "disk ", "time ", "GB free", "MB/s each as measured now"):
        assert word in done.stdout
    encoding = tiktoken.get_encoding("gpt2")
    really = sum(len(encoding.encode_ordinary(text)) for text in as_texts(pages[1]))
    [said] = re.findall(r"text .* about ([\d,]+) tokens", done.stdout)
    assert 0.7 < int(said.replace(",", "")) / really < 1.3
    assert names(tmp_path) == []


def test_a_damaged_shard_is_found_by_stage_verify(pages: tuple[Path, list[Text]], ranks: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert prepare(pages[0], out, ranks).returncode == 0
    by_bytes = [*arguments(pages[0], out, "byte"), "--stage", "verify"]
    assert "sound" in called(fineweb.main, *by_bytes).stdout  # its own tokenizer counts
    path = out / "tokenizer" / "ranks.tiktoken"
    kept = path.read_bytes()
    path.write_bytes(kept.replace(b" 300\n", b" 301\n"))
    assert "its ranks are not 0 to 999" in refusal(prepare(pages[0], out, ranks, "--stage", "verify"))
    path.write_bytes(kept)
    path = out / "train_000001.bin"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    assert "train_000001.bin: sha256 differs" in refusal(prepare(pages[0], out, ranks, "--stage", "verify"))


def test_progress_tells_rates_and_a_terminal_gets_one_line(
    pages: tuple[Path, list[Text]], ranks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "REPORT_SECONDS", 0.0)
    done = prepare(pages[0], tmp_path / "out", ranks)
    lines = [line for line in done.stderr.splitlines() if line.startswith("encode  ")]
    assert len(lines) > FILES
    for word in (" MB/s  ", " documents  ", " tokens/s  ", " left"):
        assert word in lines[-1]


def test_progress_at_a_terminal_is_one_line_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(workers, "TERMINAL_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", shown)
    progress = workers.Progress("encode", 100)
    for _ in range(4):
        progress.add(25, 1)
    progress.add(1)
    workers.Progress("encode", 0).add(0)
    lines = shown.getvalue().split("\r\x1b[K")
    assert len(lines) == 5
    assert shown.getvalue().count("\n") == 1
    assert lines[-1].endswith("0 s left\n")


def test_names_of_data_directories() -> None:
    assert Options().directory == Path("data/fineweb_edu_10B")
    assert Options(max_tokens=10_000_000).directory == Path("data/fineweb_edu_10B_first_10000000")
    assert Options(name="sample-350BT").directory == Path("data/fineweb_edu_350B")
    assert Options(name="CC-MAIN-2024-10").directory == Path("data/fineweb_edu_CC-MAIN-2024-10")
    assert Options(dataset="HuggingFaceFW/fineweb", name="default").directory == Path("data/fineweb_default")


def test_the_trouble_is_in_the_pages(pages: tuple[Path, list[Text]]) -> None:
    assert all(pages[1].count(page) == FILES for page in TROUBLE)
    assert all(pages[1].count(page) == 2 * FILES for page in COPIES)
