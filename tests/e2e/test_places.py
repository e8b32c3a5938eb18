"""An output under a place that cannot exist is refused in one line that names the flag, before any work."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import bpe, fineweb, hellaswag, textfiles
from launch import sweep
from model import hf_bridge, lens
from tests.helpers.runs import called
from train import curves, main, validate

# Nothing else that these name is there, so that a line about the output shows that the output was looked at first.
COMMANDS: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {
    "textfiles": (textfiles.main, ["--input", "nowhere.txt", "--tokenizer", "byte", "--out"]),
    "bpe": (bpe.main, ["--input", "nowhere.txt", "--vocab-size", "300", "--out"]),
    "hellaswag": (hellaswag.main, ["--input", "nowhere.jsonl", "--accept-other", "--out"]),
    "fineweb": (fineweb.main, ["--source", "local", "--data-files", "no.parquet", "--tokenizer", "byte", "--out"]),
    "fineweb --dry-run": (fineweb.main, ["--source", "local", "--data-files", "no.parquet", "--dry-run", "--out"]),
    "hf_bridge": (hf_bridge.main, ["export", "nowhere", "--out"]),
    "lens": (lens.main, ["attention", "nowhere", "--prompt", "a", "--layer", "0", "--head", "0", "--out"]),
    "curves": (curves.main, ["nowhere", "--out"]),
    "validate": (validate.main, ["nowhere", "--out"]),
    "sweep": (sweep.main, ["lr", "--run-dir"]),
}
PLACES = ["file", "file/in/it", "link", "link/in/it", "loop/in/it", "device/in/it", "n" * 300 + "/in/it"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_impossible_place_is_refused_first(command: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere/at/all")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "device").symlink_to("/dev/null")
    command_main, args = COMMANDS[command]
    out = tmp_path / place / "x.png"
    done = called(command_main, *args, str(out))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert str(tmp_path / place.partition("/")[0]) in done.stderr
    refused = f": {args[-1]}: {tmp_path / place.partition('/')[0]} is no directory; choose another place\n"
    assert done.stderr.endswith((refused, "remove that link to itself\n", "give a shorter name\n"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_only_an_attempt_shows_to_be_impossible_is_one_line_too(command: str) -> None:
    command_main, args = COMMANDS[command]
    done = called(command_main, *args, "/proc/nowhere/x.png")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_a_run_directory_too(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = called(
        main.main, "shakespeare-char-cpu", "--data.dir", str(tiny_data), "--run-dir", str(tmp_path / "file/x")
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"{tmp_path / 'file/x'}: cannot be written" in done.stderr and "choose another place" in done.stderr
