"""Convert our tokenizers to the tokenizer.json of transformers and tokenizers, and back, with equal ids for every text.

tiktoken merges any two neighbours whose joined bytes are a token, the lowest rank first. Hugging Face merges the pairs
of a list. We recover the list by splitting each token with the ranks below its own. Some ranks come from no list of
merges: Hugging Face would split a token that tiktoken keeps. Such ranks are refused.

The text `<|endoftext|>` is ordinary text to our tokenizers. Hugging Face turns it into the special token, unless
`split_special_tokens` is set, as in our tokenizer_config.json. A bare `tokenizers.Tokenizer` needs
`encode_special_tokens = True` instead.

A character outside a character tokenizer's alphabet is an error on both sides ("Missing [UNK] token").
"""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import InputError
from data_prep.tokenizer import (
    BYTE_ORDER,
    EOT,
    GPT2_PATTERN,
    SHOWN,
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
)
from model.hf.files import has_file, read_content, read_json

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"  # GPT-2's older form, which we read but never write
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # of GPT-2's ranks, from `describe`
# How a vocabulary writes each byte: printable Latin-1 as itself, any other byte as a character from 256 on.
CHARACTER_OF = {byte: chr(byte) if byte in SHOWN else chr(256 + n - len(SHOWN)) for n, byte in enumerate(BYTE_ORDER)}
BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}

Json = dict[str, Any]


# --- Write ------------------------------------------------------------------------------------------------------------


def tokenizer_json(tokenizer: Tokenizer) -> Json:
    """Return the content of tokenizer.json. Raise InputError for byte pairs that it cannot express."""
    pre_tokenizer: Json
    if isinstance(tokenizer, CharTokenizer):
        pre_tokenizer = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        model: Json = {"type": "WordLevel", "vocab": tokenizer.stoi, "unk_token": ""}
        decoder: Json = {"type": "Fuse"}
    else:
        has_pairs = isinstance(tokenizer, BpeTokenizer)
        pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": has_pairs}
        model = _byte_pairs(tokenizer) if isinstance(tokenizer, BpeTokenizer) else _single_bytes()
        decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [] if tokenizer.eot_id is None else [{"id": tokenizer.eot_id, "content": EOT, **special}],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def tokenizer_config(tokenizer: Tokenizer, context_len: int) -> Json:
    """Return the content of tokenizer_config.json. Its class reads tokenizer.json in old and new transformers."""
    eot = {} if tokenizer.eot_id is None else {"bos_token": EOT, "eos_token": EOT}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_len,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        **eot,
    }


def _byte_pairs(tokenizer: BpeTokenizer) -> Json:
    """Return the model part of tokenizer.json for byte pairs."""
    if tokenizer.pattern != GPT2_PATTERN:
        raise InputError(f"{tokenizer.name} splits text with another pattern than GPT-2's")
    vocab = {_as_characters(token): rank for token, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1])}
    merges = [f"{_as_characters(first)} {_as_characters(second)}" for first, second in merges_of(tokenizer.ranks)]
    return _bpe(vocab | {EOT: tokenizer.eot_id}, merges)


def _single_bytes() -> Json:
    """Return the model part of tokenizer.json for bytes without merges."""
    return _bpe({CHARACTER_OF[byte]: byte for byte in range(256)}, [])


def _bpe(vocab: dict[str, int], merges: list[str]) -> Json:
    settings = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **settings, **flags, "vocab": vocab, "merges": merges}


def _as_characters(token: bytes) -> str:
    return "".join(CHARACTER_OF[byte] for byte in token)


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the pair of tokens that makes each longer token, in order of rank (0.7 s for GPT-2's 50,000)."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[index : index + 1] for index in range(len(token))]
        while len(parts) > 2:
            pair_ranks = [ranks.get(parts[index] + parts[index + 1], rank) for index in range(len(parts) - 1)]
            lowest = min(pair_ranks)
            if lowest >= rank:
                raise InputError(
                    f"no two tokens of lower rank make {reprlib.repr(token)}, rank {rank}: not all ranks are merges"
                )
            index = pair_ranks.index(lowest)
            parts[index : index + 2] = [parts[index] + parts[index + 1]]
        merges.append((parts[0], parts[1]))
    return merges


# --- Read -------------------------------------------------------------------------------------------------------------


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return a folder's tokenizer: GPT-2's, or one that `tokenizer_json` can write. Raise InputError for any other."""
    path = folder / TOKENIZER_FILE
    if has_file(path):
        content = read_json(path)
    elif has_file(folder / VOCAB_FILE) and has_file(folder / MERGES_FILE):
        path = folder / VOCAB_FILE
        content = {"pre_tokenizer": {"type": "ByteLevel"}, "model": _bpe(read_json(path), _read_merges(folder))}
    else:
        raise InputError(f"{folder}: has no {TOKENIZER_FILE}, nor {VOCAB_FILE} and {MERGES_FILE}")
    try:
        tokenizer = _tokenizer_in(content, path.parent.resolve().name)
        differences = _differences(content, tokenizer)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a tokenizer of GPT-2's kind ({type(error).__name__}: {error})") from error
    if differences:
        raise InputError(f"{path}: not a tokenizer of GPT-2's kind: it differs in its {', '.join(differences)}")
    return tokenizer


def _tokenizer_in(content: Json, name: str) -> Tokenizer:
    """Return the tokenizer that the vocabulary makes. `_differences` checks whether the rest of the file agrees."""
    vocab: dict[str, int] = content["model"]["vocab"]
    if any(type(index) is not int for index in vocab.values()):
        raise InputError("some ids of its vocabulary are no whole numbers")
    if content["model"].get("type") == "WordLevel":
        return CharTokenizer("".join(sorted(vocab, key=vocab.__getitem__)))
    if vocab == _single_bytes()["vocab"]:
        return ByteTokenizer()
    ranks = {}
    for token, index in vocab.items():
        if token != EOT:
            if not set(token) <= BYTE_OF.keys():
                raise InputError(f"{reprlib.repr(token)} in its vocabulary stands for no bytes")
            ranks[bytes(BYTE_OF[character] for character in token)] = index
    tokenizer = BpeTokenizer(ranks, name=name)
    return BpeTokenizer(ranks, name="gpt2") if tokenizer.describe()["sha256"] == GPT2_SHA256 else tokenizer


def _differences(content: Json, tokenizer: Tokenizer) -> list[str]:
    """Return the parts of tokenizer.json that would give some text other ids than `tokenizer` does."""
    expected = tokenizer_json(tokenizer)
    parts = ("normalizer", "pre_tokenizer", "model")
    differences = [part for part in parts if _canonical(content.get(part)) != _canonical(expected[part])]
    special = [(token["content"], token["id"]) for token in content.get("added_tokens") or []]
    special += [(EOT, index) for token, index in content["model"]["vocab"].items() if token == EOT]
    if set(special) - {(EOT, tokenizer.eot_id)}:
        differences.append("special tokens")
    return differences


def _canonical(part: Json | None) -> Json | None:
    """Return a part of tokenizer.json in one spelling, without the settings that change no ids."""
    if part is None:
        return None
    ignored = ["trim_offsets"] + (["type", "unk_token", "fuse_unk"] if "merges" in part else [])
    canonical = {name: value for name, value in part.items() if value not in (None, False, "") and name not in ignored}
    if part.get("type") == "ByteLevel":
        canonical["use_regex"] = part.get("use_regex", True)
    if "merges" in part:
        canonical["vocab"] = {token: index for token, index in part["vocab"].items() if token != EOT}
        canonical["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in part["merges"]]
    return canonical


def _read_merges(folder: Path) -> list[str]:
    path = folder / MERGES_FILE
    try:
        lines = read_content(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: damaged ({error})") from error
    return [line for line in lines if line and not line.startswith("#version")]
