"""A codec as the tokenizer.json that transformers and tokenizers load, and back. Ids are equal for every text.

Byte pairs: tiktoken merges any two neighbours whose bytes together are a token, the lowest rank first; Hugging Face
merges listed pairs. The list is found again by splitting each token with the ranks below its own. Ranks that no list of
merges makes are refused: there a token would come out as one here and as several there.

Text that reads `<|endoftext|>` is ordinary text here. Hugging Face makes the special token of it, unless
`split_special_tokens` is set, as our tokenizer_config.json does; a bare `tokenizers.Tokenizer` wants
`encode_special_tokens = True`.

Characters: one that the alphabet lacks is an error on both sides ("Missing [UNK] token").
"""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import InputError, reading_from
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
from model.hf.format import read_json

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"  # the same in GPT-2's older form, which is only read
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # of its ranks, as `describe` hashes
# The character that stands for a byte in a vocabulary: itself where Latin-1 shows it, else one from 256 on.
CHARACTER_OF = {byte: chr(byte) if byte in SHOWN else chr(256 + n - len(SHOWN)) for n, byte in enumerate(BYTE_ORDER)}
BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}

Json = dict[str, Any]


# --- Written ----------------------------------------------------------------------------------------------------------


def tokenizer_json(tokenizer: Tokenizer) -> Json:
    """tokenizer.json. InputError for byte pairs that it cannot say."""
    pre_tokenizer: Json
    if isinstance(tokenizer, CharTokenizer):
        pre_tokenizer = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        model: Json = {"type": "WordLevel", "vocab": tokenizer.stoi, "unk_token": ""}
        decoder: Json = {"type": "Fuse"}
    else:
        pairs = isinstance(tokenizer, BpeTokenizer)
        pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pairs}
        model = _byte_pairs(tokenizer) if isinstance(tokenizer, BpeTokenizer) else _bytes_alone()
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
    """tokenizer_config.json: the class takes tokenizer.json as it stands, in old and new transformers."""
    eot = {} if tokenizer.eot_id is None else {"bos_token": EOT, "eos_token": EOT}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_len,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        **eot,
    }


def _byte_pairs(tokenizer: BpeTokenizer) -> Json:
    if tokenizer.pattern != GPT2_PATTERN:
        raise InputError(f"{tokenizer.name} splits text by another pattern than GPT-2's")
    vocab = {_shown(token): rank for token, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1])}
    merges = [f"{_shown(first)} {_shown(second)}" for first, second in merges_of(tokenizer.ranks)]
    return _bpe(vocab | {EOT: tokenizer.eot_id}, merges)


def _bytes_alone() -> Json:
    return _bpe({CHARACTER_OF[byte]: byte for byte in range(256)}, [])


def _bpe(vocab: dict[str, int], merges: list[str]) -> Json:
    settings = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **settings, **flags, "vocab": vocab, "merges": merges}


def _shown(token: bytes) -> str:
    return "".join(CHARACTER_OF[byte] for byte in token)


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two tokens that each longer one is merged from, in order of rank (0.7 s for GPT-2's 50,000)."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[place : place + 1] for place in range(len(token))]
        while len(parts) > 2:
            below = [ranks.get(parts[place] + parts[place + 1], rank) for place in range(len(parts) - 1)]
            lowest = min(below)
            if lowest >= rank:
                raise InputError(
                    f"no two tokens of lower rank make {reprlib.repr(token)}, rank {rank}: not all are merges"
                )
            place = below.index(lowest)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        merges.append((parts[0], parts[1]))
    return merges


# --- Read -------------------------------------------------------------------------------------------------------------


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder: GPT-2's, or one that `tokenizer_json` could have written. InputError for any other."""
    path = folder / TOKENIZER_FILE
    if path.is_file():
        content = read_json(path)
    elif (folder / VOCAB_FILE).is_file() and (folder / MERGES_FILE).is_file():
        path = folder / VOCAB_FILE
        content = {"pre_tokenizer": {"type": "ByteLevel"}, "model": _bpe(read_json(path), _read_merges(folder))}
    else:
        raise InputError(f"{folder}: has no {TOKENIZER_FILE}, nor {VOCAB_FILE} and {MERGES_FILE}")
    try:
        tokenizer = _tokenizer_in(content, path.parent.resolve().name)
        odd = _differences(content, tokenizer)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: no tokenizer of GPT-2's kind ({type(error).__name__}: {error})") from error
    if odd:
        raise InputError(f"{path}: another kind of tokenizer than GPT-2's, in its {', '.join(odd)}")
    return tokenizer


def _tokenizer_in(content: Json, name: str) -> Tokenizer:
    """What the vocabulary says; whether the rest of the file says the same is `_differences`' to find."""
    vocab: dict[str, int] = content["model"]["vocab"]
    if any(type(index) is not int for index in vocab.values()):
        raise InputError("ids of its vocabulary are no whole numbers")
    if content["model"].get("type") == "WordLevel":
        return CharTokenizer("".join(sorted(vocab, key=vocab.__getitem__)))
    if vocab == _bytes_alone()["vocab"]:
        return ByteTokenizer()
    ranks = {}
    for token, index in vocab.items():
        if token != EOT:
            if not set(token) <= BYTE_OF.keys():
                raise InputError(f"{reprlib.repr(token)} in its vocabulary stands for no bytes")
            ranks[bytes(BYTE_OF[character] for character in token)] = index
    tokenizer = BpeTokenizer(ranks, name=name)
    return BpeTokenizer(ranks, name="gpt2") if tokenizer.describe()["sha256"] == GPT2_SHA256 else tokenizer


def _differences(found: Json, tokenizer: Tokenizer) -> list[str]:
    """The parts that decide which text has which ids, where they are not as they would be written of `codec`."""
    wanted = tokenizer_json(tokenizer)
    odd = [part for part in ("normalizer", "pre_tokenizer", "model") if _plain(found.get(part)) != _plain(wanted[part])]
    special = [(token["content"], token["id"]) for token in found.get("added_tokens") or []]
    special += [(EOT, index) for token, index in found["model"]["vocab"].items() if token == EOT]
    if set(special) - {(EOT, tokenizer.eot_id)}:
        odd.append("special tokens")
    return odd


def _plain(part: Json | None) -> Json | None:
    """Without what changes no ids, and in one of the several spellings that there are."""
    if part is None:
        return None
    idle = ["trim_offsets"] + (["type", "unk_token", "fuse_unk"] if "merges" in part else [])
    plain = {name: value for name, value in part.items() if value not in (None, False, "") and name not in idle}
    if part.get("type") == "ByteLevel":
        plain["use_regex"] = part.get("use_regex", True)
    if "merges" in part:
        plain["vocab"] = {token: index for token, index in part["vocab"].items() if token != EOT}
        plain["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in part["merges"]]
    return plain


def _read_merges(folder: Path) -> list[str]:
    path = folder / MERGES_FILE
    try:
        with reading_from(path):
            lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: damaged ({error})") from error
    return [line for line in lines if line and not line.startswith("#version")]
