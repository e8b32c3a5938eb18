"""The estimate of a FineWeb-Edu preparation (--dry-run), and the table that closes one."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common.errors import InputError, reading_from
from data_prep.fineweb_plan import (
    READ_BYTES_PER_TOKEN,
    UNIT_BYTES,
    Options,
    downloads_directory,
    hub_files,
    local_files,
    plan_all_units,
    required_files,
)
from data_prep.hub import files as hub
from data_prep.manifest import Manifest
from data_prep.pipeline import python_docs
from data_prep.pipeline.bad_rows import skipped_line
from data_prep.pipeline.encode import HASH_BYTES, encoder
from data_prep.pipeline.gigatoken_encoder import GigaEncoder
from data_prep.pipeline.input_files import InputFile
from data_prep.pipeline.selection import RECORD
from data_prep.pipeline.sources import Document, read_documents
from data_prep.pipeline.workers import available_cores, clock
from data_prep.tokenizer import FOLDER, RANKS_FILE, Tokenizer

SAMPLE_CHARACTERS = 2**21
# By its page on the Hub, sample-10BT is 28.5 GB of parquet, 9.67 million pages and about 10e9 GPT-2 tokens. A token
# holds about 4.7 bytes of such text.
TEXT_PER_PARQUET_BYTE = 1.65
GPT2_BYTES_PER_TOKEN = 4.7
TOKENS_PER_DOCUMENT = 1_000


def dry_run(options: Options, tokenizer: Tokenizer) -> None:
    """Print files, bytes, disk and time, and write nothing. Ask the Hub only for its list of files."""
    files, num_bytes, missing_bytes = _list_input(options)
    is_local = not missing_bytes
    if is_local:
        units = plan_all_units(files, options)
        text_bytes = sum(unit.num_bytes for unit in units)
        sample = _take_sample(text for unit in units[:1] for _, text in read_documents(unit, options.reading))
    else:
        sample = [python_docs.topics()]
    bytes_per_second, bytes_per_token = _measure(options, tokenizer, sample)
    if not is_local:
        text_bytes = int(num_bytes * TEXT_PER_PARQUET_BYTE)
        bytes_per_token = GPT2_BYTES_PER_TOKEN if options.tokenizer == "gpt2" else bytes_per_token
    if options.max_tokens is not None:
        text_bytes = min(text_bytes, READ_BYTES_PER_TOKEN * options.max_tokens)
    tokens = min(int(text_bytes / bytes_per_token), options.max_tokens or text_bytes)
    workers = min(options.workers or available_cores(), max(1, text_bytes // UNIT_BYTES))
    bytes_per_document = 8 + HASH_BYTES + RECORD.itemsize + 8
    data_bytes = 4 * tokens + bytes_per_document * (tokens // TOKENS_PER_DOCUMENT)
    with reading_from(options.directory):
        free_bytes = shutil.disk_usage(_nearest_existing(options.directory)).free
    sizes = f"{num_bytes / 1e9:.2f} GB, {missing_bytes / 1e9:.2f} GB to download"
    print(f"{options.directory}: {len(files)} files, {sizes}")
    print(f"  text    {'' if is_local else 'about '}{text_bytes / 1e9:.2f} GB, about {tokens:,} tokens")
    print(f"  shards  about {max(2, -(-tokens // options.shard_tokens))} of {options.shard_tokens:,} tokens")
    print(
        f"  disk    about {(missing_bytes + data_bytes) / 1e9:.2f} GB during the preparation, {2 * tokens / 1e9:.2f} "
        f"GB of shards at the end; {free_bytes / 1e9:.2f} GB free"
    )
    print(
        f"  time    about {clock(text_bytes / bytes_per_second / workers)} to tokenize in {workers} processes, at "
        f"{bytes_per_second / 1e6:.1f} MB/s each as measured now; without download and packing"
    )
    if free_bytes < missing_bytes + data_bytes:
        raise InputError(f"--out {options.directory}: the disk is too small for it")


def _list_input(options: Options) -> tuple[list[InputFile], int, int]:
    """Return (files, their bytes, bytes to download)."""
    if options.source == "local":
        files = local_files(options.data_files)
        return files, sum(Path(file.path).stat().st_size for file in files), 0
    listing = hub.list_files(options.dataset, options.name, options.revision)
    remote = required_files(listing, options)
    files = hub_files(downloads_directory(options, listing), remote)
    missing = [file for file, local in zip(remote, files, strict=True) if not Path(local.path).is_file()]
    return files, sum(file.num_bytes for file in remote), sum(file.num_bytes for file in missing)


def _take_sample(texts: Iterator[str]) -> list[str]:
    """Return the first texts, about SAMPLE_CHARACTERS in all."""
    sample = []
    characters = 0
    for text in texts:
        sample.append(text)
        characters += len(text)
        if characters >= SAMPLE_CHARACTERS:
            break
    return sample


def _measure(options: Options, tokenizer: Tokenizer, texts: list[str]) -> tuple[float, float]:
    """Encode `texts` with the backend; return (bytes per second in one process, bytes per token)."""
    documents = [Document.of(0, text) for text in texts if text]
    if not documents:
        raise InputError(f"the first row groups hold no text in column {options.text_column!r} (--text-column)")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        ranks = Path(folder) / FOLDER / RANKS_FILE
        encode = encoder(tokenizer, GigaEncoder(tokenizer, ranks) if options.backend == "gigatoken" else None)
        started = time.perf_counter()
        encoded = [
            (len(ids), len(document.utf8))
            for ids, document in zip(encode(documents), documents, strict=True)
            if not isinstance(ids, InputError)
        ]
        seconds = time.perf_counter() - started
    tokens, num_bytes = (sum(column) for column in zip(*encoded, strict=True))
    return num_bytes / seconds, num_bytes / tokens


def _nearest_existing(path: Path) -> Path:
    return path if path.exists() else _nearest_existing(path.absolute().parent)


def report(options: Options, manifest: Manifest, seconds: float) -> None:
    """Print what became of the pages, and the splits."""
    counts = manifest.source["documents"]
    revision = manifest.source["revision"]
    origin = f"{options.dataset} {options.name} at {revision[:12]}" if revision else "local files"
    size = sum(file["bytes"] for file in manifest.source["files"])
    print(f"{options.directory}: {origin}, {len(manifest.source['files'])} files, {size / 1e6:,.1f} MB")
    kind, vocab_size = manifest.tokenizer["kind"], manifest.vocab_size
    print(f"  tokenizer {manifest.tokenizer.get('name', kind)}, vocabulary {vocab_size:,}; {seconds:,.1f} s")
    lines = [
        ("read", counts["read"], ""),
        ("empty", counts["empty"], "no text"),
        ("duplicates", counts["duplicates"], f"{counts['duplicate_tokens']:,} tokens"),
        ("repaired", counts["repaired"], "not UTF-8 in places, kept"),
        ("beyond --max-tokens", counts["beyond_max_tokens"], ""),
    ]
    if "skipped" in counts:
        lines.append(("left out", counts["skipped"]["rows"], skipped_line(counts["skipped"])))
    for name, split in manifest.splits.items():
        lines.append((name, split.documents, f"{split.tokens:,} tokens, {len(split.shards)} shards"))
    for name, count, remark in lines:
        if count or name in ("read", "empty", "duplicates"):
            print(f"  {name:20} {count:>13,} documents  {remark if count else ''}".rstrip())
    print(f"  fingerprint {manifest.fingerprint[:16]}")
