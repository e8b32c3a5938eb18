"""Keys and values that generation keeps, so that a new token costs one token's work. Letters as in model/gpt.py.

What a row of the batch has been given is its window. The window's token s stands at position s and in slot s of the
row's S slots, so that rows of different lengths lie side by side, padded on the right: learned positions are what they
are alone, and a slot beyond a row's length is seen by nobody before it has been written.

A window cannot slide here. The oldest token gone, every other one stands elsewhere, and has seen less: nothing that is
kept would be true any more. model/generation/decoding.py fills the row anew then.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig


class BlockCache(NamedTuple):
    """One block's keys and values, [rows, H, S, K] each, as one pass of B rows by T tokens reads and writes them."""

    keys: Tensor
    values: Tensor
    rows_B1: Tensor
    positions_BT: Tensor
    num_slots: int | None

    def update(self, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps the pass's own; gives back all that its tokens may look at."""
        self.keys[self.rows_B1, :, self.positions_BT] = k_BHTK.transpose(1, 2)
        self.values[self.rows_B1, :, self.positions_BT] = v_BHTK.transpose(1, 2)
        if self.num_slots is None:
            return k_BHTK, v_BHTK
        B = len(k_BHTK)
        return self.keys[:B, :, : self.num_slots], self.values[:B, :, : self.num_slots]


class KVCache:
    """Of `num_rows` windows of up to context_len tokens, for every block."""

    def __init__(
        self, config: ModelConfig, *, num_rows: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (num_rows, config.num_heads, config.context_len, config.head_size)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)] for _ in range(2)
        )
        self.eot_id = config.eot_id if config.attention == "flex" else None
        # Attention within documents asks where the last one began.
        self.tokens = (
            None if self.eot_id is None else torch.zeros(num_rows, config.context_len, dtype=torch.int64, device=device)
        )

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.keys + self.values)


class Past(NamedTuple):
    """A pass over B rows by T tokens that follow what the cache has of them.

    places_BT: the tokens' positions. rows_B: their rows of the cache. num_slots: how many slots are read, those of the
    rows 0 to B - 1, the only ones that can be asked for then. None: the windows begin with this pass, which looks at
    nothing but itself.
    """

    cache: KVCache
    rows_B: Tensor
    positions_BT: Tensor
    num_slots: int | None = None

    def of_block(self, index: int) -> BlockCache:
        keys, values = self.cache.keys[index], self.cache.values[index]
        return BlockCache(keys, values, self.rows_B[:, None], self.positions_BT, self.num_slots)

    def visible(self, tokens_BT: Tensor) -> Tensor | None:
        """Which slots each token may look at, bool [B, 1, T, S]; None: each what came before it, and itself."""
        T = tokens_BT.shape[1]
        tokens = self.cache.tokens
        if tokens is not None:
            tokens[self.rows_B[:, None], self.positions_BT] = tokens_BT
        elif self.num_slots is None:
            return None
        num_slots = T if self.num_slots is None else self.num_slots
        slots_S = torch.arange(num_slots, device=tokens_BT.device)
        visible_BTS = slots_S <= self.positions_BT[:, :, None]
        if tokens is not None:
            assert self.cache.eot_id is not None
            document_BS = tokens[self.rows_B, :num_slots].eq(self.cache.eot_id).cumsum(dim=1)
            visible_BTS = visible_BTS & (document_BS[:, None] == document_BS.gather(1, self.positions_BT)[:, :, None])
        return visible_BTS[:, None]
