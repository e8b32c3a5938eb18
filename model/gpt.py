"""GPT-2 (Radford et al. 2019) and what the switches of model/config.py make of it, plain and single-device.

It knows nothing of processes or training. Attention is in model/attention.py, the block in model/blocks.py.
Tensors carry their shape: B batch, T time, D model, H heads, K head size, F feed-forward, V padded vocabulary.
State-dict names are Hugging Face's, every matrix in nn.Linear's orientation.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.attention import Shared, document_mask, rope_rotation
from model.blocks import Block
from model.config import ModelConfig
from model.layers import Linear, make_norm, softcapped

INIT_STD = 0.02  # Radford et al. 2018, section 4.1
VALUE_MIX = 0.5  # a block's own values and the first block's in equal parts
VOCAB_NAMES = ("transformer.wte.weight", "lm_head.weight")


class GPT(nn.Module):
    """tokens_BT int64 -> logits_BTV in `compute_dtype`; V is the padded vocabulary.

    Parameters are fp32. `compute_dtype` is the dtype of the residual stream and of every matrix product;
    norms are computed in fp32, and the losses and samplers that read the logits turn them to fp32.
    Raises ValueError when T exceeds `config.context_len`.
    """

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        parts: dict[str, nn.Module] = {"wte": nn.Embedding(config.padded_vocab_size, config.width)}
        if config.positions == "learned":
            parts["wpe"] = nn.Embedding(config.context_len, config.width)
        parts["h"] = nn.ModuleList(Block(config, is_first=index == 0) for index in range(config.num_layers))
        parts["ln_f"] = make_norm(config) if config.has_last_norm else nn.Identity()
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = Linear(config.width, config.padded_vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head and the token embedding one parameter (again), if the config says so."""
        embedding = self.transformer["wte"]
        assert isinstance(embedding, nn.Embedding)
        if self.config.tie:
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

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.logits(self.features(tokens_BT))

    def logits_at(self, tokens_BT: Tensor, places_B: Tensor) -> Tensor:
        """The logits at one place of each row, [B, V]: all that sampling needs of them."""
        return self.logits(self.features(tokens_BT)[torch.arange(len(places_B), device=places_B.device), places_B])

    def logits(self, x: Tensor) -> Tensor:
        """What the head makes of features [..., D], [..., V], capped if the config says so."""
        logits = self.lm_head(x)
        cap = self.config.logit_softcap
        return logits if cap is None else softcapped(logits.float(), cap).to(logits.dtype)

    def features(self, tokens_BT: Tensor) -> Tensor:
        """The residual stream after the last block, normalised, x_BTD: what the head reads."""
        config, T = self.config, tokens_BT.shape[1]
        if config.context_len < T:
            raise ValueError(f"{T} tokens exceed the model's context of {config.context_len}")
        x_BTD = self.transformer["wte"](tokens_BT)
        if config.positions == "learned":
            x_BTD = x_BTD + self.transformer["wpe"](torch.arange(T, device=tokens_BT.device))
        x_BTD = x_BTD.to(self.compute_dtype)
        shared = Shared(
            rotation=rope_rotation(T, config.head_size, tokens_BT.device) if config.positions == "rope" else None,
            mask=document_mask(tokens_BT, config.eot_id) if config.attention == "flex" else None,
        )
        for block in self.blocks:
            x_BTD, values_BHTK = block(x_BTD, shared)
            if values_BHTK is not None:
                shared = shared._replace(first_values_BHTK=values_BHTK)
        return self.transformer["ln_f"](x_BTD)


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


@torch.no_grad()
def init_weights(model: GPT, seed: int, put: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
    """GPT-2's initialisation: normal(0, 0.02), residual projections / sqrt(2 L) (or 0), biases 0, norms 1.

    Each parameter is drawn whole, on the CPU, by a generator of its own, seeded by (seed, name): neither the
    device, the number of processes, nor another parameter's presence changes it. Padding rows are 0. `put` writes a
    whole value into its parameter, or into what a process holds of it.
    """
    config = model.config
    residual_std = INIT_STD / math.sqrt(2 * config.num_layers)  # Radford et al. 2019, section 2.3
    for name, parameter in model.named_parameters():
        value = torch.zeros(parameter.shape)
        if name.endswith("value_mix"):
            value.fill_(VALUE_MIX)
        elif (".ln_" in name or "_norm." in name) and name.endswith("weight"):
            value.fill_(1.0)
        elif not name.endswith("bias") and not (config.zero_init_projections and name.endswith("c_proj.weight")):
            std = residual_std if name.endswith("c_proj.weight") else INIT_STD
            rows = config.vocab_size if name in VOCAB_NAMES else parameter.shape[0]
            value[:rows].normal_(0.0, std, generator=_generator(seed, name))
        put(parameter, value)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
