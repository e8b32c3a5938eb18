"""Convert configurations and tensors between our GPT and Hugging Face's GPT2LMHeadModel.

Parameter names are the same on both sides. Hugging Face stores the block matrices as Conv1D, the transpose of
nn.Linear, and has no vocabulary padding.
"""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError
from model.base import EMBEDDING, HEAD
from model.config import GPT2, ModelConfig, flag_of
from model.layers import NORM_EPS

# GPT2Config expresses the first two as n_inner and tie_word_embeddings; the others change the training alone.
EXPRESSIBLE = ("mlp_width", "tie", "zero_init_projections", "zero_init_head", "dropout")
CONV1D_SUFFIXES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
POSITIONS = "transformer.wpe.weight"

SIZES = {
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "width": "n_embd",
    "context_len": "n_positions",
    "vocab_size": "vocab_size",
}
LARGEST_SIZE = 1_000_000  # far above any GPT-2, and far below an overflow when sizes are multiplied
ACTIVATIONS = {"gelu": "gelu_new", "silu": "silu", "relu2": "relu2"}  # our names -> names in ACT2FN of transformers
OTHER_SPELLINGS = {"gelu_pytorch_tanh": "gelu", "swish": "silu"}
# Settings of GPT2Config that our model only supports at their default.
FIXED: dict[str, Any] = {
    "layer_norm_epsilon": NORM_EPS,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "quantization_config": None,
    "auto_map": None,  # It names code in the folder as the model.
}


def check_expressible(config: ModelConfig) -> None:
    """Raise InputError, naming the flags, if GPT2LMHeadModel cannot be this model."""
    switched = config.switched()
    if config.mlp in ACTIVATIONS:
        switched.pop("mlp", None)
    if config.attention == "naive":
        switched.pop("attention", None)
    flags = [f"{flag_of(name)} {value}" for name, value in switched.items() if name not in EXPRESSIBLE]
    if flags:
        raise InputError(f"GPT2LMHeadModel has no {', '.join(flags)}; only GPT-2's own architecture can be exported")


def to_hugging_face(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return our tensors for GPT2LMHeadModel.load_state_dict: matrices transposed, vocabulary padding cut off."""
    check_expressible(config)
    return {
        name: _transposed(name, tensor)[: config.vocab_size if name in (EMBEDDING, HEAD) else None]
        for name, tensor in state_dict.items()
    }


def as_ours(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Return our parameter `name`, given GPT2LMHeadModel's tensor of the same name."""
    padding = config.padded_vocab_size - tensor.shape[0] if name in (EMBEDDING, HEAD) else 0
    return torch.nn.functional.pad(tensor, (0, 0, 0, padding)) if padding else _transposed(name, tensor)


def _transposed(name: str, tensor: Tensor) -> Tensor:
    return tensor.T.contiguous() if name.endswith(CONV1D_SUFFIXES) else tensor


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of this model as a GPT2LMHeadModel, without dropout, whatever its training had."""
    check_expressible(config)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "n_inner": config.mlp_width,
        "activation_function": ACTIVATIONS[config.mlp],
        "layer_norm_epsilon": NORM_EPS,
        "tie_word_embeddings": config.tie,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": config.eot_id,
        "eos_token_id": config.eot_id,
        "dtype": "float32",
    }


def from_json(content: Any, path: Path) -> ModelConfig:
    """Return the model that config.json describes. Absent settings have GPT2Config's default, that of GPT-2 small.

    `eot_id` is None, since only the tokenizer knows it. Raise InputError, naming the settings, if our GPT cannot be
    this model.
    """
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != "gpt2":
        raise InputError(f'{path}: "model_type" is {reprlib.repr(kind)}; only "gpt2" can be read')
    sizes = {ours: content.get(theirs, getattr(GPT2, ours)) for ours, theirs in SIZES.items()}
    n_inner = content.get("n_inner")
    stored_sizes = {theirs: sizes[ours] for ours, theirs in SIZES.items()}
    stored_sizes |= {} if n_inner is None else {"n_inner": n_inner}
    faults = [
        f"{name} {reprlib.repr(value)} (a whole number from 1 to {LARGEST_SIZE:,} is needed)"
        for name, value in stored_sizes.items()
        if type(value) is not int or not 1 <= value <= LARGEST_SIZE
    ]
    if not faults and sizes["width"] % sizes["num_heads"]:
        faults.append(f"n_embd {sizes['width']} (not divisible by n_head {sizes['num_heads']})")
    activations: dict[str, Any] = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | OTHER_SPELLINGS
    activation, tie = content.get("activation_function", "gelu_new"), content.get("tie_word_embeddings", True)
    if not isinstance(activation, str) or activation not in activations:
        faults.append(f"activation_function {reprlib.repr(activation)} (there are {', '.join(activations)})")
    if not isinstance(tie, bool):
        faults.append(f"tie_word_embeddings {reprlib.repr(tie)} (true or false)")
    fixed = FIXED | {"n_ctx": sizes["context_len"]}  # n_ctx was once another name of n_positions
    faults += [
        f"{name} {reprlib.repr(content[name])} (only {json.dumps(value)})"
        for name, value in fixed.items()
        if content.get(name, value) != value
    ]
    if faults:
        raise InputError(f"{path}: our GPT has no {'; '.join(faults)}")
    mlp_width = None if n_inner == 4 * sizes["width"] else n_inner
    return ModelConfig(**sizes, mlp_width=mlp_width, mlp=activations[activation], tie=tie, eot_id=None)
