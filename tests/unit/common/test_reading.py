"""Files of any kind and content are opened, or refused in one line, without waiting."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import InputError
from common.files import move_aside
from common.reading import NATURAL, child, is_there, misfit, open_regular, parse_json, read_own_json, read_regular


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a FIFO"),
        (Path.mkdir, "a directory"),
        (make_socket, "a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (lambda path: path.symlink_to("nowhere"), "check the path"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (lambda path: None, "check the path"),
    ],
    ids=["fifo", "directory", "socket", "device", "link to nowhere", "link to itself", "absent"],
)
def test_only_regular_files_are_opened(make: Callable[[Path], None], kind: str, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    make(path)
    with pytest.raises(InputError, match=kind) as refusal:
        open_regular(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_outside_the_folder_is_refused_however_it_is_reached(tmp_path: Path) -> None:
    folder, outside = tmp_path / "data", tmp_path / "data2"
    folder.mkdir()
    outside.mkdir()
    (outside / "a.bin").write_bytes(b"secret")
    (folder / "a.bin").symlink_to("../data2/a.bin")
    (folder / "sub").symlink_to(outside)
    for path in (folder / "a.bin", folder / "sub" / "a.bin", folder / ".." / "data2" / "a.bin"):
        with pytest.raises(InputError, match="a link out of"):
            read_regular(path, inside=folder)
    (folder / "b.bin").write_bytes(b"ours")
    (folder / "c.bin").symlink_to("b.bin")
    (tmp_path / "named").symlink_to(folder)
    assert read_regular(tmp_path / "named" / "c.bin", inside=tmp_path / "named") == b"ours"


@pytest.mark.parametrize("name", ["", ".", "..", "../x.bin", "/etc/passwd", "sub/x.bin", "x\0.bin", "a\\b", 5, None])
def test_names_that_leave_their_folder_are_refused(name: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a name inside"):
        child(tmp_path, name)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 10**6, b"1" * 5000, b'{"a": 1}{'])
def test_whatever_is_no_json_is_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(content)


FORM = {"state": frozenset({"running", "done"}), "step": NATURAL, "reason": (str, None), "part": {"rate": float}}
FITTING = {"state": "done", "step": 3, "reason": None, "part": {"rate": 1}}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("state", "odd"),
        ("state", ["done"]),
        ("step", -1),
        ("step", True),
        ("step", 1.0),
        ("step", "1"),
        ("step", None),
        ("reason", 5),
        ("part", None),
        ("part", {}),
        ("part", {"rate": "1"}),
        ("part", {"rate": True}),
    ],
)
def test_a_value_of_another_form_is_named(key: str, value: object) -> None:
    assert misfit(FITTING | {"free": 1}, FORM) is None
    assert misfit(FITTING | {key: value}, FORM) is not None
    assert "no key" in (misfit({name: FITTING[name] for name in FITTING if name != key}, FORM) or "")


def test_what_is_moved_aside_never_replaces_anything(tmp_path: Path) -> None:
    link = tmp_path / "step_00000020"
    for number in (1, 2):
        link.symlink_to("nowhere")
        assert move_aside(link) == tmp_path / f"step_00000020.aside_{number}"
        assert not is_there(link)
    assert read_own_json(link) is None
