"""Weights between our state dict and that of Hugging Face's GPT2LMHeadModel. Names are the same on both sides.

Hugging Face keeps the block matrices as Conv1D, the transpose of nn.Linear, and no vocabulary padding.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from model.config import ModelConfig

CONV1D_SUFFIXES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
VOCAB_KEYS = ("transformer.wte.weight", "lm_head.weight")


def to_hugging_face(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors as GPT2LMHeadModel.load_state_dict takes them: transposed back, padding cut off."""
    return {
        name: _transposed(name, tensor)[: _rows(name, tensor, config.vocab_size)] for name, tensor in state_dict.items()
    }


def from_hugging_face(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """GPT2LMHeadModel's tensors as GPT.load_state_dict takes them: transposed, padded by zero rows."""
    ours = {}
    for name, tensor in state_dict.items():
        padding = config.padded_vocab_size - tensor.shape[0] if name in VOCAB_KEYS else 0
        ours[name] = (
            torch.nn.functional.pad(_transposed(name, tensor), (0, 0, 0, padding))
            if padding
            else _transposed(name, tensor)
        )
    return ours


def _transposed(name: str, tensor: Tensor) -> Tensor:
    return tensor.T.contiguous() if name.endswith(CONV1D_SUFFIXES) else tensor


def _rows(name: str, tensor: Tensor, vocab_size: int) -> int | None:
    return vocab_size if name in VOCAB_KEYS else None
