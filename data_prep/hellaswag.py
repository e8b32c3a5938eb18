"""Prepare HellaSwag's validation set as checked text. It is tokenized when it is scored, with any vocabulary.

    python data_prep/hellaswag.py [--out data/hellaswag]
    python data_prep/hellaswag.py --input hellaswag_val.jsonl
    python data_prep/hellaswag.py --input PART.jsonl --accept-other --out data/hellaswag-part

The command downloads 12 MB into data/downloads, or takes --input, and then works for a second. It ends with
`10,042 items`. It writes val.jsonl, one item per line with its text unchanged (see Item), and manifest.json. Run
again, it checks both files.

Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?", https://github.com/rowanz/hellaswag (MIT).
"""

import dataclasses
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.byte_order import HEAD_BYTES, left_out, mark_bytes
from common.errors import InputError, one_line_errors, reading_from, warn
from common.files import sha256_of_file, write_blocks_atomically, write_json_atomically
from common.reading import is_there, misfit, open_regular, parse_json, read_regular, require_regular
from data_prep.hub.corpora import RemoteFile
from data_prep.hub.download import fetch
from data_prep.pipeline.partial_dir import is_free, named_directory, put_in_place, unfinished_directory
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
LARGEST_FILE = 2**26
FORM = {"kind": str, "format_version": object, "sha256": str, "source": {"sha256": str, "is_pinned": bool}}


@dataclass(frozen=True)
class Options:
    """Prepare HellaSwag's validation set as checked text."""

    input: Path | None = None
    """A copy of hellaswag_val.jsonl to use instead of the download."""
    out: Path = Path("data/hellaswag")
    """The directory to make."""
    accept_other: bool = False
    """Accept an --input that is not the pinned file, such as a part of it. Its scores compare with nobody else's."""
    overwrite: bool = False
    """Make the directory anew and replace the existing one once the new one is complete."""


@dataclass(frozen=True)
class Item:
    """A context and four endings, of which number `label` (0 to 3) is the right one. All text is as in the source.

    llm.c and build-nanogpt score `ctx`, a space and the ending. lm-evaluation-harness scores `activity_label`, a colon,
    a space, `ctx_a`, a space, `ctx_b` capitalised and the ending, after it has removed marks like [header] from each.
    """

    ind: int
    activity_label: str
    ctx_a: str
    ctx_b: str
    ctx: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Items:
    """Items to score. is_pinned: they are the whole pinned validation set."""

    items: list[Item]
    is_pinned: bool


def open_items(path: Path, *, most: int | None = None) -> Items:
    """Read the first `most` items of a directory that this command made, or of a file in the original form.

    Raise InputError if a directory's file was changed since.
    """
    with reading_from(path):
        if path.is_dir():
            manifest = _read_manifest(path)
            if manifest["format_version"] != FORMAT_VERSION:
                fault = f"format version {manifest['format_version']}; this code reads {FORMAT_VERSION}"
                raise InputError(f"{path / MANIFEST}: {fault}: make it again with data_prep/hellaswag.py --overwrite")
            path, is_pinned = path / ITEMS, manifest["source"]["is_pinned"]
            if is_there(path):
                require_regular(path, inside=path.parent)
            if not path.is_file() or sha256_of_file(path) != manifest["sha256"]:
                raise InputError(f"{path}: not what {MANIFEST} says; make it again: data_prep/hellaswag.py --overwrite")
        elif path.is_file():
            is_pinned = sha256_of_file(path) == SOURCE.sha256
        else:
            raise InputError(f"{path}: no such HellaSwag file or directory; make one with data_prep/hellaswag.py")
    items = _parse(path, is_pinned=is_pinned)
    return Items(items[:most], is_pinned and (most is None or most >= len(items)))


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not is_there(path):
        raise InputError(f"{directory}: no {MANIFEST}, so no HellaSwag here; make it with data_prep/hellaswag.py")
    content = read_regular(path, inside=directory)
    try:
        manifest: dict[str, Any] = parse_json(content)
        fault = misfit(manifest, FORM)
    except ValueError as error:
        fault = str(error)
    if fault is not None:
        raise InputError(f"{path}: not HellaSwag's ({fault:.200}); remove it or use another directory")
    if manifest["kind"] != KIND:
        raise InputError(f"{path}: of {manifest['kind']!r:.40}, not of {KIND}; use another directory")
    return manifest


def _parse(path: Path, *, is_pinned: bool) -> list[Item]:
    """Return every line's item. The pinned file may hold empty and repeated texts, since it is right as it is."""
    with open_regular(path) as file, reading_from(path):
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise InputError(f"{path}: more than {LARGEST_FILE:,} bytes, so not HellaSwag's; its largest file has 48 MB")
    mark = mark_bytes(content[:HEAD_BYTES], str(path), flag="HellaSwag's items")
    if mark:
        warn("hellaswag", left_out(str(path)))
    items = []
    first_lines: dict[tuple[int, str], int] = {}
    for number, line in enumerate(io.BytesIO(content[mark:]), start=1):
        try:
            item = _item(parse_json(line), may_be_empty=is_pinned)
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: not UTF-8 (byte 0x{line[error.start]:02x})") from error
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from error
        except ValueError as error:
            raise InputError(f"{path}:{number}: not JSON ({error}); one object per line is needed") from error
        # `ind` alone is no key: it is not documented whether ActivityNet's and WikiHow's items share one numbering.
        first = first_lines.setdefault((item.ind, item.ctx), number)
        if first != number and not is_pinned:
            raise InputError(f"{path}:{number}: repeats the item of line {first} (ind {item.ind})")
        items.append(item)
    if not items:
        raise InputError(f"{path}: no items")
    return items


def _item(row: Any, *, may_be_empty: bool) -> Item:
    """Return the item of a parsed line. Raise InputError that names the wrong field and what it must be."""
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
    for name, text in [*texts.items(), *((f"endings[{index}]", text) for index, text in enumerate(endings))]:
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
    """Run the whole command and return the number of items. A refused input leaves finished data untouched."""
    out = named_directory(options.out)
    sha256 = _sha256_of_input(options)
    if (num_items := _count_existing(out, sha256, options)) is not None:
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
        items_sha256 = write_blocks_atomically(partial / ITEMS, lines)
        source = {"url": SOURCE.url if is_pinned else None, "name": path.name, "sha256": sha256, "is_pinned": is_pinned}
        manifest = {"kind": KIND, "format_version": FORMAT_VERSION, "source": source}
        manifest |= {"file": ITEMS, "items": len(items), "sha256": items_sha256}
        write_json_atomically(partial / MANIFEST, manifest)
        put_in_place(partial, out)
    origin = "the pinned validation set" if is_pinned else f"of {path}, which is not the pinned file"
    print(f"{out}: {len(items):,} items, {origin}; sha256 {items_sha256[:16]}")
    return len(items)


def _sha256_of_input(options: Options) -> str:
    """Return the hash of the input. Raise InputError if it is not the pinned file, unless --accept-other."""
    sha256 = pinned = str(SOURCE.sha256)
    if options.input is not None:
        with reading_from(options.input):
            if not options.input.is_file():
                raise InputError(f"{options.input}: no such file (--input)")
            sha256 = sha256_of_file(options.input)
    if sha256 == pinned and options.accept_other:
        warn("hellaswag", "--accept-other has no effect: it is the pinned file")
    if sha256 != pinned and not options.accept_other:
        raise InputError(
            f"{options.input}: its sha256 is {sha256[:16]}..., not {pinned[:16]}... of the full validation set; "
            "to use it anyway add --accept-other"
        )
    return sha256


def _count_existing(out: Path, sha256: str, options: Options) -> int | None:
    """Return the number of items in --out if it holds this input; None if --out is free or is to be replaced."""
    with reading_from(out):
        if is_free(out):
            return None
        if not (out / MANIFEST).is_file():
            raise InputError(f"--out {out}: exists and is no HellaSwag directory; choose another or remove it")
    manifest = _read_manifest(out)
    if options.overwrite:
        return None
    if manifest["source"]["sha256"] != sha256:
        raise InputError(f"--out {out}: made of another file; choose another or use --overwrite")
    return len(open_items(out).items)


def main(args: list[str] | None = None) -> None:
    import tyro  # here, because every run imports this module

    with one_line_errors("hellaswag"):
        prepare(tyro.cli(Options, args=args, description=__doc__))


if __name__ == "__main__":
    main()
