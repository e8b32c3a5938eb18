"""HellaSwag's items: text unchanged, every line checked, downloaded or given with --input."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import InputError
from data_prep import hellaswag
from data_prep.hellaswag import Item, Options, main, open_items, prepare
from data_prep.hub.corpora import RemoteFile
from tests.helpers.data_dirs import names
from tests.helpers.runs import called
from tests.unit.data_prep.test_download import Server, server  # noqa: F401

ROW: dict[str, Any] = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "split": "val",
    "split_type": "indomain",
    "label": 3,
    "endings": [
        "is using wrap \u2028 to wrap.",
        " rips tiles.",
        "holds a Rubik's cube.",
        "starts pulling up caf\u00e9.",
    ],
    "source_id": "activitynet~v_-JhWjGDPHMY",
}
OTHER = ROW | {"ind": 25, "ctx_b": "", "label": 0}


def text_of(*rows: object) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file that is pinned in place of the real one."""
    path = tmp_path / "brought.jsonl"
    path.write_bytes(text_of(ROW, OTHER))
    pin(monkeypatch, "https://nowhere.invalid/hellaswag_val.jsonl", path.read_bytes())
    return path


def pin(monkeypatch: pytest.MonkeyPatch, url: str, content: bytes) -> None:
    source = RemoteFile(url, hashlib.sha256(content).hexdigest(), len(content))
    monkeypatch.setattr(hellaswag, "SOURCE", source)


def manifest_of(directory: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    return manifest


def test_items_are_kept_as_they_are(pinned: Path, tmp_path: Path) -> None:
    out = tmp_path / "data" / "hellaswag"
    done = called(main, "--input", str(pinned), "--out", str(out))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{out}: 2 items, the pinned validation set; sha256 ")
    first, second = open_items(out).items
    kept = {name: ROW[name] for name in ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "label")}
    assert first == Item(**kept, endings=tuple(ROW["endings"]))
    assert (second.ind, second.ctx_b, second.label) == (25, "", 0)
    assert names(out) == ["manifest.json", "val.jsonl"]
    assert names(tmp_path / "data") == ["hellaswag"]
    assert manifest_of(out) == {
        "kind": "hellaswag",
        "format_version": 1,
        "source": {
            "url": "https://nowhere.invalid/hellaswag_val.jsonl",
            "name": "brought.jsonl",
            "sha256": hashlib.sha256(pinned.read_bytes()).hexdigest(),
            "is_pinned": True,
        },
        "file": "val.jsonl",
        "items": 2,
        "sha256": hashlib.sha256((out / "val.jsonl").read_bytes()).hexdigest(),
    }
    told = called(main, "--input", str(pinned), "--out", str(out), "--accept-other")
    assert told.returncode == 0 and "--accept-other has no effect" in told.stderr
    assert "already complete, nothing to do" in told.stdout


def test_scorers_get_the_first_items_and_whether_they_are_the_pinned_set(pinned: Path, tmp_path: Path) -> None:
    prepare(Options(pinned, tmp_path / "out"))
    for path in (pinned, tmp_path / "out"):
        for most, num_items, is_pinned in ((None, 2, True), (1, 1, False), (2, 2, True), (9, 2, True)):
            opened = open_items(path, most=most)
            assert (len(opened.items), opened.is_pinned) == (num_items, is_pinned)
    other = tmp_path / "other.jsonl"
    other.write_bytes(text_of(OTHER))
    assert not open_items(other).is_pinned


def test_real_items_need_accept_other(shared_data: Path, tmp_path: Path) -> None:
    part = shared_data / "hellaswag_val_1000.jsonl"
    flags = ["--input", str(part), "--out", str(tmp_path / "out")]
    refused = called(main, *flags)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "its sha256 is 79b87117" in refused.stderr and "add --accept-other" in refused.stderr
    assert names(tmp_path) == []
    done = called(main, *flags, "--accept-other")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1,000 items, of " in done.stdout and "which is not the pinned file" in done.stdout
    source = manifest_of(tmp_path / "out")["source"]
    assert (source["is_pinned"], source["url"]) == (False, None)
    rows = [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
    for item, row in zip(open_items(tmp_path / "out").items, rows, strict=True):
        assert {name: row[name] for name in vars(item)} == vars(item) | {"endings": list(item.endings)}


def test_the_file_is_downloaded_once(
    server: Server,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.content = text_of(ROW, OTHER)
    server.faults = ["drop"]
    pin(monkeypatch, server.url, server.content)
    monkeypatch.chdir(tmp_path)
    assert prepare(Options()) == 2
    assert names(tmp_path / "data") == ["downloads", "hellaswag"]
    assert len(server.asked) == 2
    before = (tmp_path / "data/hellaswag/val.jsonl").stat().st_mtime_ns
    (tmp_path / "data/downloads/file.bin").unlink()
    again = called(main)
    assert again.stdout == "data/hellaswag: 2 items, already complete, nothing to do\n"
    assert (tmp_path / "data/hellaswag/val.jsonl").stat().st_mtime_ns == before
    assert len(server.asked) == 2
    server.content = b"something else"
    lied = called(main, "--overwrite")
    assert lied.returncode == 2 and "not the pinned" in lied.stderr
    assert len(open_items(Path("data/hellaswag")).items) == 2


def test_another_input_needs_overwrite(pinned: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other.jsonl"
    other.write_bytes(text_of(OTHER))
    assert prepare(Options(pinned, out)) == 2
    with pytest.raises(InputError, match="made of another file; choose another or use --overwrite"):
        prepare(Options(other, out, accept_other=True))
    assert prepare(Options(other, out, accept_other=True, overwrite=True)) == 1
    assert [item.ind for item in open_items(out).items] == [25]
    assert names(tmp_path) == ["brought.jsonl", "other.jsonl", "out"]


def changed(**fields: Any) -> bytes:
    """A third line, not seen before, with these fields."""
    return text_of(ROW | {"ind": 1} | fields)


LINES = text_of(ROW, OTHER)
DAMAGED: list[tuple[bytes, str]] = [
    (LINES[:-30], "2: not JSON ("),
    (LINES + b"\n", "3: not JSON ("),
    (LINES + b"[" * 100_000, "3: not JSON (nested too deeply)"),
    (LINES + b'{"ind": ' + b"1" * 5_000 + b"}\n", "3: not JSON (Exceeds the limit"),
    (LINES + b"[1]\n", "3: a JSON list, not an object"),
    (LINES.replace(b'he"', b'h\xe9"', 1), "1: not UTF-8 (byte 0xe9)"),
    (LINES + text_of({name: ROW[name] for name in ROW if name != "ctx_b"}), "3: no field ctx_b; is this"),
    (LINES + changed(endings=ROW["endings"][:3]), "3: 3 endings, must be a list of 4"),
    (LINES + changed(endings=["a", "b", 3, "d"]), "3: endings[2] is 3, must be a str"),
    (LINES + changed(endings=["a", "b", " ", "d"]), "3: endings[2] is empty"),
    (LINES + changed(ctx=""), "3: ctx is empty"),
    (LINES + changed(ctx_b=None), "3: ctx_b is None, must be a string"),
    (LINES + changed(label=4), "3: label is 4, must be an integer from 0 to 3"),
    (LINES + changed(label=True), "3: label is True, must be an integer"),
    (LINES + changed(ind="1"), "3: ind is '1', must be an integer"),
    (LINES + text_of(OTHER), "3: repeats the item of line 2 (ind 25)"),
    (b"", " no items"),
]


@pytest.mark.parametrize(("content", "line"), DAMAGED, ids=[line for _, line in DAMAGED])
def test_a_damaged_line_is_named(content: bytes, line: str, tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl"
    path.write_bytes(content)
    done = called(main, "--input", str(path), "--out", str(tmp_path / "out"), "--accept-other")
    assert done.returncode == 2
    assert done.stderr.startswith(f"hellaswag: {path}:{line}") and done.stderr.count("\n") == 1
    assert names(tmp_path) == ["part.jsonl"]


def test_the_pinned_file_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pinned.jsonl"
    path.write_bytes(text_of(ROW, ROW, ROW | {"endings": ["", "b", "c", "d"]}))
    pin(monkeypatch, "https://nowhere.invalid/file", path.read_bytes())
    assert prepare(Options(path, tmp_path / "out")) == 3
    assert len(open_items(tmp_path / "out").items) == 3


def test_files_that_changed_since_are_refused(pinned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(Options(pinned, out))
    (out / "val.jsonl").write_bytes((out / "val.jsonl").read_bytes().replace(b"24", b"42"))
    for read in (lambda: prepare(Options(pinned, out)), lambda: open_items(out).items):
        with pytest.raises(InputError, match=r"val.jsonl: not what manifest.json says; .* --overwrite"):
            read()
    assert prepare(Options(pinned, out, overwrite=True)) == 2
    (out / "manifest.json").write_text(json.dumps(manifest_of(out) | {"format_version": 2}))
    with pytest.raises(InputError, match="format version 2; this code reads 1"):
        open_items(out)
    assert prepare(Options(pinned, out, overwrite=True)) == 2


@pytest.mark.parametrize(
    ("manifest", "complaint"),
    [
        (None, "exists and is no HellaSwag directory"),
        ("{", r"not HellaSwag's \(Expecting"),
        ('{"format_version": 2, "splits": {}}', r"not HellaSwag's \(it has no key 'kind'"),
        (
            '{"kind": "x", "format_version": 1, "sha256": "", "source": {"sha256": "", "is_pinned": false}}',
            "of 'x', not of",
        ),
    ],
)
def test_another_directory_is_not_replaced(pinned: Path, tmp_path: Path, manifest: str | None, complaint: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    if manifest is not None:
        (out / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match=complaint):
        prepare(Options(pinned, out, overwrite=True))
    assert (out / "precious").read_text() == "mine"


def test_missing_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file \(--input\)"):
        prepare(Options(tmp_path / "none.jsonl", tmp_path / "out"))
    with pytest.raises(InputError, match=r"make it with data_prep/hellaswag.py"):
        open_items(tmp_path)
    with pytest.raises(InputError, match="none: no such HellaSwag file or directory"):
        open_items(tmp_path / "none")
    with pytest.raises(InputError, match="a name of its own"):
        prepare(Options(out=Path("/")))
