"""A data set laid out like FineWeb-Edu, made of real sentences in new orders: for benchmarks and rehearsals.

    python benchmarks/fineweb_like.py /tmp/pages                              # 1 GB of text in 14 files, as sample-10BT
    python benchmarks/fineweb_like.py /tmp/pages --megabytes 5 --files 2 --text page1.txt page2.txt

1 GB takes about 25 s on one CPU core and 0.3 GB of memory, whatever the size. Last line: JSON, with what was planted.

A document is random sentences of the text, each with the white space that follows it there: whole words in their
places, so that a tokenizer has the work that it has with the text itself. Only its words are fewer than the web's: what
keeps words in a cache (gigatoken) is flattered. Lengths are log-normal with FineWeb-Edu's mean, 4.9 KB; some documents
in 100,000 have 100 KB and more. Of those with text 4.18 % are copies of an earlier one, in any file, as in sample-10BT;
one in 2,000 has null for a text, and one in 2,000 the empty one. Columns, snappy and row groups of 1,000 rows as in the
Hub's files; the columns beside the text are made up. The same options and text give the same documents.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import tyro

from common.errors import InputError, one_line_errors
from data_prep.pipeline.python_docs import docstrings, topics

MB = 10**6
MEAN_BYTES = 4_860  # sample-10BT: 47 GB of text in 9.67 million pages
SIGMA = 1.0  # of the logarithm: ours
DUPLICATE_SHARE = 0.0418
NO_TEXT_SHARE = 1 / 2000  # null, and as many empty ones
MIN_SENTENCES = 8  # so that no two documents are equal by chance
MARGIN = 1.01  # bytes are planned from means
NULL, EMPTY = -1, -2

# Up to the end of a sentence or line, with all white space after it. None begins with white space, so that a joined
# text falls apart again into the same ones.
SENTENCE = re.compile(r"\S.*?(?:[.!?]\s+|\n\s*|\Z)")

SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("id", pa.string()),
        ("dump", pa.string()),
        ("url", pa.string()),
        ("file_path", pa.string()),
        ("language", pa.string()),
        ("language_score", pa.float64()),
        ("token_count", pa.int64()),
        ("score", pa.float64()),
        ("int_score", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Options:
    """A data set laid out like FineWeb-Edu, made of real sentences in new orders."""

    out: Annotated[Path, tyro.conf.Positional]
    """The folder to make."""
    megabytes: float = 1000.0
    """Bytes of text, in all files; one per cent more is aimed at, so that it is no less."""
    files: int = 14
    """Parquet files, as sample-10BT has them."""
    rows_per_group: int = 1000
    """Rows in a row group."""
    text: tuple[Path, ...] = ()
    """UTF-8 files with the sentences; the Python documentation inside CPython unless given."""
    seed: int = 0
    """Of everything."""


@dataclass(frozen=True)
class Made:
    """What is in the files."""

    files: int
    row_groups: int
    rows: int
    text_bytes: int
    duplicates: int
    null_texts: int
    empty_texts: int
    longest_bytes: int


@dataclass(frozen=True)
class Rows:
    """origins: the row whose text this one has, itself or an earlier one, or NULL or EMPTY. lengths: in sentences."""

    origins: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


def sentences_of(text: str) -> list[str]:
    return SENTENCE.findall(text)


def read_sentences(paths: tuple[Path, ...]) -> list[str]:
    """The sentences to draw from, each as often as it stands there; the last of a text ends its line."""
    texts = [path.read_text(encoding="utf-8") for path in paths] if paths else [topics(), docstrings()]
    sentences = [sentence for text in texts for sentence in sentences_of(text.rstrip() + "\n")]
    if len(set(sentences)) < 100:
        raise InputError(f"--text: {len(set(sentences))} sentences are too few; give text with at least 100")
    return sentences


def plan_rows(num_bytes: float, mean_sentence_bytes: float, seed: int) -> Rows:
    """As many rows as hold about num_bytes, with copies, nulls and empty texts spread over all of them."""
    generator = np.random.default_rng(seed)
    count = int(1.2 * num_bytes / MEAN_BYTES) + 100
    documents_bytes = generator.lognormal(np.log(MEAN_BYTES) - SIGMA**2 / 2, SIGMA, size=count)
    with_text = 1 + int(np.searchsorted(np.cumsum(documents_bytes), num_bytes))
    without = max(1, round(with_text * NO_TEXT_SHARE))
    kinds = generator.permutation(np.repeat([0, NULL, EMPTY], [with_text, without, without]))
    origins = np.where(kinds == 0, np.arange(len(kinds)), kinds)
    rows_with_text = np.flatnonzero(kinds == 0)
    is_copy = np.zeros(with_text, dtype=bool)
    is_copy[1 + generator.choice(with_text - 1, size=round(with_text * DUPLICATE_SHARE), replace=False)] = True
    originals = rows_with_text[~is_copy]
    for row in rows_with_text[is_copy]:
        origins[row] = originals[generator.integers(np.searchsorted(originals, row))]
    lengths = np.zeros(len(kinds), dtype=np.int64)
    lengths[rows_with_text] = np.maximum(MIN_SENTENCES, documents_bytes[:with_text] / mean_sentence_bytes)
    return Rows(origins, lengths)


def text_of(row: int, rows: Rows, sentences: list[str], seed: int) -> str | None:
    """The row's text, from the seed and its origin's number alone."""
    origin = int(rows.origins[row])
    if origin < 0:
        return None if origin == NULL else ""
    chosen = np.random.default_rng([seed, origin]).integers(len(sentences), size=rows.lengths[origin])
    return "".join(map(sentences.__getitem__, chosen.tolist())).rstrip()


def table_of(first: int, texts: list[str | None], file_number: int, seed: int) -> pa.Table:
    """A row group; `first` is the number of its first row."""
    generator = np.random.default_rng([seed, first, file_number])
    count = len(texts)
    dump = f"CC-MAIN-{2013 + file_number % 12}-20"
    scores = generator.uniform(2.5, 5.0, size=count)
    columns = [
        pa.array(texts, pa.string()),
        pa.array([f"<urn:uuid:{first + row:08x}-0000-4000-8000-{seed:012x}>" for row in range(count)]),
        pa.array([dump] * count),
        pa.array(
            [
                f"https://example.org/{word:08x}/page-{first + row}"
                for row, word in enumerate(generator.integers(2**32, size=count).tolist())
            ]
        ),
        pa.array([f"s3://commoncrawl/crawl-data/{dump}/segments/{first:08d}.warc.gz"] * count),
        pa.array(["en"] * count),
        pa.array(generator.uniform(0.65, 1.0, size=count)),
        pa.array([len(text or "") // 4 for text in texts], pa.int64()),
        pa.array(scores),
        pa.array(np.rint(scores).astype(np.int64)),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def groups_of(first: int, last: int, rows_per_group: int) -> Iterator[range]:
    for begin in range(first, last, rows_per_group):
        yield range(begin, min(begin + rows_per_group, last))


def make(options: Options) -> Made:
    """Write the files, a row group at a time."""
    for name in ("megabytes", "files", "rows_per_group"):
        if getattr(options, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)} must be above 0")
    if options.out.exists() and any(options.out.iterdir()):
        raise InputError(f"{options.out}: not empty; choose another folder or remove it")
    sentences = read_sentences(options.text)
    mean_sentence_bytes = sum(len(sentence.encode("utf-8")) for sentence in sentences) / len(sentences)
    rows = plan_rows(MARGIN * options.megabytes * MB, mean_sentence_bytes, options.seed)
    count = len(rows.origins)
    if count < options.files:
        raise InputError(
            f"--files {options.files}: {options.megabytes} MB are only {count} rows; give more, or fewer files"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    borders = np.linspace(0, count, options.files + 1).astype(int).tolist()
    num_groups = num_bytes = longest = 0
    for number in range(options.files):
        with pq.ParquetWriter(options.out / f"{number:03d}_00000.parquet", SCHEMA, compression="snappy") as writer:
            for group in groups_of(borders[number], borders[number + 1], options.rows_per_group):
                texts = [text_of(row, rows, sentences, options.seed) for row in group]
                writer.write_table(table_of(group[0], texts, number, options.seed))
                sizes = [len(text.encode("utf-8")) for text in texts if text]
                num_groups, num_bytes, longest = num_groups + 1, num_bytes + sum(sizes), max(longest, *sizes)
    return Made(
        files=options.files,
        row_groups=num_groups,
        rows=count,
        text_bytes=num_bytes,
        duplicates=int(((rows.origins >= 0) & (rows.origins != np.arange(count))).sum()),
        null_texts=int((rows.origins == NULL).sum()),
        empty_texts=int((rows.origins == EMPTY).sum()),
        longest_bytes=longest,
    )


def main(args: list[str] | None = None) -> None:
    with one_line_errors("fineweb_like"):
        print(json.dumps(asdict(make(tyro.cli(Options, args=args, description=__doc__)))))


if __name__ == "__main__":
    main()
