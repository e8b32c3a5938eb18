"""Write a data set laid out like FineWeb-Edu from real sentences in new orders, for benchmarks and rehearsals.

    python benchmarks/fineweb_like.py /tmp/pages                              # 1 GB of text in 14 files, as sample-10BT
    python benchmarks/fineweb_like.py /tmp/pages --megabytes 5 --files 2 --text page1.txt page2.txt

1 GB takes about 25 s on one CPU core. Memory stays at 0.3 GB, whatever the size. Last line: JSON, with the numbers of
duplicates and of rows without text.

A document is random sentences of the text, each with the white space that follows it there. A tokenizer therefore has
the same work as with the text itself. The vocabulary is smaller than the web's, which flatters encoders that cache
words (gigatoken). Lengths are log-normal with FineWeb-Edu's mean, 4.9 KB; some documents in 100,000 have 100 KB and
more. 4.18 % of the documents with text are copies of an earlier one in any file, as in sample-10BT. One row in 2,000
has null as its text, and one in 2,000 the empty text. Columns, snappy compression and row groups of 1,000 rows are
those of the Hub's files; the columns beside the text are made up. The same options and text give the same documents.
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
SIGMA = 1.0  # standard deviation of the log length; our choice
DUPLICATE_SHARE = 0.0418
NO_TEXT_SHARE = 1 / 2000  # of null texts, and again of empty ones
MIN_SENTENCES = 8  # with fewer, two documents might be equal by chance
MARGIN = 1.01  # bytes are planned from means, so that one per cent more is planned
NULL, EMPTY = -1, -2

# A sentence or line with all white space after it. A match never begins with white space, so that joined sentences
# are split into the same ones again.
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
    """Options of the command."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write; it must be empty or not exist."""
    megabytes: float = 1000.0
    """Megabytes of text in all files together; about one per cent more is written."""
    files: int = 14
    """Number of Parquet files; sample-10BT has 14."""
    rows_per_group: int = 1000
    """Rows in each row group."""
    text: tuple[Path, ...] = ()
    """UTF-8 files with the sentences; none: the Python documentation inside CPython."""
    seed: int = 0
    """Seed of all random choices."""


@dataclass(frozen=True)
class Made:
    """The contents of the files, counted."""

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
    """The planned rows. `origins`: the row whose text a row has (itself or an earlier one), or NULL or EMPTY.
    `lengths`: in sentences."""

    origins: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


def sentences_of(text: str) -> list[str]:
    """Return the sentences and lines of a text, each with the white space after it."""
    return SENTENCE.findall(text)


def read_sentences(paths: tuple[Path, ...]) -> list[str]:
    """Return the sentences to draw from, repeated as in the texts. Raise InputError if there are too few."""
    texts = [path.read_text(encoding="utf-8") for path in paths] if paths else [topics(), docstrings()]
    sentences = [sentence for text in texts for sentence in sentences_of(text.rstrip() + "\n")]
    if len(set(sentences)) < 100:
        raise InputError(f"--text: {len(set(sentences))} sentences are too few; give text with at least 100")
    return sentences


def plan_rows(num_bytes: float, mean_sentence_bytes: float, seed: int) -> Rows:
    """Return rows of about `num_bytes` in all, with copies, nulls and empty texts spread over them."""
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
    """Return the row's text, which depends only on the seed and the number of its origin."""
    origin = int(rows.origins[row])
    if origin < 0:
        return None if origin == NULL else ""
    chosen = np.random.default_rng([seed, origin]).integers(len(sentences), size=rows.lengths[origin])
    return "".join(map(sentences.__getitem__, chosen.tolist())).rstrip()


def table_of(first: int, texts: list[str | None], file_number: int, seed: int) -> pa.Table:
    """Return a row group; `first` is the number of its first row."""
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
    """Yield the rows of each row group of a file that holds rows `first` to `last`."""
    for begin in range(first, last, rows_per_group):
        yield range(begin, min(begin + rows_per_group, last))


def make(options: Options) -> Made:
    """Write the files, a row group at a time, and return their counted contents."""
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
            f"--files {options.files}: {options.megabytes} MB are only {count} rows; raise --megabytes or lower --files"
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
