"""Weights between our state dict and that of Hugging Face's GPT2LMHeadModel. Names are the same on both sides.

Hugging Face keeps the block matrices as Conv1D, the transpose of nn.Linear, and no vocabulary padding.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from data_prep.errors import InputError
from model.config import ModelConfig, flag_of

# What GPT2Config can say in its own words: n_inner, activation_function, tie_word_embeddings. Or what is no part of the
# trained model.
EXPRESSIBLE = ("hidden_size", "tie", "zero_init_projections")
CONV1D_SUFFIXES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
VOCAB_KEYS = ("transformer.wte.weight", "lm_head.weight")


def check_expressible(config: ModelConfig) -> None:
    """InputError, naming the switches, for a model that GPT2LMHeadModel cannot be."""
    switched = config.switched()
    if config.mlp != "swiglu":
        switched.pop("mlp", None)  # ACT2FN has "gelu_new", "relu2" and "silu"
    if config.attention == "naive":
        switched.pop("attention", None)
    odd = [f"{flag_of(name)} {value}" for name, value in switched.items() if name not in EXPRESSIBLE]
    if odd:
        raise InputError(f"GPT2LMHeadModel has no {', '.join(odd)}; only GPT-2's own form can be Hugging Face's")


def to_hugging_face(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors as GPT2LMHeadModel.load_state_dict takes them: transposed back, padding cut off."""
    check_expressible(config)
    return {
        name: _transposed(name, tensor)[: _rows(name, tensor, config.vocab_size)] for name, tensor in state_dict.items()
    }


def from_hugging_face(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """GPT2LMHeadModel's tensors as GPT.load_state_dict takes them: transposed, padded by zero rows."""
    check_expressible(config)
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
