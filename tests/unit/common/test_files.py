"""Files that are whole or absent, as they are read again."""

from pathlib import Path

import pytest

from common.errors import InputError
from common.files import write_json_atomically
from common.reading import read_own_json


def test_an_object_comes_back_and_an_absent_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert read_own_json(path) is None
    write_json_atomically(path, {"a": [1, None], "\u00fc": "\u00df"})
    assert read_own_json(path) == {"a": [1, None], "\u00fc": "\u00df"}
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b'"\xff"', b"[1]", b"null", b"7"])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "status.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged") as error:
        read_own_json(path)
    assert str(error.value).startswith(f"{path}: damaged (") and str(error.value).endswith("; remove it")
    assert "\n" not in str(error.value)
