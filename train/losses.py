"""Losses as sums over tokens, so that any split of a batch adds up to the same number."""

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a target that is not scored


def summed_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, vocab_size: int) -> Tensor:
    """Sum in fp32 of the token losses in nats; columns from `vocab_size` on are padding and do not exist."""
    logits_NV = logits_BTV[..., :vocab_size].float().flatten(0, 1)
    return F.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")
