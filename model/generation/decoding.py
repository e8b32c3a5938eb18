"""Generate rows of tokens side by side, with a KV cache or without one.

The model sees a row's window. At first the window is the whole row. When it grows longer than the context, it is cut to
its last `keep` tokens and grows again from there. By default `keep` is context_len, so the model always sees its last
context_len tokens. But then the window moves with each token, no cached value stays right, and each token costs a
whole pass. A smaller `keep` costs one pass of `keep` tokens every context_len - keep + 1 tokens, and forgets more. The
tokens are the same with and without a cache.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from model.base import LanguageModel
from model.config import ModelConfig
from model.generation.kv_cache import KVCache, Past
from model.generation.sampling import Sampling, choices, draw
from model.gpt import GPT
from model.layers import Linear


@dataclass
class Row:
    """A prompt and the tokens drawn after it. The caller sets `is_done` to end it."""

    tokens: list[int]
    generator: torch.Generator
    is_done: bool = False
    start: int = 0  # where its window begins
    num_cached: int = 0  # tokens of its window whose keys and values are cached

    def window(self, context_len: int, keep: int | None) -> list[int]:
        """Return the tokens that the model sees now; cut the window first if it exceeds the context."""
        if len(self.tokens) - self.start > context_len:
            self.start, self.num_cached = len(self.tokens) - (keep or context_len), 0
        return self.tokens[self.start :]


class Passes(Protocol):
    """A way to compute the next logits of rows by passes of a model."""

    @property
    def config(self) -> ModelConfig: ...

    def next_logits(self, rows: Sequence[Row]) -> Tensor:
        """Return the logits of the token after each row, [B, V]; anything finite for a row that is done."""
        ...


def generate_rows(passes: Passes, rows: Sequence[Row], *, sampling: Sampling) -> Iterator[list[int | None]]:
    """Append a token to every row again and again until all are done, and yield the tokens of each round.

    A row that is done gets no token; its entry is None.
    """
    while not all(row.is_done for row in rows):
        distributions = choices(passes.next_logits(rows), sampling, passes.config.vocab_size)
        tokens = draw(distributions, [None if row.is_done else row.generator for row in rows])
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.tokens.append(token)
        yield tokens


# --- Without a cache --------------------------------------------------------------------------------------------------


class Predictor(Protocol):
    """The part of a model that whole passes use: a LanguageModel, or a wrapper around a distributed one."""

    @property
    def config(self) -> ModelConfig: ...

    def logits_at(self, tokens_BT: Tensor, positions_B: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[Parameter]: ...


class WholePasses:
    """Passes over whole windows for every token, padded on the right, where the causal mask hides the padding.

    With `num_rows` every pass has the shape [num_rows, context_len]. A compiled model is then not compiled again for
    each length, nor at all if it already knows that shape. None: only as many rows and tokens as there are.
    """

    def __init__(self, model: Predictor, *, num_rows: int | None = None, keep: int | None = None) -> None:
        self._model = model
        self._num_rows = num_rows
        self._keep = keep

    @property
    def config(self) -> ModelConfig:
        return self._model.config

    @torch.no_grad()
    def next_logits(self, rows: Sequence[Row]) -> Tensor:
        context_len = self.config.context_len
        windows = [row.window(context_len, self._keep) for row in rows]
        shape = (len(rows), max(map(len, windows))) if self._num_rows is None else (self._num_rows, context_len)
        device = next(self._model.parameters()).device
        tokens_BT, last_B = padded(windows, shape)
        return self._model.logits_at(tokens_BT.to(device), last_B.to(device))[: len(rows)]


def padded(windows: Sequence[Sequence[int]], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the windows in a tensor of this shape, filled up with zeros, and the position of each last token."""
    tokens_BT, last_B = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape[0], dtype=torch.int64)
    for index, window in enumerate(windows):
        tokens_BT[index, : len(window)] = torch.tensor(window)
        last_B[index] = len(window) - 1
    return tokens_BT, last_B


# --- With a cache -----------------------------------------------------------------------------------------------------


class CachedPasses:
    """Passes with a KV cache: a prefill of a row's window when it begins, then one token of every row at a time.

    `compile_backend` names torch.compile's backend for the one-token step; None: no compilation. A compiled step is
    compiled once, because it always computes all `num_rows` rows and reads the whole cache.
    """

    def __init__(
        self, model: GPT, *, num_rows: int, keep: int | None = None, compile_backend: str | None = None
    ) -> None:
        self._model = model
        self._keep = keep
        self._is_compiled = compile_backend is not None
        self._device = next(model.parameters()).device
        self.cache = KVCache(model.config, num_rows=num_rows, dtype=model.compute_dtype, device=self._device)
        self._rows = torch.arange(num_rows, device=self._device)
        self._step = self._decode
        if compile_backend is not None:
            self._step = torch.compile(self._decode, fullgraph=True, dynamic=False, backend=compile_backend)

    @property
    def config(self) -> ModelConfig:
        return self._model.config

    @torch.no_grad()
    def next_logits(self, rows: Sequence[Row]) -> Tensor:
        context_len = self.config.context_len
        windows = {i: row.window(context_len, self._keep) for i, row in enumerate(rows) if not row.is_done}
        cached = {i: window for i, window in windows.items() if rows[i].num_cached}
        new = {i: window for i, window in windows.items() if not rows[i].num_cached}
        shape = (len(rows), self.config.padded_vocab_size)
        logits_BV = torch.zeros(shape, dtype=self._model.compute_dtype, device=self._device)
        if cached:
            assert all(rows[i].num_cached == len(window) - 1 for i, window in cached.items())
            logits_BV[list(cached)] = self.decode(cached)
        if new:  # after decoding, which writes to slot 0 of all the other rows
            logits_BV[list(new)] = self.prefill(new)
        for i, window in windows.items():
            rows[i].num_cached = len(window)
        return logits_BV

    def prefill(self, windows: Mapping[int, Sequence[int]]) -> Tensor:
        """Return the logits after each window, [len(windows), V], when none of its tokens is cached."""
        tokens_BT, last_B = padded(list(windows.values()), (len(windows), max(map(len, windows.values()))))
        positions_BT = torch.arange(tokens_BT.shape[1], device=self._device).expand(tokens_BT.shape)
        past = Past(self.cache, self._rows[list(windows)], positions_BT)
        x_BTD = self._model.hidden_states(tokens_BT.to(self._device), past)
        return self._model.logits(x_BTD[torch.arange(len(windows), device=self._device), last_B.to(self._device)])

    def decode(self, windows: Mapping[int, Sequence[int]]) -> Tensor:
        """Return the logits after each window, [len(windows), V], when all but its last token are cached."""
        num_rows, num_slots = max(windows) + 1, max(map(len, windows.values()))
        if self._is_compiled:
            num_rows, num_slots = len(self._rows), self.config.context_len
        tokens_B, positions_B = torch.zeros(2, num_rows, dtype=torch.int64)
        for index, window in windows.items():
            tokens_B[index], positions_B[index] = window[-1], len(window) - 1
        logits_BV = self._step(tokens_B.to(self._device), positions_B.to(self._device), num_slots)
        return logits_BV[list(windows)]

    def _decode(self, tokens_B: Tensor, positions_B: Tensor, num_slots: int) -> Tensor:
        past = Past(self.cache, self._rows[: len(tokens_B)], positions_B[:, None], num_slots)
        return self._model.logits(self._model.hidden_states(tokens_B[:, None], past)[:, 0])


# --- A faster model ---------------------------------------------------------------------------------------------------

HEAD_PARTS = 8


class HeadInParts(Linear):
    """A Linear that on a CPU computes its product as a batch of products with parts of the matrix.

    MKL's own product uses one core only for one row, and takes twice to four times as long as this for two to sixteen
    rows (50,304 x 384, fp32, 2 cores).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        (V, D), B = self.weight.shape, len(x)
        parts = math.gcd(V, HEAD_PARTS)
        products = torch.bmm(self.weight.view(parts, V // parts, D), x.T.expand(parts, D, B))
        return products.reshape(V, B).T


def make_ready(model: LanguageModel) -> None:
    """Change a model so that it generates faster, with the same numbers; it cannot be trained afterwards.

    Each matrix is stored in the dtype of its products, instead of being cast for every token. A tied head becomes a
    tensor of its own, since the embedding stays in fp32. The head's product is computed in parts.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight = nn.Parameter(module.weight.to(model.compute_dtype), requires_grad=False)
    weight = model.lm_head.weight
    with torch.device("meta"):
        head = HeadInParts(weight.shape[1], weight.shape[0], bias=False)
    head.weight = weight
    model.lm_head = head
