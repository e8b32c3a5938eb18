"""What training, validation and sampling need of a model, whatever stands between its tokens and its head.

Letters as in model/gpt.py.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import Linear, softcapped

INIT_STD = 0.02  # Radford et al. 2018, section 4.1
# Parameters with a row for each id. Tied, they are one, which is saved once, under the first name.
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"


class LanguageModel(nn.Module):
    """tokens_BT int64 -> logits_BTV in `compute_dtype`; V is the padded vocabulary.

    Parameters are fp32. `compute_dtype` is the dtype of the residual stream and of every matrix product; the losses and
    samplers that read the logits turn them to fp32. A model of this kind is its `features` and the head `lm_head`.
    """

    lm_head: Linear

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype

    def features(self, tokens_BT: Tensor) -> Tensor:
        """What the head reads, x_BTD. Raises ValueError when T exceeds `config.context_len`."""
        raise NotImplementedError

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Of the parameter `name`, whole; a vocabulary's padding rows are 0."""
        raise NotImplementedError

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

    def check_length(self, tokens_BT: Tensor) -> int:
        """T, if the model has so many positions."""
        T = tokens_BT.shape[1]
        if self.config.context_len < T:
            raise ValueError(f"{T} tokens exceed the model's context of {self.config.context_len}")
        return T

    @property
    def is_tied(self) -> bool:
        """Are the head and the token embedding one parameter?"""
        return False

    def tie_weights(self) -> None:
        """Make them one (again), where they are."""

    @property
    def blocks(self) -> nn.ModuleList:
        """What is alike in it, layer by layer, and can be sharded or computed again layer by layer."""
        return nn.ModuleList()

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """What is worth compiling by itself."""
        return []


@torch.no_grad()
def init_weights(model: LanguageModel, seed: int, put: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
    """The model's initial values.

    Each parameter is drawn whole, on the CPU, by a generator of its own, seeded by (seed, name): neither the
    device, the number of processes, nor another parameter's presence changes it. `put` writes a whole value into its
    parameter, or into what a process holds of it.
    """
    for name, parameter in model.named_parameters():
        put(parameter, model.initial_value(name, parameter.shape, _generator(seed, name)))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
