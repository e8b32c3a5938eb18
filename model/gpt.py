"""GPT-2 (Radford et al. 2019) and what the switches of model/config.py make of it, plain and single-device.

It knows nothing of processes or training. Attention is in model/attention.py, the block in model/blocks.py.
Tensors carry their shape: B batch, T time, D model, H heads, K head size, F feed-forward, V padded vocabulary.
State-dict names are Hugging Face's, every matrix in nn.Linear's orientation.
"""

import math

import torch
from torch import Tensor, nn

from model.attention import Shared, document_mask, rope_rotation
from model.blocks import Block
from model.config import ModelConfig
from model.kv_cache import Past
from model.language_model import EMBEDDING, HEAD, INIT_STD, LanguageModel, init_weights
from model.layers import Linear, make_norm

VALUE_MIX = 0.5  # a block's own values and the first block's in equal parts


class GPT(LanguageModel):
    """tokens_BT int64 -> logits_BTV; norms are computed in fp32, the rest in `compute_dtype`."""

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, compute_dtype=compute_dtype)
        parts: dict[str, nn.Module] = {"wte": nn.Embedding(config.padded_vocab_size, config.width)}
        if config.positions == "learned":
            parts["wpe"] = nn.Embedding(config.context_len, config.width)
        parts["h"] = nn.ModuleList(Block(config, is_first=index == 0) for index in range(config.num_layers))
        parts["ln_f"] = make_norm(config) if config.has_last_norm else nn.Identity()
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = Linear(config.width, config.padded_vocab_size, bias=False)
        self.tie_weights()

    @property
    def is_tied(self) -> bool:
        return self.config.tie

    def tie_weights(self) -> None:
        embedding = self.transformer["wte"]
        assert isinstance(embedding, nn.Embedding)
        if self.is_tied:
            self.lm_head.weight = embedding.weight

    @property
    def blocks(self) -> nn.ModuleList:
        blocks = self.transformer["h"]
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """What is worth compiling by itself: the blocks, alike but for the first, and the last norm."""
        return [*self.blocks, *([self.transformer["ln_f"]] if self.config.has_last_norm else [])]

    def features(self, tokens_BT: Tensor, past: Past | None = None) -> Tensor:
        """The residual stream after the last block, normalised; of tokens that follow `past`, if it is given."""
        config, T = self.config, self.check_length(tokens_BT)
        places = torch.arange(T, device=tokens_BT.device) if past is None else past.places_BT
        x_BTD = self.transformer["wte"](tokens_BT)
        if config.positions == "learned":
            x_BTD = x_BTD + self.transformer["wpe"](places)
        x_BTD = x_BTD.to(self.compute_dtype)
        heads_places = places if past is None else places[:, None]  # [T], or [B, 1, T]
        shared = Shared(
            rotation=rope_rotation(heads_places, config.head_size) if config.positions == "rope" else None,
            mask=document_mask(tokens_BT, config.eot_id) if config.attention == "flex" and past is None else None,
            visible_B1TS=None if past is None else past.visible(tokens_BT),
        )
        for index, block in enumerate(self.blocks):
            if past is not None:
                shared = shared._replace(cache=past.of_block(index))
            x_BTD, values_BHTK = block(x_BTD, shared)
            if values_BHTK is not None:
                shared = shared._replace(first_values_BHTK=values_BHTK)
        return self.transformer["ln_f"](x_BTD)

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """GPT-2's: normal(0, 0.02), residual projections / sqrt(2 L) (or 0), biases 0, norms 1."""
        config, value = self.config, torch.zeros(shape)
        if name.endswith("value_mix"):
            value.fill_(VALUE_MIX)
        elif (".ln_" in name or "_norm." in name) and name.endswith("weight"):
            value.fill_(1.0)
        elif not name.endswith("bias") and not (config.zero_init_projections and name.endswith("c_proj.weight")):
            # Radford et al. 2019, section 2.3
            std = INIT_STD / math.sqrt(2 * config.num_layers) if name.endswith("c_proj.weight") else INIT_STD
            rows = config.vocab_size if name in (EMBEDDING, HEAD) else shape[0]
            value[:rows].normal_(0.0, std, generator=generator)
        return value


def build_model(
    config: ModelConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> GPT:
    """A GPT with its initial weights, which depend on the config and the seed alone."""
    with torch.device("meta"):
        model = GPT(config, compute_dtype=compute_dtype)
    model.to_empty(device=device)
    model.tie_weights()
    init_weights(model, seed)
    return model
