"""Generated pages in FineWeb-Edu's schema, among them every kind of page that makes trouble."""

import random
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from tests.helpers.corpus import make_text

Text = str | bytes | None

TROUBLE: list[Text] = [
    None,
    "",
    " ",
    "<|endoftext|>",
    "before <|endoftext|><|endoftext|> after",
    "one\r\ntwo\rthree\n\r\n\0 \x85 \u2028 \u00e9\u20ac\U0001f600 e\u0301 \t\x0b\x0c no newline",
    b"a lone surrogate \xed\xa0\x80, a byte \xff and an end \xe2\x82",
    "=" * 3_000,
]
COPIES = ["the same page, word for word", "another that is there \u00e9 twice and more"]


def make_pages(count: int, seed: int) -> list[Text]:
    """Return pages of 20 to 600 characters, with TROUBLE and COPIES (the same for every seed) among them."""
    rng = random.Random(seed)
    text = make_text(count * 400, seed)
    pages: list[Text] = []
    for number in range(count):
        begin = rng.randrange(len(text) - 600)
        pages.append(f"{seed}.{number} " + text[begin : begin + rng.randrange(20, 600)])
    for extra in [*TROUBLE, *COPIES, *COPIES]:
        pages.insert(rng.randrange(len(pages)), extra)
    return pages


def write_pages(path: Path, pages: list[Text], *, rows_per_group: int = 25, column: str = "text") -> Path:
    """Write a parquet file with FineWeb-Edu's columns. Pages of bytes are written as they are, UTF-8 or not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = [page.encode("utf-8") if isinstance(page, str) else page for page in pages]
    rows = range(len(pages))
    table = pa.table(
        {
            column: pa.array(raw, pa.binary()).view(pa.string()),
            "id": [f"<urn:uuid:{row}>" for row in rows],
            "dump": ["CC-MAIN-2024-10"] * len(pages),
            "url": [f"http://example.org/{row}" for row in rows],
            "file_path": ["s3://somewhere"] * len(pages),
            "language": ["en"] * len(pages),
            "language_score": [0.9] * len(pages),
            "token_count": [7] * len(pages),
            "score": [3.1] * len(pages),
            "int_score": [3] * len(pages),
        }
    )
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def as_texts(pages: list[Text]) -> list[str]:
    """Return the texts that are tokenized: no null or empty ones, U+FFFD for each byte that is not UTF-8."""
    texts = [page.decode("utf-8", "surrogateescape") if isinstance(page, bytes) else page for page in pages]
    return ["".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text) for text in texts if text]


def write_ranks(path: Path, gpt2: Path, count: int = 1000) -> str:
    """Write GPT-2's first ranks as a tokenizer of its own, because loading all 50,257 takes most of a test's time."""
    path.write_bytes(b"".join(gpt2.read_bytes().splitlines(keepends=True)[:count]))
    return str(path)
