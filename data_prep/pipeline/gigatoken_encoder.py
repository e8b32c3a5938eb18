"""gigatoken as the encoder: up to forty times as fast as tiktoken (LOG.md), and refused if its ids differ.

It must agree with tiktoken on PROBE when a worker starts, and on the first document of every unit. Documents of more
than LONG_CHARACTERS are encoded by `Tokenizer.encode`, which has no limits. gigatoken's cache of words grows without
bound, so a worker makes a new instance every few units.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from data_prep.pipeline.sources import Document
from data_prep.tokenizer import EOT, Ids, Tokenizer
from data_prep.words import GPT2_PATTERN

UNITS_PER_INSTANCE = 8
LONG_CHARACTERS = 2**18

# Text that tokenizers get wrong: contractions, digits and letters of many scripts, marks, runs of blanks, line ends.
PROBE = [
    "It's what they'd said; WE'LL don't I'M 'tis y'all've 's 'S ' s",
    "3.14159 1,000,000 1234567890123 x2y3 \u00bd \u00b2 \u0664\u0662 \u2167 \u4e09",
    "tabs\t\tand  two   three    blanks \n\n  \n\t\n and an end   ",
    "   a beginning, \r\nCRLF\r\n\r\n, CR\r, FF\f, VT\v, NEL\x85, LS\u2028, PS\u2029, NBSP\xa0\xa0, ideographic\u3000",
    "\x00\x01\x1b[0m\x7f \ufeff \ufffd \u200b\u200d \u00ad",
    "caf\u00e9 cafe\u0301 na\u00efve \u0130\u0131 stra\u00dfe \u01c5 \ufb01 \u1e9e",
    "\u65e5\u672c\u8a9e \u306e\u6587 \ud55c\uad6d\uc5b4 \u0420\u0443\u0441\u0441\u043a\u0438\u0439",
    "\u0639\u0631\u0628\u064a\u064c \u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "\U0001f600\U0001f1e9\U0001f1ea \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001d54f \U0002070e",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # __init__ != None\n\n\nhttps://a.b/c?d=e&f=%20#g user@host",
    f"{EOT} <|endoftext|><|endoftext|>text<| endoftext |> <|im_start|>",
    "=" * 5000 + "-" * 700 + "ab" * 900 + "\u00e9" * 300,
    "".join(chr(code) for code in [*range(0x20, 0x3000, 7), *range(0x3000, 0xD800, 97), *range(0xE000, 0x1F000, 131)]),
]


class GigaEncoder:
    """An encoder whose ids are those of `tokenizer`, which is saved with its ranks in the file `ranks`.

    Raises InputError if gigatoken is not installed, cannot do this tokenizer, or gives other ids.
    """

    def __init__(self, tokenizer: Tokenizer, ranks: Path) -> None:
        if tokenizer.describe().get("pattern") != GPT2_PATTERN:
            raise InputError("--backend gigatoken: only for byte pairs with GPT-2's pattern; use --backend tiktoken")
        self._tokenizer = tokenizer
        self._ranks = ranks
        self._units = 0
        self._is_first = True
        self._fast_tokenizer = self._new_tokenizer()
        for text, ids in zip(PROBE, self._encode_batch([text.encode("utf-8") for text in PROBE]), strict=True):
            self._compare(text, ids)

    def begin_unit(self) -> None:
        """Have the next document compared with tiktoken; every UNITS_PER_INSTANCE units, take a new instance."""
        self._is_first = True
        self._units += 1
        if self._units % UNITS_PER_INSTANCE == 0:
            self._fast_tokenizer = self._new_tokenizer()

    def encode(self, documents: Sequence[Document]) -> Iterator[Ids]:
        """Yield the ids of each document."""
        encoded = iter(self._encode_batch([document.utf8 for document in documents if _is_for_gigatoken(document)]))
        for document in documents:
            if not _is_for_gigatoken(document):
                yield self._tokenizer.encode(document.text)
                continue
            ids = next(encoded)
            if self._is_first:
                self._compare(document.text, ids)
                self._is_first = False
            yield ids

    def _new_tokenizer(self) -> Any:
        try:
            from gigatoken.gigatoken_rs import BPETokenizer
        except ImportError as error:
            raise InputError("--backend gigatoken needs gigatoken: pip install -e '.[fast]'") from error
        return BPETokenizer.from_tiktoken(self._ranks, "gpt2", None)

    def _encode_batch(self, texts: list[bytes]) -> list[Ids]:
        if not texts:
            return []
        spans = self._fast_tokenizer.encode_batch(texts, parallel=False)
        return np.split(np.asarray(spans.layout.content.data), np.asarray(spans.layout.offsets)[1:-1])

    def _compare(self, text: str, ids: Ids) -> None:
        if not np.array_equal(ids, self._tokenizer.encode(text)):
            fault = f"its ids for {text[:60]!r} are not tiktoken's"
            raise InputError(f"--backend gigatoken: {fault}; use --backend tiktoken")


def _is_for_gigatoken(document: Document) -> bool:
    return len(document.text) <= LONG_CHARACTERS and not document.has_surrogates
