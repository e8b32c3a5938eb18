"""Parts and their workers: the same bytes for any number of processes and after any kill; stale parts never used."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from common.errors import InputError
from data_prep import textfiles
from data_prep.pipeline import encode, sources, workers
from data_prep.pipeline.encode import BLOCK_TOKENS, Part, Tally, encode_unit, read_part, write_part
from data_prep.pipeline.pack import pack_split, parts_in_turn
from data_prep.textfiles import Options, prepare
from tests.unit.data_prep.test_textfiles import SCRIPT, WITH_SMALL_FILES, contents, names, tokens

EOT_TEXT = "<|endoftext|>"
EOT = 50_256


def sample_files(folder: Path, *, num_files: int = 12, num_stories: int = 40) -> Path:
    """Folders of stories: jsonl files of different sizes, with empty ones among them, and text."""
    folder.mkdir()
    for number in range(num_files):
        stories = [f"Story {number}.{n} \u00e9\n" + "and then " * (n % 13) for n in range(num_stories + 9 * number)]
        stories[3] = ""
        lines = [json.dumps({"text": story}) for story in stories]
        (folder / f"{number:02d}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def start(*arguments: str | Path, cwd: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what runs in the background
    )


def children(pid: int) -> list[int]:
    """Living processes that it has begun."""
    listed = subprocess.run(["ps", "-o", "pid=,ppid=", "-e"], capture_output=True, text=True, check=True).stdout
    pairs = [line.split() for line in listed.splitlines()]
    return [int(child) for child, parent in pairs if int(parent) == pid and "ps" not in child]


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except FileNotFoundError:
        return False


def wait_for_parts(folder: Path, count: int, process: "subprocess.Popen[str]") -> None:
    """Until so many parts are finished (or, too late to kill it, the process has ended)."""
    while process.poll() is None and len(list(folder.glob("*.json"))) < count:
        time.sleep(0.005)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_files(tmp_path_factory.mktemp("stories") / "input")


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough to be interrupted in the middle of."""
    return sample_files(tmp_path_factory.mktemp("big") / "input", num_files=30, num_stories=3000)


@pytest.fixture(scope="module")
def finished(stories: Path) -> Path:
    """The stories by bytes, in one process."""
    out = stories.parent / "finished"
    prepare(Options((str(stories),), out, "byte", shard_tokens=5_000, workers=1))
    return out


def test_a_part_reads_back_as_written(tmp_path: Path) -> None:
    documents = [np.arange(n, dtype=np.uint16) for n in (3, 1, BLOCK_TOKENS + 5, 2)]
    hashes = [hashlib.sha256(bytes([n])).digest()[:16] for n in range(4)]
    tally = Tally(empty=3, repaired=1, dropped=[5])
    batches = [
        (np.concatenate(documents[begin:end]), [len(ids) for ids in documents[begin:end]], hashes[begin:end])
        for begin, end in ((0, 1), (1, 4))
    ]
    part = write_part(tmp_path / "one", {"key": 1}, iter(batches), tally)
    assert (part.documents, part.tokens) == (4, BLOCK_TOKENS + 11)
    read = read_part(tmp_path / "one", {"key": 1})
    assert read == Part(part.path, part.tokens, 4, tally, is_reused=True)
    assert read.starts().tolist() == [0, 3, 4, BLOCK_TOKENS + 9]
    assert [a << 64 | b for a, b in read.hashes().tolist()] == [int.from_bytes(value, "big") for value in hashes]
    blocks = list(read.blocks())
    assert [starts.tolist() for _, starts in blocks] == [[0, 3, 4], [9]]
    np.testing.assert_array_equal(np.concatenate([tokens for tokens, _ in blocks]), np.concatenate(documents))


@pytest.mark.parametrize("damage", ["key", "record", "torn record", "flipped bit", "shorter", "gone"])
def test_a_part_that_is_not_sound_or_not_of_this_input_is_not_used(tmp_path: Path, damage: str) -> None:
    part = write_part(tmp_path / "one", {"key": 1}, [(np.arange(50, dtype=np.uint16), [50], [bytes(16)])], Tally())
    record, content = tmp_path / "one.json", part.path.read_bytes()
    match damage:
        case "record":
            record.unlink()
        case "torn record":
            record.write_text(record.read_text()[:-9])
        case "flipped bit":
            part.path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        case "shorter":
            part.path.write_bytes(content[:-8])
        case "gone":
            part.path.unlink()
    assert read_part(tmp_path / "one", {"key": 2 if damage == "key" else 1}) is None


@pytest.mark.parametrize("num_workers", [2, 3])
def test_the_same_bytes_for_any_number_of_processes(
    stories: Path, finished: Path, tmp_path: Path, num_workers: int
) -> None:
    prepare(Options((str(stories),), tmp_path / "out", "byte", shard_tokens=5_000, workers=num_workers))
    assert contents(tmp_path / "out") == contents(finished)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_one_big_file_is_shared_between_processes(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    path = shared_data / "tinystories_2mb.txt"
    one, two = (
        Options((str(path),), tmp_path / name, tokenizer, shard_tokens=300_000, split_documents_on=EOT_TEXT, workers=n)
        for name, n in (("one", 1), ("two", 2))
    )
    prepare(one)
    monkeypatch.setattr(sources, "UNIT_BYTES", 2**18)
    manifest = prepare(two)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    oracle = tiktoken.get_encoding("gpt2").encode_ordinary
    documents = path.read_bytes().decode().split(EOT_TEXT)
    assert sum(split.documents for split in manifest.splits.values()) == len(documents)
    if tokenizer == "gpt2":
        num_train = manifest.splits["train"].documents
        assert tokens(tmp_path / "two", "train") == [i for text in documents[:num_train] for i in (EOT, *oracle(text))]
        assert tokens(tmp_path / "two", "val") == [i for text in documents[num_train:] for i in (EOT, *oracle(text))]


def test_units_of_any_size_pack_into_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text("--".join(f"document {n} " * (n % 5) for n in range(70)))
    for unit_bytes in (10, 333, 10**6):
        monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
        out = tmp_path / str(unit_bytes)
        prepare(Options((str(path),), out, "byte", 0.3, shard_tokens=377, split_documents_on="--"))
    assert contents(tmp_path / "10") == contents(tmp_path / "333") == contents(tmp_path / "1000000")


def test_pack_split_keeps_order_and_places(tmp_path: Path, finished: Path) -> None:
    tokenizer = textfiles.make_tokenizer("byte", "")
    parts = [
        write_part(tmp_path / name, {}, [(np.full(n, n, dtype=np.uint16), [n], [bytes(16)]) for n in sizes], Tally())
        for name, sizes in (("b", (5, 1)), ("a", ()), ("c", (9,)))
    ]
    info = pack_split(tmp_path, "train", parts_in_turn(parts), num_tokens=15, tokenizer=tokenizer, shard_tokens=4)
    assert tokens(tmp_path, "train") == [5] * 5 + [1] + [9] * 9
    starts = [np.fromfile(path, dtype="<u8").tolist() for path in sorted(tmp_path.glob("*.idx"))]
    assert starts == [[0], [1, 2], [], []]
    assert (info.tokens, info.documents, len(info.shards)) == (15, 3, 4)


@pytest.mark.parametrize(
    "num_workers", [1, pytest.param(2, marks=pytest.mark.long(reason="test_fineweb.py kills workers at random too"))]
)
def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(
    stories: Path, finished: Path, tmp_path: Path, num_workers: int
) -> None:
    arguments = ["--input", str(stories), "--out", "out", "--tokenizer", "byte", "--shard-tokens", "5000"]
    partial = tmp_path / ".out.partial"
    for awaited in ("parts/*.json", "train_000000.bin"):  # while encoding, while packing
        process = start(*arguments, "--workers", str(num_workers), cwd=tmp_path)
        while process.poll() is None and not list(partial.glob(awaited)):
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert list(partial.glob("parts/*.part"))
        assert not (tmp_path / "out").exists()
    process = start(*arguments, "--workers", str(num_workers), cwd=tmp_path)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert "13 of 13 parts were there from an earlier run" in said
    assert contents(tmp_path / "out") == contents(finished)
    assert names(tmp_path) == ["out"]


def test_workers_leave_when_their_parent_is_killed(big: Path, tmp_path: Path) -> None:
    process = start("--input", big, "--out", "out", "--tokenizer", "byte", "--workers", "2", cwd=tmp_path)
    wait_for_parts(tmp_path / ".out.partial" / "parts", 1, process)
    started = children(process.pid)
    assert len(started) >= 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(is_alive(worker) for worker in started) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(is_alive(worker) for worker in started)


@pytest.mark.long(reason="test_fineweb.py has it in `make test`, of the same workers.py")
def test_a_killed_worker_ends_the_run_with_one_line(big: Path, tmp_path: Path) -> None:
    process = start("--input", big, "--out", "out", "--tokenizer", "byte", "--workers", "2", cwd=tmp_path)
    wait_for_parts(tmp_path / ".out.partial" / "parts", 1, process)
    for worker in children(process.pid):
        if "resource_tracker" not in Path(f"/proc/{worker}/cmdline").read_text():
            os.kill(worker, signal.SIGKILL)
            break
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    lines = said.strip().splitlines()
    assert lines[-1].startswith("textfiles: a worker process was killed")
    assert "--workers" in lines[-1]
    assert ".out.partial" in lines[-1]
    assert "Traceback" not in said


def test_ctrl_c_says_what_stays(big: Path, tmp_path: Path) -> None:
    process = start("--input", big, "--out", "out", "--tokenizer", "byte", "--workers", "2", cwd=tmp_path)
    wait_for_parts(tmp_path / ".out.partial" / "parts", 1, process)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.startswith("textfiles: interrupted; ")
    assert "finished parts" in said
    assert "Traceback" not in said


def keep_parts(monkeypatch: pytest.MonkeyPatch, options: Options, count: int) -> set[str]:
    """Run until `count` parts are made, then fail as if killed -> their names."""
    made: list[Part] = []

    def fail_later(task: object) -> Part:
        if len(made) == count:
            raise OSError("No space left on device")
        made.append(encode_unit(task))  # type: ignore[arg-type]
        return made[-1]

    with monkeypatch.context() as patched:
        patched.setattr(encode, "encode_unit", fail_later)
        with pytest.raises(InputError, match=f"No space left on device; {count} finished parts .* stay in "):
            prepare(options)
    return {part.path.name for part in made}


def parts_reused(options: Options, capsys: pytest.CaptureFixture[str]) -> int:
    """Run it -> how many parts of an earlier run it took."""
    capsys.readouterr()
    prepare(options)
    said = capsys.readouterr().err
    return int(said.split(" of ")[0].removeprefix("textfiles: ")) if "earlier run" in said else 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [("nothing", 5), ("shard_tokens", 5), ("a file", 4), ("another file", 5), ("tokenizer", 0), ("text_column", 0)],
)
def test_only_parts_of_the_same_input_and_options_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str, expected: int
) -> None:
    folder = sample_files(tmp_path / "input")
    options = {"input": (str(folder),), "out": tmp_path / "out", "tokenizer": "byte"}
    keep_parts(monkeypatch, Options(**options), 5)  # type: ignore[arg-type]
    match change:
        case "a file":
            text = (folder / "02.jsonl").read_text()
            (folder / "02.jsonl").write_text(text.replace("Story", "Start"))
        case "another file":
            shutil.copy(folder / "11.jsonl", folder / "00a.jsonl")
        case "tokenizer":
            options["tokenizer"] = "char"
        case "text_column":
            for path in folder.iterdir():
                path.write_text(path.read_text().replace('"text"', '"body"'))
            options["text_column"] = "body"
        case "shard_tokens":
            options["shard_tokens"] = 100_000
    assert parts_reused(Options(**options), capsys) == expected  # type: ignore[arg-type]
    fresh = Options(**options | {"out": tmp_path / "fresh"})  # type: ignore[arg-type]
    assert parts_reused(fresh, capsys) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert names(tmp_path) == ["fresh", "input", "out"]


def test_a_full_disk_while_packing_frees_the_shards_and_keeps_the_parts(tmp_path: Path) -> None:
    stories = sample_files(tmp_path / "input")
    arguments = ["--input", str(stories), "--out", "out", "--tokenizer", "byte"]
    command = [sys.executable, "-B", "-c", WITH_SMALL_FILES, "100000", "-B", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "File too large; 13 finished parts" in done.stderr
    assert names(tmp_path / ".out.partial") == ["parts"]
    process = start(*arguments, cwd=tmp_path)
    assert "parts were there" in process.communicate()[1]
    assert names(tmp_path) == ["input", "out"]


@pytest.mark.long(reason="test_fineweb.py has it in `make test`, of the same unfinished.py")
def test_two_at_once_into_the_same_place(big: Path, tmp_path: Path) -> None:
    first = start("--input", big, "--out", "out", "--tokenizer", "byte", cwd=tmp_path)
    wait_for_parts(tmp_path / ".out.partial" / "parts", 1, first)
    second = start("--input", big, "--out", "out", "--tokenizer", "byte", cwd=tmp_path)
    said = second.communicate()[1]
    assert first.communicate() and first.returncode == 0
    assert second.returncode == 0 or "another process is making it right now" in said
    assert names(tmp_path) == ["out"]


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sample_files(tmp_path / "input")

    def change_then_encode(task: object) -> Part:
        with (folder / "07.jsonl").open("a") as file:
            file.write('{"text": "more"}\n')
        return encode_unit(task)  # type: ignore[arg-type]

    monkeypatch.setattr(encode, "encode_unit", change_then_encode)
    with pytest.raises(InputError, match="changed while it was read"):
        prepare(Options((str(folder),), tmp_path / "out", "byte"))
    assert not (tmp_path / "out").exists()


def test_progress_is_in_plain_lines(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "REPORT_SECONDS", 0.0)
    prepare(Options((str(stories),), tmp_path / "out", "byte"))
    lines = capsys.readouterr().err.splitlines()
    rates = r"[\d.]+ of [\d.]+ MB  [\d.]+ MB/s  [\d,]+ documents"
    assert sum(bool(re.fullmatch(rf"survey  {rates}  \d+ s left", line)) for line in lines) == 12
    assert (
        sum(bool(re.fullmatch(rf"encode  {rates}  [\d,]+ tokens  [\d,]+ tokens/s  \d+ s left", line)) for line in lines)
        == 13
    )
