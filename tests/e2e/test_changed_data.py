"""Data that has changed since it was prepared: found before the first step, on one line, whatever rank meets it."""

import hashlib
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from data_prep import shard_check
from data_prep.manifest import read_manifest
from data_prep.tokenizer import CharTokenizer, load_tokenizer
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import called, rows, status, tiny_config, tiny_flags, torchrun
from train import validate
from train.config import Config
from train.main import main, run
from train.processes.group import ProcessGroup


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def overwrite(path: Path, *, offset: int, content: bytes) -> None:
    """Replace bytes of a file, and set its times back as far as one can."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def write_ids(path: Path, ids: list[int], *, first: int = 0) -> None:
    overwrite(path, offset=1024 + 2 * first, content=np.array(ids, dtype="<u2").tobytes())


@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.bin", "train_000001.idx"])
def test_a_run_does_not_continue_on_data_that_has_changed(data: Path, tmp_path: Path, name: str) -> None:
    flags = [*tiny_flags(data, tmp_path / "run"), "--train.steps", "20"]
    assert called(main, *flags).returncode == 0
    path, times = data / name, (data / name).stat()
    if path.suffix == ".bin":
        write_ids(path, [1] * ((path.stat().st_size - 1024) // 2))
    else:
        path.write_bytes(b"\1" * 8)
    assert name.endswith("idx") or path.stat().st_size == times.st_size
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000020")

    refused = called(main, *flags)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and refused.stdout == ""
    assert refused.stderr.startswith(f"train: {path}: sha256 differs from the manifest's; ")
    assert "--data.no-verify" in refused.stderr
    assert status(tmp_path / "run")["state"] == "failed" and name in status(tmp_path / "run")["reason"]
    done = called(main, *flags, "--data.no-verify")
    assert done.returncode == 0 and "WARNING: not held to its hashes (--data.no-verify)" in done.stdout


def test_another_tokenizer_is_changed_data_too(data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(data)
    assert isinstance(tokenizer, CharTokenizer)
    for alphabet, flag, fault in (
        (f"{tokenizer.itos[:-1]}\u00ff", "--data.verify", "its tokenizer is not the one in its manifest"),
        (tokenizer.itos[:-1], "--data.no-verify", f"its tokenizer has {tokenizer.vocab_size - 1} ids, its manifest"),
    ):
        shutil.rmtree(data / "tokenizer")
        CharTokenizer(alphabet).save(data)
        refused = called(main, *tiny_flags(data, tmp_path / "run"), flag)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert refused.stderr.startswith(f"train: {data}: {fault}")


def error_of(group: ProcessGroup, config: Config) -> str:
    try:
        run(config, group)
    except InputError as error:
        return str(error)
    return "trained"


def test_every_rank_raises_the_same_line(data: Path, tmp_path: Path) -> None:
    write_ids(data / "train_000001.bin", [2, 1, 2, 1])
    lines = run_on_ranks(2, error_of, tiny_config(data, tmp_path / "run", steps=5))
    assert lines[0] == lines[1] and f"{data}/train_000001.bin: sha256 differs" in lines[0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_id_outside_the_vocabulary_ends_all_ranks_with_one_line(data: Path, tmp_path: Path, split: str) -> None:
    """The padded vocabulary of the model would take the id 40: the data's own has fewer."""
    shard, vocab_size = data / f"{split}_000000.bin", read_manifest(data).vocab_size
    first = 40  # in the second batch of validation, which is rank 1's
    write_ids(shard, [40] * 300, first=first * 5)
    config = tiny_config(data, tmp_path / "run", steps=50)
    config = replace(config, data=replace(config.data, verify=False), validate=replace(config.validate, every=25))
    assert vocab_size <= 40 < config.model.vocab_multiple
    lines = run_on_ranks(2, error_of, config)
    assert lines[0] == lines[1], lines
    assert f"{shard}: token " in lines[0] and f" is id 40, outside the vocabulary of {vocab_size}; " in lines[0]
    assert status(tmp_path / "run")["state"] == "failed" and "outside" in status(tmp_path / "run")["reason"]
    assert all(row["step"] <= 50 for row in rows(tmp_path / "run"))


def test_one_process_names_the_token_too(data: Path, tmp_path: Path) -> None:
    shard = data / "train_000000.bin"
    write_ids(shard, [65535], first=4567)
    refused = called(main, *tiny_flags(data, tmp_path / "run"), "--train.steps", "60", "--data.no-verify")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith(f"train: {shard}: token 4567 is id 65535, outside the vocabulary of ")
    refused = called(main, *tiny_flags(data, tmp_path / "run"), "--train.steps", "60")
    assert f"{shard}: sha256 differs from the manifest's; token 4567 is id 65535" in refused.stderr


def test_under_torchrun_the_only_line_of_ours_is_printed_once(data: Path, tmp_path: Path) -> None:
    write_ids(data / "train_000000.bin", [65535] * 3000)
    flags = [*tiny_flags(data, tmp_path / "run"), "--data.no-verify"]
    process = torchrun(2, *flags)
    output, _ = process.communicate(timeout=120)
    ours = [line for line in output.splitlines() if line.startswith("train: ")]
    assert process.returncode != 0 and len(ours) == 1 and "outside the vocabulary" in ours[0], output
    assert "IndexError" not in output and "gloo" not in output and "train/loop.py" not in output


def test_validate_holds_its_split_to_the_manifest(data: Path, tmp_path: Path) -> None:
    assert called(main, *tiny_flags(data, tmp_path / "run"), "--train.steps", "5").returncode == 0
    write_ids(data / "val_000000.bin", [1, 2, 1, 2])
    refused = called(validate.main, str(tmp_path / "run"))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"validate: {data}/val_000000.bin: sha256 differs" in refused.stderr and "--no-verify" in refused.stderr
    assert called(validate.main, str(tmp_path / "run"), "--no-verify").returncode == 0
    write_ids(data / "val_000000.bin", [65535], first=99)
    refused = called(validate.main, str(tmp_path / "run"), "--no-verify", "--tokens", "500")
    assert refused.returncode == 2 and "token 99 is id 65535" in refused.stderr


def check_slowly(group: ProcessGroup, config: Config) -> str:
    """Train; a block takes rank 0 a tenth of a second longer."""

    def slowly(*args: object, **kwargs: object) -> None:
        time.sleep(0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_check, "BLOCK_BYTES", 1024)
        patch.setattr(shard_check, "outside_vocabulary", slowly)
        return error_of(group, config)


def test_reading_that_goes_on_is_no_hang(data: Path, tmp_path: Path) -> None:
    """It takes 4 s here, while the watchdog allows 1 s without progress."""
    config = tiny_config(data, tmp_path / "run", steps=3)
    config = replace(config, parallel=replace(config.parallel, init_timeout_seconds=1.5))
    assert run_on_ranks(2, check_slowly, config) == ["trained", "trained"]


@pytest.fixture(scope="module")
def large_data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 200 sparse shards of 1 GB, which take minutes to read, beside those of the tiny data."""
    data = Path(shutil.copytree(tiny_data, tmp_path_factory.mktemp("large") / "data"))
    raw = json.loads((data / "manifest.json").read_text())
    train = raw["splits"]["train"]
    num_tokens = (2**30 - 1024) // 2
    header = np.fromfile(data / train["shards"][-1]["file"], dtype="<i4", count=256)
    header[2], header[5] = num_tokens, 0
    first = len(train["shards"])
    for number in range(first, first + 200):
        path = data / f"train_{number:06d}.bin"
        path.write_bytes(header.tobytes())
        os.truncate(path, 2**30)
        path.with_suffix(".idx").touch()
        stated = {"file": path.name, "tokens": num_tokens, "documents": 0, "bytes": 2**30}
        train["shards"].append(train["shards"][-1] | stated | {"idx_sha256": hashlib.sha256().hexdigest()})
        train["tokens"] += num_tokens
    (data / "manifest.json").write_text(json.dumps(raw))
    return data


@pytest.mark.parametrize(("number", "world"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_stop_while_the_data_is_read_is_prompt(
    large_data: Path, tmp_path: Path, number: signal.Signals, world: int
) -> None:
    process = torchrun(world, *tiny_flags(large_data, tmp_path / "run"))
    assert process.stdout is not None
    while "to be held to the manifest's hashes" not in (line := process.stdout.readline()):
        assert line, "it has ended"
    began = time.monotonic()
    process.send_signal(number)
    while status(tmp_path / "run")["state"] == "running":
        assert time.monotonic() - began < 20
        time.sleep(0.05)
    assert time.monotonic() - began < 3
    output, _ = process.communicate(timeout=30)
    assert "stopped at step 0, while the data was read" in output and "train/main.py" not in output
    assert status(tmp_path / "run") == {"state": "stopped", "step": 0, "reason": number.name, "attempt": 1}
