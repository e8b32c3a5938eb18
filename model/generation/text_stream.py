"""What one row says, token by token: text as soon as it is certain, and why it ends."""

import codecs
from collections.abc import Sequence
from typing import Literal

from data_prep.tokenizer import Tokenizer

StoppedBy = Literal["eot", "stop", "max_tokens"]


class Continuation:
    """Text up to a stop string, which may lie across tokens; the first that is complete ends it, of several that end
    together the longest. Neither it nor anything after it is text.

    `tokens` are all that were added, those of the stop string too, but for the end of text. `text` is what is certain:
    whole characters (broken ones become U+FFFD) that are not the beginning of a stop string, until it ends.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_tokens: int, stop_requests: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._stop_requests = stop_requests
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # decoded, and not certain yet
        self.tokens: list[int] = []
        self.text = ""
        self.stopped_by: StoppedBy | None = None

    def add(self, token: int) -> None:
        assert self.stopped_by is None
        if token == self._tokenizer.eot_id:
            self.stopped_by = "eot"
        else:
            self.tokens.append(token)
            self._held += self._decoder.decode(self._tokenizer.decode_bytes([token]))
            if len(self.tokens) == self._max_tokens:
                self.stopped_by = "max_tokens"
        if self.stopped_by is not None:
            self._held += self._decoder.decode(b"", final=True)
        if self._is_cut():
            self.stopped_by = "stop"
        certain = len(self._held) - (0 if self.stopped_by else self._num_uncertain())
        self.text += self._held[:certain]
        self._held = self._held[certain:]

    def _is_cut(self) -> bool:
        """Cuts off the first stop string and what comes after it; False if there is none."""
        positions = [(self._held.find(stop), stop) for stop in self._stop_requests if stop in self._held]
        if positions:
            _, place = min((place + len(stop), place) for place, stop in positions)
            self._held = self._held[:place]
        return bool(positions)

    def _num_uncertain(self) -> int:
        """Characters at the end that a stop string may begin with."""
        longest = min(max(map(len, self._stop_requests), default=1) - 1, len(self._held))
        ends = (
            n for n in range(longest, 0, -1) if any(stop.startswith(self._held[-n:]) for stop in self._stop_requests)
        )
        return next(ends, 0)
