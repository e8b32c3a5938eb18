"""The KV cache of generation, with which a new token costs one token's work. Shape letters as in model/gpt.py.

A row's window is the tokens that the model sees of it. Token s of the window has position s and slot s of the row's S
slots. So rows of different lengths lie side by side, padded on the right: each has the positions that it would have
alone, and no token sees a slot that has not been written.

A window cannot slide here. Without its oldest token every other token has another position and has seen less, so no
cached key or value would be right. model/generation/decoding.py then fills the row anew.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig


class BlockCache(NamedTuple):
    """One block's part of the cache, keys and values [rows, H, S, K], for one pass of B rows by T tokens."""

    keys: Tensor
    values: Tensor
    rows_B1: Tensor
    positions_BT: Tensor
    num_slots: int | None

    def update(self, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store this pass's keys and values; return all that its tokens may look at, [B, H, S, K] each."""
        self.keys[self.rows_B1, :, self.positions_BT] = k_BHTK.transpose(1, 2)
        self.values[self.rows_B1, :, self.positions_BT] = v_BHTK.transpose(1, 2)
        if self.num_slots is None:
            return k_BHTK, v_BHTK
        B = len(k_BHTK)
        return self.keys[:B, :, : self.num_slots], self.values[:B, :, : self.num_slots]


class KVCache:
    """Keys and values of every block for `num_rows` windows of up to context_len tokens."""

    def __init__(
        self, config: ModelConfig, *, num_rows: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (num_rows, config.num_heads, config.context_len, config.head_size)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)] for _ in range(2)
        )
        self.window = config.window
        self.eot_id = config.eot_id if config.attention == "flex" else None
        # Attention within documents needs to know where the last document began.
        self.tokens = (
            None if self.eot_id is None else torch.zeros(num_rows, config.context_len, dtype=torch.int64, device=device)
        )


class Past(NamedTuple):
    """The cached tokens before a pass over B rows by T tokens.

    `positions_BT` are the positions of the pass's tokens and `rows_B` their rows of the cache. The pass reads the first
    `num_slots` slots of rows 0 to B - 1, which must then be its rows. None: the windows begin with this pass, so it
    looks at itself only.
    """

    cache: KVCache
    rows_B: Tensor
    positions_BT: Tensor
    num_slots: int | None = None

    def of_block(self, index: int) -> BlockCache:
        keys, values = self.cache.keys[index], self.cache.values[index]
        return BlockCache(keys, values, self.rows_B[:, None], self.positions_BT, self.num_slots)

    def visible(self, tokens_BT: Tensor) -> Tensor | None:
        """Return which slots each token may look at, bool [B, 1, T, S]; None for the mask that a pass
        without a cache has.

        Store the pass's tokens too, if attention stays within documents.
        """
        T = tokens_BT.shape[1]
        tokens = self.cache.tokens
        if tokens is not None:
            tokens[self.rows_B[:, None], self.positions_BT] = tokens_BT
        elif self.num_slots is None:
            return None
        num_slots = T if self.num_slots is None else self.num_slots
        slots_S = torch.arange(num_slots, device=tokens_BT.device)
        visible_BTS = slots_S <= self.positions_BT[:, :, None]
        if self.cache.window is not None:
            visible_BTS = visible_BTS & (slots_S > self.positions_BT[:, :, None] - self.cache.window)
        if tokens is not None:
            assert self.cache.eot_id is not None
            document_BS = tokens[self.rows_B, :num_slots].eq(self.cache.eot_id).cumsum(dim=1)
            visible_BTS = visible_BTS & (document_BS[:, None] == document_BS.gather(1, self.positions_BT)[:, :, None])
        return visible_BTS[:, None]
