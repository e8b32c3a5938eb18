"""Rows of tokens that grow together: what the model sees of each, by way of a KV cache or without one.

The model sees a row's window: all of it, until it is longer than the context; then its last `keep` tokens, and those
that follow, until it is longer again. keep = context_len, the default, is what the model was trained for at its most,
its last context_len tokens; but a window that moves with each token leaves nothing in the cache true, and each token
is a whole pass from there on. A smaller `keep` costs one pass of `keep` tokens every context_len - keep + 1 tokens,
and forgets more. With and without a cache the same rule holds and the same tokens come.
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
from model.gpt import GPT, Linear


@dataclass
class Row:
    """A prompt and what was drawn after it. Who reads it sets `is_done`, and nothing more is drawn."""

    tokens: list[int]
    generator: torch.Generator
    is_done: bool = False
    start: int = 0  # of its window
    num_cached: int = 0  # tokens of its window whose keys and values are kept

    def window(self, context_len: int, keep: int | None) -> list[int]:
        """What the model sees of it now."""
        if len(self.tokens) - self.start > context_len:
            self.start, self.num_cached = len(self.tokens) - (keep or context_len), 0
        return self.tokens[self.start :]


class Passes(Protocol):
    """How logits are found: in passes of the model over rows."""

    @property
    def config(self) -> ModelConfig: ...

    def next_logits(self, rows: Sequence[Row]) -> Tensor:
        """Of what follows each row, [B, V]; of one that is done, anything finite."""
        ...


def generate_rows(passes: Passes, rows: Sequence[Row], *, sampling: Sampling) -> Iterator[list[int | None]]:
    """The next token of every row, again and again, None for one that is done. Ends when all are."""
    while not all(row.is_done for row in rows):
        found = choices(passes.next_logits(rows), sampling, passes.config.vocab_size)
        tokens = draw(found, [None if row.is_done else row.generator for row in rows])
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.tokens.append(token)
        yield tokens


# --- Without a cache --------------------------------------------------------------------------------------------------


class Predictor(Protocol):
    """What this needs of a model: a LanguageModel, or what stands around one that is spread over processes."""

    @property
    def config(self) -> ModelConfig: ...

    def logits_at(self, tokens_BT: Tensor, positions_B: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[Parameter]: ...


class WholePasses:
    """Every token is a pass over all windows, padded on the right, where causality hides the padding.

    `num_rows`: the shape of every pass is [num_rows, context_len], so that a compiled model is not compiled again for
    each length, nor for sampling at all if it knows that batch size. None: as few rows and tokens as there are.
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
    """tokens_BT, with zeros behind each window and below them all, and the place of each window's last token."""
    tokens_BT, last_B = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape[0], dtype=torch.int64)
    for index, window in enumerate(windows):
        tokens_BT[index, : len(window)] = torch.tensor(window)
        last_B[index] = len(window) - 1
    return tokens_BT, last_B


# --- With one ---------------------------------------------------------------------------------------------------------


class CachedPasses:
    """Prefill: a row's window in one pass, when it begins. Decode: then one token of every row at a time.

    `compile_backend`: torch.compile's for the decoding step, which is compiled once, since its shapes are then always
    the same: it computes all `num_rows` rows and reads all of the cache, whatever is in them. None: it is not compiled.
    Rows that are done are computed like the others, and nothing is made of it.
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
        begun = {i: window for i, window in windows.items() if rows[i].num_cached}
        new = {i: window for i, window in windows.items() if not rows[i].num_cached}
        shape = (len(rows), self.config.padded_vocab_size)
        logits_BV = torch.zeros(shape, dtype=self._model.compute_dtype, device=self._device)
        if begun:
            assert all(rows[i].num_cached == len(window) - 1 for i, window in begun.items())
            logits_BV[list(begun)] = self.decode(begun)
        if new:  # second, since decoding writes to slot 0 of rows that it is not asked for
            logits_BV[list(new)] = self.prefill(new)
        for i, window in windows.items():
            rows[i].num_cached = len(window)
        return logits_BV

    def prefill(self, windows: Mapping[int, Sequence[int]]) -> Tensor:
        """The logits after each row's window, of which nothing is cached, [len(windows), V]."""
        tokens_BT, last_B = padded(list(windows.values()), (len(windows), max(map(len, windows.values()))))
        positions_BT = torch.arange(tokens_BT.shape[1], device=self._device).expand(tokens_BT.shape)
        past = Past(self.cache, self._rows[list(windows)], positions_BT)
        x_BTD = self._model.hidden_states(tokens_BT.to(self._device), past)
        return self._model.logits(x_BTD[torch.arange(len(windows), device=self._device), last_B.to(self._device)])

    def decode(self, windows: Mapping[int, Sequence[int]]) -> Tensor:
        """The logits after each row's window, of which all but the last token is cached, [len(windows), V]."""
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


# --- A model made ready -----------------------------------------------------------------------------------------------

HEAD_PARTS = 8


class HeadInParts(Linear):
    """The same product, on a CPU as a batch of products with parts of the matrix: for one row MKL leaves all cores but
    one idle, for two to sixteen it takes twice to four times as long as this (50,304 x 384, fp32, 2 cores)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        (V, D), B = self.weight.shape, len(x)
        parts = math.gcd(V, HEAD_PARTS)
        products = torch.bmm(self.weight.view(parts, V // parts, D), x.T.expand(parts, D, B))
        return products.reshape(V, B).T


def make_ready(model: LanguageModel) -> None:
    """For generation alone, with the same numbers: each matrix is held in the dtype that it multiplies in, rather than
    cast for every token (a tied head becomes a tensor of its own, since the embedding is added up in fp32), and the
    head's product is computed in parts."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight = nn.Parameter(module.weight.to(model.compute_dtype), requires_grad=False)
    weight = model.lm_head.weight
    with torch.device("meta"):
        head = HeadInParts(weight.shape[1], weight.shape[0], bias=False)
    head.weight = weight
    model.lm_head = head
