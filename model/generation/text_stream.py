"""Text from one row's tokens, as soon as it is certain, and the reason why the text ends."""

import codecs
from collections.abc import Sequence
from typing import Literal

from data_prep.tokenizer import Tokenizer

StoppedBy = Literal["eot", "stop", "max_tokens"]


class Continuation:
    """The text of a row's new tokens, which ends at end of text, a stop string or `max_tokens` tokens.

    A stop string may span tokens. The first one that is complete ends the text; if several end at the same character,
    the longest counts. The stop string and everything after it are no part of the text.

    `tokens` holds all added tokens, those of the stop string too, but not end of text. `text` holds only characters
    that are certain: whole ones (broken ones become U+FFFD) that cannot begin a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_tokens: int, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._stop_strings = stop_strings
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending = ""  # decoded, but not certain yet
        self.tokens: list[int] = []
        self.text = ""
        self.stopped_by: StoppedBy | None = None

    def add(self, token: int) -> None:
        """Add the row's next token, and its text as far as it is certain."""
        assert self.stopped_by is None
        if token == self._tokenizer.eot_id:
            self.stopped_by = "eot"
        else:
            self.tokens.append(token)
            self._pending += self._decoder.decode(self._tokenizer.decode_bytes([token]))
            if len(self.tokens) == self._max_tokens:
                self.stopped_by = "max_tokens"
        if self.stopped_by is not None:
            self._pending += self._decoder.decode(b"", final=True)
        if self._cut_at_stop_string():
            self.stopped_by = "stop"
        num_certain = len(self._pending) - (0 if self.stopped_by else self._num_uncertain())
        self.text += self._pending[:num_certain]
        self._pending = self._pending[num_certain:]

    def _cut_at_stop_string(self) -> bool:
        """Cut the pending text at the first complete stop string; return whether there is one."""
        begins = [(self._pending.find(stop), stop) for stop in self._stop_strings if stop in self._pending]
        if begins:
            _, begin = min((begin + len(stop), begin) for begin, stop in begins)
            self._pending = self._pending[:begin]
        return bool(begins)

    def _num_uncertain(self) -> int:
        """Return the length of the longest end of the pending text that begins a stop string."""
        longest = min(max(map(len, self._stop_strings), default=1) - 1, len(self._pending))
        ends = (self._pending[-n:] for n in range(longest, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stop_strings)), 0)
