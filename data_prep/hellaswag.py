"""HellaSwag's validation set, checked, as text: it is tokenised when it is scored, so that every vocabulary can be.

    python data_prep/hellaswag.py [--out data/hellaswag]
    python data_prep/hellaswag.py --input hellaswag_val.jsonl
    python data_prep/hellaswag.py --input PART.jsonl --accept-other --out data/hellaswag-part

Fetches 12 MB into data/downloads, or takes --input; a second of work after that. Ends with `10,042 items`. The output
is val.jsonl, one item per line with its text as it was (see Item), and a manifest.json. Run again, it checks both.

Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?", https://github.com/rowanz/hellaswag (MIT).
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from common.errors import InputError, one_line_errors
from common.files import sha256_of_file, write_blocks_atomically, write_json_atomically
from data_prep.hub.corpora import RemoteFile
from data_prep.hub.download import fetch
from data_prep.pipeline.partial_dir import put_in_place, unfinished_directory
from data_prep.pipeline.workers import Progress

SOURCE = RemoteFile(
    "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    12_246_618,
)
KIND = "hellaswag"
FORMAT_VERSION = 1
ITEMS = "val.jsonl"
MANIFEST = "manifest.json"
NUM_ENDINGS = 4


@dataclass(frozen=True)
class Options:
    """HellaSwag's validation set, checked, as text."""

    input: Path | None = None
    """A copy of hellaswag_val.jsonl, instead of the download."""
    out: Path = Path("data/hellaswag")
    """The directory to make."""
    accept_other: bool = False
    """Take an --input that is not the pinned file, such as a part of it. Its scores compare with nobody's."""
    overwrite: bool = False
    """Make it anew, replacing the directory that is there once the new one is complete."""


@dataclass(frozen=True)
class Item:
    """A context and four endings, of which number `label` (0 to 3) is the right one. All text as in the source.

    llm.c and build-nanogpt score `ctx`, a space, the ending. lm-evaluation-harness scores `activity_label`, a colon, a
    space, `ctx_a`, a space, `ctx_b` capitalised, the ending, after taking marks like [header] out of each.
    """

    ind: int
    activity_label: str
    ctx_a: str
    ctx_b: str
    ctx: str
    endings: tuple[str, ...]
    label: int


def read_items(path: Path) -> list[Item]:
    """The items of a directory that this command made, whose file is what its manifest says; else InputError."""
    manifest = _read_manifest(path)
    if manifest["format_version"] != FORMAT_VERSION:
        found = f"format version {manifest['format_version']}; this code reads {FORMAT_VERSION}"
        raise InputError(f"{path / MANIFEST}: {found}: make it again with data_prep/hellaswag.py --overwrite")
    if not (path / ITEMS).is_file() or sha256_of_file(path / ITEMS) != manifest["sha256"]:
        raise InputError(f"{path / ITEMS}: not what {MANIFEST} says; make it again: data_prep/hellaswag.py --overwrite")
    return _parse(path / ITEMS, is_pinned=manifest["source"]["is_pinned"])


@dataclass(frozen=True)
class Items:
    """What a scorer is given: the items, and whether they are the whole pinned set."""

    items: list[Item]
    is_pinned: bool


def open_items(path: Path, *, most: int | None = None) -> Items:
    """Of a directory that this command made, or of a file in the original form; the first `most` of them."""
    if path.is_dir():
        items = read_items(path)
        is_pinned = bool(_read_manifest(path)["source"]["is_pinned"])
    elif path.is_file():
        is_pinned = sha256_of_file(path) == SOURCE.sha256
        items = _parse(path, is_pinned=is_pinned)
    else:
        raise InputError(f"{path}: no such HellaSwag file or directory; make one with data_prep/hellaswag.py")
    return Items(items[:most], is_pinned and (most is None or most >= len(items)))


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        raise InputError(f"{directory}: no {MANIFEST}, so no HellaSwag is there; make it with data_prep/hellaswag.py")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, *_ = (manifest[name] for name in ("kind", "format_version", "sha256"))
        _ = [manifest["source"][name] for name in ("sha256", "is_pinned")]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not HellaSwag's ({type(error).__name__}: {error}); remove it or use another"
        ) from error
    if kind != KIND:
        raise InputError(f"{path}: of {kind!r:.40}, not of {KIND}; use another directory")
    return manifest


def _parse(path: Path, *, is_pinned: bool) -> list[Item]:
    """Every line's item. The pinned file is right whatever it holds: there only what scoring needs is asked for."""
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    items = []
    first_lines: dict[tuple[int, str], int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            item = _item(json.loads(line.decode("utf-8")), may_be_empty=is_pinned)
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: not UTF-8 (byte 0x{line[error.start]:02x})") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON ({error}); one object per line is needed") from error
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from error
        # Not `ind` alone: whether the two sources, ActivityNet and WikiHow, were numbered together is not documented.
        first = first_lines.setdefault((item.ind, item.ctx), number)
        if first != number and not is_pinned:
            raise InputError(f"{path}:{number}: repeats the item of line {first} (ind {item.ind})")
        items.append(item)
    if not items:
        raise InputError(f"{path}: no items")
    return items


def _item(row: Any, *, may_be_empty: bool) -> Item:
    """InputError says which field is wrong, and what it must be."""
    if not isinstance(row, dict):
        raise InputError(f"a JSON {type(row).__name__}, not an object")
    missing = [field.name for field in dataclasses.fields(Item) if field.name not in row]
    if missing:
        raise InputError(f"no field {', '.join(missing)}; is this HellaSwag's validation set?")
    endings = row["endings"]
    if not isinstance(endings, list) or len(endings) != NUM_ENDINGS:
        shown = f"{len(endings)} endings" if isinstance(endings, list) else f"endings {endings!r:.40}"
        raise InputError(f"{shown}, must be a list of {NUM_ENDINGS}")
    texts = {name: row[name] for name in ("activity_label", "ctx_a", "ctx_b", "ctx")}
    for name, text in [*texts.items(), *((f"endings[{place}]", text) for place, text in enumerate(endings))]:
        if not isinstance(text, str):
            raise InputError(f"{name} is {text!r:.40}, must be a string")
        if not text.strip() and name != "ctx_b" and not may_be_empty:  # WikiHow's items have no ctx_b
            raise InputError(f"{name} is empty")
    if type(row["ind"]) is not int:
        raise InputError(f"ind is {row['ind']!r:.40}, must be an integer")
    if type(row["label"]) is not int or not 0 <= row["label"] < NUM_ENDINGS:
        raise InputError(f"label is {row['label']!r:.40}, must be an integer from 0 to {NUM_ENDINGS - 1}")
    return Item(ind=row["ind"], **texts, endings=tuple(endings), label=row["label"])


def prepare(options: Options) -> int:
    """The whole stage -> the number of items. InputError, with nothing finished touched, if bad."""
    out = options.out.resolve() if options.out.is_symlink() else options.out
    if not out.name:
        raise InputError(f"--out {out}: give the directory a name of its own")
    sha256 = _sha256_of_input(options)
    if (num_items := _num_items_there(out, sha256, options)) is not None:
        print(f"{out}: {num_items:,} items, already complete, nothing to do")
        return num_items
    path = options.input
    if path is None:
        path = out.parent / "downloads" / SOURCE.name
        fetch(SOURCE.url, sha256, path, Progress("download", SOURCE.num_bytes or 0))
    is_pinned = sha256 == SOURCE.sha256
    items = _parse(path, is_pinned=is_pinned)
    with unfinished_directory(out) as partial:
        lines = (json.dumps(dataclasses.asdict(item)).encode() + b"\n" for item in items)
        written = write_blocks_atomically(partial / ITEMS, lines)
        source = {"url": SOURCE.url if is_pinned else None, "name": path.name, "sha256": sha256, "is_pinned": is_pinned}
        write_json_atomically(
            partial / MANIFEST,
            {
                "kind": KIND,
                "format_version": FORMAT_VERSION,
                "source": source,
                "file": ITEMS,
                "items": len(items),
                "sha256": written,
            },
        )
        put_in_place(partial, out)
    about = "the pinned validation set" if is_pinned else f"of {path}, which is not the pinned file"
    print(f"{out}: {len(items):,} items, {about}; sha256 {written[:16]}")
    return len(items)


def _sha256_of_input(options: Options) -> str:
    """The hash of what is to be prepared, held against the pinned one."""
    pinned = str(SOURCE.sha256)
    sha256 = pinned
    if options.input is not None:
        if not options.input.is_file():
            raise InputError(f"{options.input}: no such file (--input)")
        sha256 = sha256_of_file(options.input)
    if sha256 == pinned and options.accept_other:
        print("hellaswag: warning: --accept-other has no effect: it is the pinned file", file=sys.stderr, flush=True)
    if sha256 != pinned and not options.accept_other:
        raise InputError(
            f"{options.input}: its sha256 is {sha256[:16]}..., not {pinned[:16]}... of the full validation set; "
            "to use it anyway add --accept-other"
        )
    return sha256


def _num_items_there(out: Path, sha256: str, options: Options) -> int | None:
    """The number of items in --out if it holds exactly this; None if --out is free or to be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise InputError(f"--out {out}: exists and is no HellaSwag directory; choose another or remove it")
    manifest = _read_manifest(out)
    if options.overwrite:
        return None
    if manifest["source"]["sha256"] != sha256:
        raise InputError(f"--out {out}: made of another file; choose another or use --overwrite")
    return len(read_items(out))


def main(args: list[str] | None = None) -> None:
    with one_line_errors("hellaswag"):
        prepare(tyro.cli(Options, args=args, description=__doc__))


if __name__ == "__main__":
    main()
