"""bpe.py as a command: the same bytes in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.bpe import Options, prepare

pytest.importorskip("tokenizers")
ROOT = Path(__file__).resolve().parents[2]


def test_another_process_folder_and_hash_seed_make_the_same_bytes(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.bpe.TIMED_SECONDS", 0.001)
    (tmp_path / "text.txt").write_bytes((shared_data / "tinyshakespeare.txt").read_bytes()[:100_000])
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "data_prep" / "bpe.py"), "--input", "text.txt"]
    command += ["--vocab-size", "2000", "--out", "one/small"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    prepare(Options((str(tmp_path / "text.txt"),), 2_000, tmp_path / "two" / "small"))
    for name in ("codec.json", "ranks.tiktoken", "training.json"):
        assert (tmp_path / "one/small" / name).read_bytes() == (tmp_path / "two/small" / name).read_bytes()
