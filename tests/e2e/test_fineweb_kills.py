"""fineweb.py and textfiles.py with worker processes: the same bytes for any number of them, and after any kill.

Both commands share the workers, the parts and the hidden directory, so the quick tests use the one that starts faster.
"""

import contextlib
import inspect
import os
import random
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from pydoc_data import topics

import pytest
import tiktoken

from data_prep import fineweb_plan
from data_prep.fineweb import main as fineweb_main
from data_prep.manifest import read_manifest
from data_prep.pipeline import sources
from data_prep.textfiles import Options, prepare
from data_prep.tokenizer import load_tokenizer
from data_prep.verify import faults_of
from tests.helpers.data_dirs import EOT_ID, contents, decoded, names, state, tokens, write_stories
from tests.helpers.pages import make_pages, write_pages, write_ranks
from tests.helpers.runs import ROOT, called

EOT = "<|endoftext|>"
# Start a command under a limit on the size of any file that it writes, so that the disk seems full.
WITH_SMALL_FILES = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
Process = subprocess.Popen[str]


def command(script: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "data_prep" / script), *map(str, arguments)]


def start(script: str, *arguments: str | Path, cwd: Path) -> Process:
    """Start a command in a process group of its own, in which Ctrl-C works."""
    return subprocess.Popen(
        command(script, *arguments),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background processes ignore it
    )


def workers_of(process: Process) -> list[int]:
    """Return the ids of the process's spawned workers."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [int(row[0]) for row in rows if int(row[1]) == process.pid and "spawn_main" in row[2]]


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.02)


def wait_for(folder: Path, pattern: str, count: int, process: Process) -> None:
    """Wait until the folder has that many files, or the process has ended."""
    while process.poll() is None and len(list(folder.glob(pattern))) < count:
        time.sleep(0.002)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("stories") / "input")


@pytest.fixture(scope="module")
def finished(stories: Path) -> Path:
    """The stories' data set, made in one process."""
    out = stories.parent / "finished"
    prepare(Options((str(stories),), out, "byte", shard_tokens=5_000, workers=1))
    return out


@pytest.fixture(scope="module")
def ranks(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_ranks(tmp_path_factory.mktemp("ranks") / "first.tiktoken", shared_data / "gpt2.tiktoken")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, ranks: str) -> tuple[Path, Path]:
    """Files of pages, enough to be killed in the middle of, and their data set."""
    folder = tmp_path_factory.mktemp("pages")
    for number in range(12):
        long_pages = ["word " * 9_000 + f"{number} {index}" for index in range(10)]
        write_pages(folder / "input" / f"{number}.parquet", [*make_pages(50, number), *long_pages])
    done = called(fineweb_main, *fineweb_flags(folder / "input", folder / "out", ranks), "--workers", "1")
    assert done.returncode == 0, done.stderr
    return folder / "input", folder / "out"


def fineweb_flags(folder: Path, out: Path, ranks: str) -> list[str]:
    inputs = ["--source", "local", "--data-files", str(folder), "--tokenizer", ranks]
    return [*inputs, "--out", str(out), "--shard-tokens", "5000", "--val-tokens", "2000"]


# Any number of processes


def test_textfiles_writes_the_same_bytes_with_two_workers(
    shared_data: Path, stories: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(Options((str(stories),), tmp_path / "out", "byte", shard_tokens=5_000, workers=2))
    assert contents(tmp_path / "out") == contents(finished)
    path = shared_data / "tinystories_2mb.txt"
    monkeypatch.setattr(sources, "UNIT_BYTES", 2**18)
    data = tmp_path / "gpt2"
    manifest = prepare(Options((str(path),), data, "gpt2", split_documents_on=EOT, shard_tokens=300_000, workers=2))
    oracle = tiktoken.get_encoding("gpt2").encode_ordinary
    documents = path.read_bytes().decode().split(EOT)
    num_train = manifest.splits["train"].documents
    for split, texts in (("train", documents[:num_train]), ("val", documents[num_train:])):
        assert tokens(data, split) == [index for text in texts for index in (EOT_ID, *oracle(text))]
    assert names(tmp_path) == ["gpt2", "out"]


def test_fineweb_writes_the_same_bytes_with_two_workers(
    pages: tuple[Path, Path], ranks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fineweb_plan, "UNIT_BYTES", 10_000)
    flags = ("--workers", "2", "--backend", "gigatoken")
    done = called(fineweb_main, *fineweb_flags(pages[0], tmp_path / "out", ranks), *flags)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(pages[1])


@pytest.mark.long(reason="five interpreters; test_fineweb.py runs tasks one after the other")
def test_tasks_at_the_same_time(pages: tuple[Path, Path], ranks: str, tmp_path: Path) -> None:
    """Run two tasks, and a third that repeats the first one's share."""
    flags = [*fineweb_flags(pages[0], tmp_path / "out", ranks), "--workers", "1", "--stage"]
    task = [*flags, "tokenize", "--num-tasks", "2", "--task-index"]
    for commands in ([[*task, index] for index in "010"], [[*flags, "pack"]]):
        for process in [start("fineweb.py", *arguments, cwd=tmp_path) for arguments in commands]:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    assert contents(tmp_path / "out") == contents(pages[1])


# Kills


def test_killed_while_encoding_and_while_packing_the_same_command_finishes(
    stories: Path, finished: Path, tmp_path: Path
) -> None:
    flags = ("--input", stories, "--out", "out", "--tokenizer", "byte", "--shard-tokens", "5000", "--workers", "2")
    for pattern in ("parts/*.json", "train_000000.bin"):
        process = start("textfiles.py", *flags, cwd=tmp_path)
        wait_for(tmp_path / ".out.partial", pattern, 1, process)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert list((tmp_path / ".out.partial").glob("parts/*.part"))
        assert not (tmp_path / "out").exists()
    done = subprocess.run(command("textfiles.py", *flags), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "13 of 13 parts were there from an earlier run" in done.stderr
    assert contents(tmp_path / "out") == contents(finished)
    assert names(tmp_path) == ["out"]


def test_the_end_of_the_parent_of_a_worker_and_by_ctrl_c(tmp_path: Path) -> None:
    big = write_stories(tmp_path / "input", 30, 3000)
    for victim in ("parent", "worker", "everyone"):
        flags = ("--input", big, "--out", victim, "--tokenizer", "byte", "--workers", "2")
        process = start("textfiles.py", *flags, cwd=tmp_path)
        wait_for(tmp_path / f".{victim}.partial" / "parts", "*.json", 1, process)
        workers = workers_of(process)
        assert len(workers) == 2
        if victim == "parent":
            process.kill()
        elif victim == "worker":
            os.kill(workers[0], signal.SIGKILL)
        else:
            os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        wait_until_gone(workers)
        assert "Traceback" not in errors
        if victim != "parent":
            last_line = errors.splitlines()[-1]
            message = "a worker process was killed" if victim == "worker" else "interrupted; "
            assert last_line.startswith(f"textfiles: {message}")
            assert "finished parts" in last_line and f".{victim}.partial" in last_line
            assert process.returncode == (2 if victim == "worker" else 130)


def run_and_kill_at_random(process_flags: list[str], rng: random.Random, out: Path, most_kills: int) -> int:
    """Start fineweb.py again and again, killing the parent, a worker or all, until it is done. Return the kills."""
    kills = 0
    parts = out.with_name(f".{out.name}.partial") / "parts"
    while True:
        process = start("fineweb.py", *process_flags, "--workers", str(rng.choice([1, 2, 3])), cwd=out.parent)
        # Half of the kills come while parts are made or packed, the others at any time.
        num_parts = rng.choice([0, rng.randrange(1, 9)])
        deadline = time.monotonic() + rng.uniform(0.2, 3.0)
        if kills < most_kills and num_parts:
            wait_for(parts, "*.json", len(list(parts.glob("*.json"))) + num_parts, process)
        while process.poll() is None and time.monotonic() < deadline and not num_parts:
            time.sleep(0.01)
        workers = workers_of(process)
        if process.poll() is None and kills < most_kills:
            victim = rng.choice(["parent", "worker", "all"])
            if victim == "worker" and workers:
                os.kill(rng.choice(workers), signal.SIGKILL)
            elif victim == "all":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            kills += 1
        _, errors = process.communicate(timeout=120)
        wait_until_gone(workers)
        if process.returncode == 0:
            return kills
        assert process.returncode in (2, -signal.SIGKILL), errors
        assert "Traceback" not in errors


TASK = ["--stage", "tokenize", "--num-tasks", "2", "--task-index"]
STAGES: list[list[list[str]]] = [[[]], [["--backend", "gigatoken"]], [[*TASK, "0"], [*TASK, "1"], ["--stage", "pack"]]]


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(0, marks=pytest.mark.long(reason="several starts; textfiles.py is killed in `make test`")),
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10)),
    ],
)
def test_killed_at_random_the_same_command_ends_with_the_same_bytes(
    pages: tuple[Path, Path], ranks: str, tmp_path: Path, seed: int
) -> None:
    out = tmp_path / "out"
    rng = random.Random(seed)
    kills = 0
    for flags in STAGES[seed % 3]:
        process_flags = [*fineweb_flags(pages[0], out, ranks), *flags]
        kills += run_and_kill_at_random(process_flags, rng, out, most_kills=1 if seed % 3 == 2 else 2)
    assert kills > 0
    assert contents(out) == contents(pages[1])
    assert faults_of(out, read_manifest(out), load_tokenizer(out)) == []
    assert names(tmp_path) == ["out"]


# A full disk, a poor console, and the corpus that depends on the Python installation


def test_a_full_disk_keeps_finished_data_and_parts(stories: Path, finished: Path, tmp_path: Path) -> None:
    flags = ("--input", stories, "--out", "out", "--tokenizer", "byte", "--overwrite")
    prepare(Options((str(stories / "00.jsonl"),), tmp_path / "out", "byte"))
    earlier = state(tmp_path / "out")
    for most_bytes, error, left in (
        ("2000", "textfiles: [Errno 27] File too large: ", ["out"]),  # while encoding
        ("100000", "; 13 finished parts", [".out.partial", "out"]),  # while packing
    ):
        limited = [sys.executable, "-B", "-c", WITH_SMALL_FILES, most_bytes, "-B"]
        arguments = [*limited, *command("textfiles.py", *flags)[1:]]
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and error in done.stderr and done.stderr.count("\n") == 1
        assert state(tmp_path / "out") == earlier
        assert names(tmp_path) == left
    assert names(tmp_path / ".out.partial") == ["parts"]
    done = subprocess.run(command("textfiles.py", *flags), cwd=tmp_path, capture_output=True, text=True)
    assert "13 of 13 parts were there" in done.stderr
    assert decoded(tmp_path / "out") == decoded(finished)
    assert names(tmp_path) == ["out"]


def test_a_console_that_cannot_show_a_character_gets_its_escape(tmp_path: Path) -> None:
    source = tmp_path / "\u00e9.txt"
    source.write_text("caf\u00e9 \U0001f600 " * 9, encoding="utf-8")
    out = tmp_path / "\u00e9"
    env = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for arguments in (
        command("textfiles.py", "--input", source, "--tokenizer", "byte", "--out", out),
        command("verify.py", out),
    ):
        done = subprocess.run(arguments, env=env, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert "\\xe9" in done.stdout or "\\udcc3\\udca9" in done.stdout  # in the text, or in a file's name


@pytest.mark.long(reason="all of CPython's documentation is collected twice")
def test_python_docs_are_large_and_the_same_in_every_process(tmp_path: Path) -> None:
    flags = ("--input", "python-docs", "--tokenizer", "char", "--out")
    running = [
        subprocess.Popen(command("textfiles.py", *flags, tmp_path / seed), env=os.environ | {"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    assert [process.wait() for process in running] == [0, 0]
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    text = decoded(tmp_path / "1").decode("utf-8")
    assert len(text) > 1_000_000
    assert len(tokens(tmp_path / "1", "train")) == int(len(text) * 0.9)
    assert topics.topics["assert"].strip() in text
    assert str(inspect.getdoc(ArgumentParser)) in text
