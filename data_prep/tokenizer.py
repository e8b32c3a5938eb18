"""One tokenizer interface: characters, bytes, GPT-2's byte pairs, or any tiktoken rank file.

A codec is saved as plain files beside the shards (tokenizer/codec.json, and ranks.tiktoken for byte pairs),
so that no later stage needs the network and nothing is ever unpickled.

(Not `codecs.py`: that name belongs to the standard library.)
"""

import binascii
import functools
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tiktoken

from common.errors import InputError
from common.files import write_atomically, write_json_atomically
from data_prep.shards import MAX_VOCAB_SIZE

FOLDER = "tokenizer"
DESCRIPTION_FILE = "codec.json"
RANKS_FILE = "ranks.tiktoken"
EOT = "<|endoftext|>"
# GPT-2's split pattern in the possessive form that tiktoken ships (openai_public.py, r50k_pat_str).
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# GPT-2's vocabulary begins with the bytes that Latin-1 can show, then come the others (encoder.py, bytes_to_unicode).
SHOWN = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
BYTE_ORDER = [*SHOWN, *(byte for byte in range(256) if byte not in SHOWN)]

Ids = npt.NDArray[np.integer]


class Tokenizer(Protocol):
    """Text to token ids and back. `eot_id` begins each document, or is None where there is no such token."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eot_id(self) -> int | None: ...

    def encode(self, text: str) -> Ids:
        """Token ids [n]. Text that looks like a special token is ordinary text."""
        ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of the ids; a part of a character may stand at either end."""
        ...

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes of each id, 0 for EOT: int64 [vocab_size]."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the manifest records: kind, vocab_size, eot_id, sha256, and what the kind needs to be rebuilt."""
        ...

    def save(self, directory: Path) -> None:
        """Write the codec's files into directory/tokenizer."""
        ...


def encode_or_fault(tokenizer: Tokenizer, text: str) -> Ids | InputError:
    """The text's ids, or why it cannot be encoded."""
    try:
        return tokenizer.encode(text)
    except InputError as fault:
        return fault


def gives_same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Does every text have the same ids in both? The name of a vocabulary decides nothing."""
    first, second = ({k: v for k, v in tokenizer.describe().items() if k != "name"} for tokenizer in (one, other))
    return first == second


def name_of(tokenizer: Tokenizer) -> str:
    """For people: gpt2 (50,257 ids, sha256 306cd27f)."""
    about = tokenizer.describe()
    return f"{about.get('name', about['kind'])} ({tokenizer.vocab_size:,} ids, sha256 {about['sha256'][:8]})"


def alphabet_of(text: str) -> set[str]:
    """The distinct characters of `text`."""
    if len(text) < 2**18:
        return set(text)
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    for _, code_points in _code_points(text):
        seen[code_points] = True
    return {chr(code_point) for code_point in np.flatnonzero(seen)}


def _code_points(text: str) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
    """(place, code points from there), a megabyte at a time: whole texts would take 4 bytes a character and more."""
    for begin in range(0, len(text), 2**18):
        block = text[begin : begin + 2**18]
        yield begin, np.frombuffer(block.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class CharTokenizer:
    """One id per character, in code-point order. `itos` is the alphabet, `stoi` its inverse."""

    def __init__(self, alphabet: str) -> None:
        if len(alphabet) > MAX_VOCAB_SIZE:
            raise InputError(f"{len(alphabet)} distinct characters do not fit uint16 ids; use --tokenizer byte")
        if not alphabet or list(alphabet) != sorted(set(alphabet)):
            raise InputError("the alphabet of a char tokenizer must be distinct characters in order")
        if any("\ud800" <= character <= "\udfff" for character in alphabet):
            raise InputError("a lone surrogate is no character and has no UTF-8 bytes; remove it from the text")
        self.itos = alphabet
        self.stoi = {character: index for index, character in enumerate(alphabet)}
        self._ids = np.full(ord(alphabet[-1]) + 2, -1, dtype=np.int32)  # by code point; the last stands for all above
        self._ids[[ord(character) for character in alphabet]] = np.arange(len(alphabet))

    @property
    def vocab_size(self) -> int:
        return len(self.itos)

    @property
    def eot_id(self) -> None:
        return None

    def encode(self, text: str) -> Ids:
        ids = np.empty(len(text), dtype=np.uint16)
        for begin, code_points in _code_points(text):
            found = self._ids[np.minimum(code_points, len(self._ids) - 1)]
            if (found < 0).any():
                place = begin + int(np.argmax(found < 0))
                raise InputError(
                    f"character {text[place]!r} at {place} is not among this tokenizer's {self.vocab_size}"
                )
            ids[begin : begin + len(found)] = found
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return "".join(self.itos[index] for index in ids).encode("utf-8")

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(character.encode("utf-8")) for character in self.itos], dtype=np.int64)

    def describe(self) -> dict[str, Any]:
        sha256 = hashlib.sha256(self.itos.encode("utf-8")).hexdigest()
        return {
            "kind": "char",
            "vocab_size": self.vocab_size,
            "eot_id": None,
            "sha256": sha256,
            "alphabet": self.itos,
        }

    def save(self, directory: Path) -> None:
        _save_description(self, directory)


class ByteTokenizer:
    """One id per UTF-8 byte: 256 ids, no training, any text."""

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def eot_id(self) -> None:
        return None

    def encode(self, text: str) -> Ids:
        try:
            return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        except UnicodeEncodeError as error:
            raise InputError(f"lone surrogate at {error.start}, which has no UTF-8 bytes") from error

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return bytes(ids)

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        return np.ones(256, dtype=np.int64)

    def describe(self) -> dict[str, Any]:
        sha256 = hashlib.sha256(bytes(range(256))).hexdigest()
        return {"kind": "byte", "vocab_size": 256, "eot_id": None, "sha256": sha256}

    def save(self, directory: Path) -> None:
        _save_description(self, directory)


class BpeTokenizer:
    """Byte pairs served by tiktoken. EOT is the id after the last rank and is never produced by `encode`."""

    def __init__(self, ranks: dict[bytes, int], *, name: str, pattern: str = GPT2_PATTERN) -> None:
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise InputError(f"{name}: its ranks are not 0 to {len(ranks) - 1}, each once")
        if len(ranks) + 1 > MAX_VOCAB_SIZE:
            raise InputError(
                f"{name}: vocabulary of {len(ranks) + 1} does not fit uint16 ids (at most {MAX_VOCAB_SIZE})"
            )
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise InputError(f"{name}: no rank for byte {missing[0]}, so some text could not be encoded")
        self.name = name
        self._pattern = pattern
        self._ranks = ranks
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)}
        )

    @property
    def vocab_size(self) -> int:
        return len(self._ranks) + 1

    @property
    def eot_id(self) -> int:
        return len(self._ranks)

    @property
    def ranks(self) -> Mapping[bytes, int]:
        """The bytes of every id but EOT's."""
        return self._ranks

    @property
    def pattern(self) -> str:
        """What splits text into words, which no token crosses."""
        return self._pattern

    def encode(self, text: str) -> Ids:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, which encode_ordinary replaces
            return np.array(self._encoding.encode_ordinary(text), dtype=np.uint32)
        except ValueError as error:  # its regular expressions give up on a run of a million blanks
            raise InputError(
                f"tokenizer {self.name} gave up on this text ({error}); break up its longest run"
            ) from error

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self._encoding.decode_bytes([index for index in ids if index != self.eot_id])

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._ranks.items():
            lengths[index] = len(token)
        return lengths

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "bpe",
            "name": self.name,
            "vocab_size": self.vocab_size,
            "eot_id": self.eot_id,
            "sha256": hashlib.sha256(self._rank_lines.encode("ascii")).hexdigest(),
            "pattern": self._pattern,
        }

    def save(self, directory: Path) -> None:
        (directory / FOLDER).mkdir(parents=True, exist_ok=True)
        write_atomically(directory / FOLDER / RANKS_FILE, self._rank_lines)
        _save_description(self, directory)

    @functools.cached_property
    def _rank_lines(self) -> str:
        in_order = sorted(self._ranks, key=self._ranks.__getitem__)
        encoded = (binascii.b2a_base64(token, newline=False).decode("ascii") for token in in_order)
        return "".join(f"{token} {rank}\n" for rank, token in enumerate(encoded))


def _save_description(tokenizer: Tokenizer, directory: Path) -> None:
    (directory / FOLDER).mkdir(parents=True, exist_ok=True)
    description = tokenizer.describe()
    content = description | {"check": _hash_of(description)}
    write_json_atomically(directory / FOLDER / DESCRIPTION_FILE, content)


def _hash_of(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode("ascii")).hexdigest()


def load_tokenizer(directory: Path) -> Tokenizer:
    """The codec saved in directory/tokenizer (or in `directory` itself), its hash checked."""
    folder = directory / FOLDER if (directory / FOLDER).is_dir() else directory
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise InputError(f"{path}: missing; a data or run directory keeps its tokenizer there")
    tokenizer: Tokenizer
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if description.pop("check") != _hash_of(description):
            raise InputError(f"{path}: was altered since it was written")
        match description["kind"]:
            case "char":
                tokenizer = CharTokenizer(description["alphabet"])
            case "byte":
                tokenizer = ByteTokenizer()
            case "bpe":
                ranks = _read_ranks(folder / RANKS_FILE)
                tokenizer = BpeTokenizer(ranks, name=description["name"], pattern=description["pattern"])
            case kind:
                raise InputError(f"{path}: unknown kind of tokenizer {kind!r}")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    if tokenizer.describe() != description:
        raise InputError(f"{path}: the tokenizer is not the one it describes; one of its files was altered")
    return tokenizer


def make_tokenizer(name: str, alphabet: str) -> Tokenizer:
    """The codec for `--tokenizer NAME`: char (over `alphabet`), byte, gpt2, a rank file or a saved folder."""
    match name:
        case "char":
            return CharTokenizer(alphabet)
        case "byte":
            return ByteTokenizer()
        case "gpt2":
            return _gpt2()
    path = Path(name)
    if path.is_dir():
        return load_tokenizer(path)
    if path.is_file():
        return BpeTokenizer(_read_ranks(path), name=path.stem)
    raise InputError(f"--tokenizer {name}: neither char, byte or gpt2, nor a .tiktoken rank file or tokenizer folder")


def _gpt2() -> BpeTokenizer:
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:  # requests' errors are OSErrors
        raise InputError(
            "--tokenizer gpt2: tiktoken could not download GPT-2's vocabulary "
            f"({type(error).__name__}); where there is no network set TIKTOKEN_CACHE_DIR to a folder that holds it, "
            "or give a rank file: --tokenizer gpt2.tiktoken"
        ) from error
    return BpeTokenizer(dict(encoding._mergeable_ranks), name="gpt2")


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    if not path.is_file():
        raise InputError(f"{path}: no such rank file")
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[binascii.a2b_base64(token, strict_mode=True)] = int(rank)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not a `base64-token rank` line of a tiktoken rank file") from error
    return ranks
