"""One tokenizer interface: characters, bytes, GPT-2's byte pairs, or any tiktoken rank file.

A tokenizer is saved as plain files beside the shards: tokenizer/codec.json and, for byte pairs, ranks.tiktoken. So no
later stage needs the network, and nothing is ever unpickled.
"""

import binascii
import functools
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tiktoken

from common.errors import InputError, first_line, reading_from
from common.files import sha256_of_json, write_atomically, write_json_atomically
from common.reading import NATURAL, is_there, misfit, parse_json, read_regular
from data_prep.shards import MAX_VOCAB_SIZE
from data_prep.words import GPT2_PATTERN, LONG_RUN, pieces_of

FOLDER = "tokenizer"
DESCRIPTION_FILE = "codec.json"
RANKS_FILE = "ranks.tiktoken"
EOT = "<|endoftext|>"
# GPT-2's vocabulary begins with the bytes that Latin-1 can print; then come the others (encoder.py, bytes_to_unicode).
SHOWN = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
BYTE_ORDER = [*SHOWN, *(byte for byte in range(256) if byte not in SHOWN)]

BLOCK_CHARACTERS = 2**18  # 1 MB of code points

DESCRIPTION = {"vocab_size": NATURAL, "eot_id": (NATURAL, None), "sha256": str}
FORMS: dict[str, dict[str, Any]] = {
    "char": {"alphabet": str} | DESCRIPTION,
    "byte": DESCRIPTION,
    "bpe": {"name": str, "pattern": str} | DESCRIPTION,
}

Ids = npt.NDArray[np.integer]


class Tokenizer(Protocol):
    """The interface of every tokenizer. `eot_id` begins each document; None: there is no such token."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eot_id(self) -> int | None: ...

    def encode(self, text: str) -> Ids:
        """Return the token ids [n]. Text that looks like a special token is ordinary text."""
        ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the UTF-8 bytes of the ids; they may begin or end inside a character."""
        ...

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of UTF-8 bytes of each id, 0 for EOT: int64 [vocab_size]."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return the manifest's record: kind, vocab_size, eot_id, sha256 and what rebuilds this kind."""
        ...

    def save(self, directory: Path) -> None:
        """Write the tokenizer's files into directory/tokenizer."""
        (directory / FOLDER).mkdir(parents=True, exist_ok=True)
        description = self.describe()
        content = description | {"check": sha256_of_json(description)}
        write_json_atomically(directory / FOLDER / DESCRIPTION_FILE, content)


def encode_or_fault(tokenizer: Tokenizer, text: str) -> Ids | InputError:
    """Return the text's ids, or the InputError that says why it cannot be encoded."""
    try:
        return tokenizer.encode(text)
    except InputError as error:
        return error


def gives_same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Return whether every text has the same ids in both tokenizers, whatever their names."""
    first, second = ({k: v for k, v in tokenizer.describe().items() if k != "name"} for tokenizer in (one, other))
    return first == second


def name_of(tokenizer: Tokenizer) -> str:
    """Return a name for messages, such as `gpt2 (50,257 ids, sha256 306cd27f)`."""
    description = tokenizer.describe()
    name = description.get("name", description["kind"])
    return f"{name} ({tokenizer.vocab_size:,} ids, sha256 {description['sha256'][:8]})"


def alphabet_of(text: str) -> set[str]:
    """Return the distinct characters of `text`."""
    if len(text) < BLOCK_CHARACTERS:
        return set(text)
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    for _, code_points in _code_points(text):
        seen[code_points] = True
    return {chr(code_point) for code_point in np.flatnonzero(seen)}


def _code_points(text: str) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
    """Yield (offset, code points from there on), a block at a time, since a whole text takes 4 bytes a character."""
    for begin in range(0, len(text), BLOCK_CHARACTERS):
        block = text[begin : begin + BLOCK_CHARACTERS]
        yield begin, np.frombuffer(block.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class CharTokenizer(Tokenizer):
    """A tokenizer with one id per character, in code-point order. `itos` is the alphabet, `stoi` its inverse."""

    eot_id = None

    def __init__(self, alphabet: str) -> None:
        if len(alphabet) > MAX_VOCAB_SIZE:
            raise InputError(f"{len(alphabet)} distinct characters do not fit uint16 ids; use --tokenizer byte")
        if not alphabet or list(alphabet) != sorted(set(alphabet)):
            raise InputError("the alphabet of a char tokenizer must be distinct characters in order")
        if any("\ud800" <= character <= "\udfff" for character in alphabet):
            raise InputError("the text holds a lone surrogate, which has no UTF-8 bytes; remove it from the text")
        self.itos = alphabet
        self.stoi = {character: index for index, character in enumerate(alphabet)}
        # Ids by code point, -1 for no id. The last entry stands for every code point above the alphabet.
        self._ids = np.full(ord(alphabet[-1]) + 2, -1, dtype=np.int32)
        self._ids[[ord(character) for character in alphabet]] = np.arange(len(alphabet))

    @property
    def vocab_size(self) -> int:
        return len(self.itos)

    def encode(self, text: str) -> Ids:
        ids = np.empty(len(text), dtype=np.uint16)
        for begin, code_points in _code_points(text):
            block_ids = self._ids[np.minimum(code_points, len(self._ids) - 1)]
            if (block_ids < 0).any():
                position = begin + int(np.argmax(block_ids < 0))
                raise InputError(
                    f"character {text[position]!r} at {position} is not among this tokenizer's {self.vocab_size}"
                )
            ids[begin : begin + len(block_ids)] = block_ids
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return "".join(self.itos[index] for index in ids).encode("utf-8")

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(character.encode("utf-8")) for character in self.itos], dtype=np.int64)

    def describe(self) -> dict[str, Any]:
        sha256 = hashlib.sha256(self.itos.encode("utf-8")).hexdigest()
        return {"kind": "char", "vocab_size": self.vocab_size, "eot_id": None, "sha256": sha256, "alphabet": self.itos}


class ByteTokenizer(Tokenizer):
    """A tokenizer with one id per UTF-8 byte: 256 ids, no training, any text."""

    vocab_size = 256
    eot_id = None

    def encode(self, text: str) -> Ids:
        try:
            return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        except UnicodeEncodeError as error:
            raise InputError(f"lone surrogate at {error.start}, which has no UTF-8 bytes; remove it") from error

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return bytes(ids)

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        return np.ones(256, dtype=np.int64)

    def describe(self) -> dict[str, Any]:
        sha256 = hashlib.sha256(bytes(range(256))).hexdigest()
        return {"kind": "byte", "vocab_size": 256, "eot_id": None, "sha256": sha256}


class BpeTokenizer(Tokenizer):
    """A byte-pair tokenizer, served by tiktoken. EOT is the id after the last rank; `encode` never produces it.

    ranks: the id of every token but EOT, by its bytes. pattern: the regular expression that splits text into words; no
    token crosses a word.
    """

    def __init__(self, ranks: dict[bytes, int], *, name: str, pattern: str = GPT2_PATTERN) -> None:
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise InputError(f"{name}: its ranks are not 0 to {len(ranks) - 1}, each exactly once")
        if len(ranks) + 1 > MAX_VOCAB_SIZE:
            raise InputError(
                f"{name}: vocabulary of {len(ranks) + 1} does not fit uint16 ids (at most {MAX_VOCAB_SIZE})"
            )
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise InputError(f"{name}: no rank for byte {missing[0]}, so some text could not be encoded")
        self.name = name
        self.pattern = pattern
        self.ranks = ranks
        self._encoding = self._split_by(pattern)

    def _split_by(self, pattern: str) -> tiktoken.Encoding:
        eot = {EOT: len(self.ranks)}
        try:
            return tiktoken.Encoding(self.name, pat_str=pattern, mergeable_ranks=self.ranks, special_tokens=eot)
        except ValueError as error:
            fault = f"tiktoken cannot read its pattern {pattern[:60]!r} ({first_line(error)})"
            raise InputError(f"{self.name}: {fault}") from error

    @functools.cached_property
    def _whole(self) -> tiktoken.Encoding:
        """Return the same byte pairs with a pattern to which any text is one word."""
        return self._split_by(r"[\s\S]+")

    @property
    def vocab_size(self) -> int:
        return len(self.ranks) + 1

    @property
    def eot_id(self) -> int:
        return len(self.ranks)

    def encode(self, text: str) -> Ids:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, which becomes U+FFFD as in tiktoken's own `encode_ordinary`
            return self.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except ValueError:  # its regular expressions gave up
            return self.encode_in_pieces(text)

    def encode_in_pieces(self, text: str, long_run: int = LONG_RUN) -> Ids:
        """Return the ids that `encode` would return if tiktoken's regular expressions had no limit; see `pieces_of`."""
        pieces = pieces_of(text, self.pattern, long_run)
        encodings = ((self._whole if is_word else self._encoding, piece) for piece, is_word in pieces)
        ids = [each.encode_to_numpy(piece, disallowed_special=()) for each, piece in encodings]
        return np.concatenate([np.empty(0, dtype=np.uint32), *ids])

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self._encoding.decode_bytes([index for index in ids if index != self.eot_id])

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self.ranks.items():
            lengths[index] = len(token)
        return lengths

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "bpe",
            "name": self.name,
            "vocab_size": self.vocab_size,
            "eot_id": self.eot_id,
            "sha256": hashlib.sha256(self._rank_lines.encode("ascii")).hexdigest(),
            "pattern": self.pattern,
        }

    def save(self, directory: Path) -> None:
        (directory / FOLDER).mkdir(parents=True, exist_ok=True)
        write_atomically(directory / FOLDER / RANKS_FILE, self._rank_lines)
        super().save(directory)

    @functools.cached_property
    def _rank_lines(self) -> str:
        in_order = sorted(self.ranks, key=self.ranks.__getitem__)
        encoded = (binascii.b2a_base64(token, newline=False).decode("ascii") for token in in_order)
        return "".join(f"{token} {rank}\n" for rank, token in enumerate(encoded))


def read_description(directory: Path) -> tuple[Path, dict[str, Any]]:
    """Return the tokenizer's folder, directory/tokenizer or `directory` itself, and `Tokenizer.describe()` of it.

    Raise InputError if it was altered. Only plain files inside `directory` are read, through no link that leaves it.
    """
    with reading_from(directory):
        folder = directory / FOLDER if (directory / FOLDER).is_dir() else directory
    path = folder / DESCRIPTION_FILE
    if not is_there(path):
        raise InputError(f"{path}: missing; a data or run directory keeps its tokenizer there")
    content = read_regular(path, inside=directory)
    try:
        description = parse_json(content)
    except ValueError as error:
        raise InputError(f"{path}: damaged ({first_line(error)[:200]})") from error
    if (fault := misfit(description, {"check": str})) is not None:
        raise InputError(f"{path}: damaged ({fault})")
    if description.pop("check") != sha256_of_json(description):
        raise InputError(f"{path}: was altered since it was written")
    fault = misfit(description, {"kind": frozenset(FORMS)}) or misfit(description, FORMS[description["kind"]])
    if fault is not None:
        raise InputError(f"{path}: damaged ({fault})")
    return folder, description


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer that `read_description` finds. Raise InputError if a file of it was altered."""
    folder, description = read_description(directory)
    path = folder / DESCRIPTION_FILE
    ranks = _read_ranks(folder / RANKS_FILE, inside=directory) if description["kind"] == "bpe" else {}
    try:
        tokenizer = _tokenizer_of(description, ranks)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if tokenizer.describe() != description:
        raise InputError(f"{path}: the tokenizer is not the one it describes; one of its files was altered")
    return tokenizer


def _tokenizer_of(description: dict[str, Any], ranks: dict[bytes, int]) -> Tokenizer:
    match description["kind"]:
        case "char":
            return CharTokenizer(description["alphabet"])
        case "byte":
            return ByteTokenizer()
        case _:
            return BpeTokenizer(ranks, name=description["name"], pattern=description["pattern"])


def make_tokenizer(name: str, alphabet: str) -> Tokenizer:
    """Return the tokenizer for `--tokenizer NAME`: char (over `alphabet`), byte, gpt2, a rank file or a folder."""
    match name:
        case "char":
            return CharTokenizer(alphabet)
        case "byte":
            return ByteTokenizer()
        case "gpt2":
            return _gpt2()
    path = Path(name)
    with reading_from(f"--tokenizer {name}"):
        if path.is_dir():
            return load_tokenizer(path)
        if path.exists():
            return BpeTokenizer(_read_ranks(path), name=path.stem)
    raise InputError(f"--tokenizer {name}: neither char, byte or gpt2, nor a .tiktoken rank file or tokenizer folder")


def _gpt2() -> BpeTokenizer:
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # The errors of `requests`, with which tiktoken downloads, are OSErrors.
        raise InputError(
            "--tokenizer gpt2: tiktoken could not download GPT-2's vocabulary "
            f"({type(error).__name__}); where there is no network set TIKTOKEN_CACHE_DIR to a folder that holds it, "
            "or give a rank file: --tokenizer gpt2.tiktoken"
        ) from error
    return BpeTokenizer(dict(encoding._mergeable_ranks), name="gpt2")


def _read_ranks(path: Path, *, inside: Path | None = None) -> dict[bytes, int]:
    if not is_there(path):
        raise InputError(f"{path}: no such rank file")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_regular(path, inside=inside).splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[binascii.a2b_base64(token, strict_mode=True)] = int(rank)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not a `base64-token rank` line of a tiktoken rank file") from error
    return ranks
