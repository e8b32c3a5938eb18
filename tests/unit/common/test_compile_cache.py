"""The folder whose code torch runs belongs to this user alone."""

import os
import tempfile
from pathlib import Path

import pytest

from common.compile_cache import VARIABLE, take_compile_cache
from common.errors import InputError


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_cache_is_this_users_and_restarts_find_it_again(temporary: Path) -> None:
    environs: list[dict[str, str]] = [{}, {}]
    for environ in environs:
        take_compile_cache(environ)
    (folder,) = temporary.iterdir()
    assert environs == [{VARIABLE: str(folder)}] * 2
    assert folder.stat().st_mode & 0o777 == 0o700


def test_what_the_user_chose_stays(temporary: Path) -> None:
    environ = {VARIABLE: "/shared/mine"}
    take_compile_cache(environ)
    assert environ == {VARIABLE: "/shared/mine"} and not list(temporary.iterdir())


@pytest.mark.parametrize("planted", ["a folder that others can write", "another user's folder", "a link", "a file"])
def test_a_cache_that_others_can_fill_is_refused_in_one_line(
    temporary: Path, planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = temporary / f"gpt-ladder-compiled-{os.getuid()}"
    if planted == "a link":
        (temporary / "elsewhere").mkdir()
        folder.symlink_to(temporary / "elsewhere")
    elif planted == "a file":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o777 if planted == "a folder that others can write" else 0o700)
    if planted == "another user's folder":
        own = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: own + 1)
        folder.rename(temporary / f"gpt-ladder-compiled-{own + 1}")
    environ: dict[str, str] = {}
    with pytest.raises(InputError) as raised:
        take_compile_cache(environ)
    assert environ == {} and "\n" not in str(raised.value)
    if planted != "a file":  # mkdir itself refuses that
        assert str(raised.value).endswith(f"set {VARIABLE} to a folder of yours")
