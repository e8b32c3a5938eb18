"""Which errors become one line and which keep their traceback, and files that are whole or absent."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import InputError, one_line_errors, reading_from, writing_to
from common.files import sha256_of_file, write_atomically, write_blocks_atomically, write_json_atomically
from common.former_flags import refuse_former_flags
from common.tables import markdown, put_into


def refuse() -> None:
    raise InputError("--width 0 must be at least 1")


def read_what_the_user_named() -> None:
    with reading_from(Path("gone.txt")):
        Path("gone.txt").read_bytes()


def read_by_mistake() -> None:
    Path("typo.txt").read_bytes()


def divide_by_zero() -> None:
    raise ZeroDivisionError


def interrupt() -> None:
    raise KeyboardInterrupt


UNREADABLE = "gone.txt: cannot be read ([Errno 2] No such file or directory: 'gone.txt'); check the path"


@pytest.mark.parametrize(
    ("body", "environment", "status", "line", "has_traceback"),
    [
        (refuse, {}, 2, "prog: --width 0 must be at least 1\n", False),
        (refuse, {"RANK": "1"}, 2, "", False),
        (refuse, {"GPT_LADDER_TRACEBACK": "1"}, 2, "prog: --width 0 must be at least 1\n", True),
        (refuse, {"GPT_LADDER_TRACEBACK": "0"}, 2, "prog: --width 0 must be at least 1\n", False),
        (read_what_the_user_named, {}, 2, f"prog: {UNREADABLE}\n", False),
        (interrupt, {}, 130, "prog: interrupted\n", False),
    ],
)
def test_an_input_error_is_one_line(
    body: Callable[[], None],
    environment: dict[str, str],
    status: int,
    line: str,
    has_traceback: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "GPT_LADDER_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as leaving, one_line_errors("prog"):
        body()
    printed = capsys.readouterr()
    assert (leaving.value.code, printed.out) == (status, "")
    assert printed.err.endswith(line)
    if has_traceback:
        assert printed.err.startswith("Traceback") and f"in {body.__name__}" in printed.err
    else:
        assert printed.err == line


@pytest.mark.parametrize("body", [read_by_mistake, divide_by_zero])
def test_any_other_error_leaves_the_command_with_its_traceback(body: Callable[[], None], tmp_path: Path) -> None:
    """What leaves main() is printed by the interpreter with a traceback, and the exit status is 1."""
    with pytest.raises((OSError, ZeroDivisionError)) as caught, one_line_errors("prog"):
        body()
    assert not isinstance(caught.value, InputError)
    assert caught.traceback[-1].name in (body.__name__, "read_bytes", "open")


@pytest.mark.parametrize(
    ("number", "wrapper", "remedy"),
    [
        (errno.ENOSPC, writing_to, "make room there, then give the same command again"),
        (errno.EDQUOT, writing_to, "make room there, then give the same command again"),
        (errno.EACCES, writing_to, "fix that, then give the same command again"),
        (errno.EACCES, reading_from, "change its permissions"),
        (errno.EISDIR, reading_from, "give a file, not a directory"),
        (errno.ENOTDIR, reading_from, "give a directory, not a file"),
        (errno.EIO, reading_from, "check the disk, then give the same command again"),
    ],
)
def test_a_wrapped_os_error_names_the_path_and_the_remedy(
    number: int, wrapper: Callable[..., object], remedy: str
) -> None:
    with pytest.raises(InputError) as caught, wrapper(Path("/data/x")):  # type: ignore[attr-defined]
        raise OSError(number, os.strerror(number))
    verb = "written" if wrapper is writing_to else "read"
    assert str(caught.value) == f"/data/x: cannot be {verb} ([Errno {number}] {os.strerror(number)}); {remedy}"


def test_other_errors_pass_through_the_wrappers() -> None:
    for wrapper in (reading_from, writing_to):
        with pytest.raises(KeyError), wrapper(Path("x")):
            raise KeyError("x")


def test_atomic_writes_replace_the_whole_file_and_leave_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert write_blocks_atomically(path, [b"ab", memoryview(b"c")]) == hashlib.sha256(b"abc").hexdigest()
    assert path.read_bytes() == b"abc" and sha256_of_file(path) == hashlib.sha256(b"abc").hexdigest()
    write_atomically(path, "\u00e9\r\n")
    assert path.read_bytes() == b"\xc3\xa9\r\n"
    write_json_atomically(path, {"a": [1, "\u00e9"]})
    assert path.read_bytes().isascii() and json.loads(path.read_text()) == {"a": [1, "\u00e9"]}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_renamed_flag_is_refused_with_its_new_name() -> None:
    refuse_former_flags(["--model.mlp-width", "4", "leave-out"])
    expected = "--data.leave-out is now called --data.skip-sequences; --window is now called --sequence"
    with pytest.raises(InputError, match=expected):
        refuse_former_flags(["--data.leave_out=3", "--window", "7"])


def test_a_table_is_padded_and_put_between_its_marks(tmp_path: Path) -> None:
    table = markdown([("run", "loss"), ("longer", "1.5")], right_from=1)
    assert table == "| run    | loss |\n|--------|-----:|\n| longer |  1.5 |\n"
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- t -->\nold\n<!-- end -->\n<!-- u -->\nkept\n<!-- end -->\n")
    put_into(page, "t", None)
    put_into(page, "t", table)
    assert page.read_text() == f"before\n<!-- t -->\n{table}<!-- end -->\n<!-- u -->\nkept\n<!-- end -->\n"
    for path in (page, tmp_path / "gone.md"):
        with pytest.raises(InputError, match=f"{path}: --into needs one <!-- v --> with an <!-- end --> after it"):
            put_into(path, "v", table)
