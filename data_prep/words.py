"""The words of a text, for which byte pairs are merged, where tiktoken's own regular expressions give up.

tiktoken finds the words of almost every text by itself, and fastest. But it remembers each character of a run of white
space, and gives up at a million of them.
"""

import re
from collections.abc import Iterator

import regex

from common.errors import InputError

# GPT-2's split pattern in the possessive form that tiktoken ships (openai_public.py, r50k_pat_str).
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# Unicode's White_Space, which is `\s` to tiktoken. Python's own `\s` has four control characters more.
WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_RUN = 2**17  # characters
OTHER_PATTERN_SECONDS = 60.0  # most time for the words of one text, since a pattern may take exponential time


def pieces_of(text: str, pattern: str, long_run: int = LONG_RUN) -> Iterator[tuple[str, bool]]:
    """Yield the text in pieces, each with whether it is one word. No word crosses two pieces, in linear time.

    With GPT-2's pattern, that is exact: the words of the pieces are those of an engine without a limit. With any other,
    each piece is a word that `regex` finds. `regex` knows newer characters than tiktoken does, and may read syntax in
    which regular expressions differ (`$` before a last line end) in another way. Raise InputError if it takes too long.
    """
    if pattern == GPT2_PATTERN:
        yield from cut_long_runs(text, long_run)
        return
    try:
        for word in regex.finditer(pattern, text, timeout=OTHER_PATTERN_SECONDS):
            yield word.group(), True
    except (regex.error, TimeoutError) as error:
        fault = f"the tokenizer's pattern {pattern[:60]!r} finds no words in a text of {len(text)} characters"
        raise InputError(f"{fault} ({error}); use another tokenizer") from error


def cut_long_runs(text: str, long_run: int) -> Iterator[tuple[str, bool]]:
    """Yield pieces whose words by GPT-2's pattern are those of the whole text, as `pieces_of` does.

    Every run of white space of `long_run` >= 2 characters is a piece that is one word, without its last character if
    anything follows. White space follows nothing else inside a word of the pattern, so each run begins a word. The word
    ends with the text, or one character before the run does: that character may go with what follows it.
    """
    begin = 0
    for run in re.finditer(f"[{WHITE_SPACE}]{{{long_run},}}", text):
        end = run.end() if run.end() == len(text) else run.end() - 1
        yield text[begin : run.start()], False
        yield text[run.start() : end], True
        begin = end
    yield text[begin:], False
