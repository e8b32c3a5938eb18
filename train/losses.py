"""Cross-entropy as a sum over tokens, plain and chunked: any split of a batch adds up to the same number.

The chunked loss computes the logits of CHUNK_TOKENS positions at a time and, in training, their gradient at once. So
the logits of a micro-batch (B x T x V, the largest tensor of a small GPT-2) never exist. It multiplies the same
matrices the same number of times as the plain loss; only the order of the additions differs.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.base import LanguageModel, softcapped
from model.config import ModelConfig

IGNORED = -100  # a target that is not scored
CHUNK_TOKENS = 1024  # 206 MB of fp32 logits with GPT-2's vocabulary

ChunkFunction = Callable[..., tuple[Tensor, Tensor]]


def token_losses(logits_NV: Tensor, targets_N: Tensor, vocab_size: int, cap: float | None = None) -> Tensor:
    """Return the loss of each token in nats, fp32 [N], 0 where the target is ignored.

    Columns of `logits_NV` from `vocab_size` on are padding. The logits are not capped yet; `cap`:
    --model.logit-softcap.
    """
    logits_NV = softcapped(logits_NV[:, :vocab_size].float(), cap)
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="none")


def plain_loss(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, scale: Tensor, vocab_size: int, cap: float | None = None
) -> Tensor:
    """Return fp32 [2]: (sum of the token losses) x scale, and the sum itself without a gradient."""
    logits_NV = softcapped(F.linear(x_ND, weight_VD.to(x_ND.dtype))[:, :vocab_size].float(), cap)
    loss = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="sum")
    return torch.stack([loss * scale, loss.detach()])


def chunk_loss(
    x_nD: Tensor, weight_VD: Tensor, targets_n: Tensor, scale: Tensor, vocab_size: int, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return a chunk's sum of token losses, fp32, and the gradient of (sum x scale) by its logits, [n, V] in x's dtype.

    d loss / d logit = softmax - one-hot (Bridle 1990, equation 8), 0 for ignored targets and in padding columns; and
    d tanh(y) / dy = 1 - tanh(y)^2.
    """
    logits_nV = softcapped(F.linear(x_nD, weight_VD).float(), cap)
    slope_nV = None if cap is None else 1 - (logits_nV / cap).square()
    logits_nV[:, vocab_size:] = -torch.inf
    is_scored_n = targets_n != IGNORED
    target_n1 = targets_n.clamp(min=0)[:, None]
    log_sum_n = logits_nV.logsumexp(dim=1)
    losses_n = torch.where(is_scored_n, log_sum_n - logits_nV.gather(1, target_n1)[:, 0], 0.0)
    gradient_nV = (logits_nV - log_sum_n[:, None]).exp()
    gradient_nV = gradient_nV.scatter_add(1, target_n1, torch.full_like(log_sum_n, -1.0)[:, None])
    gradient_nV = gradient_nV * (scale * is_scored_n)[:, None]
    if slope_nV is not None:
        gradient_nV = gradient_nV * slope_nV
    return losses_n.sum(), gradient_nV.to(x_nD.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """`plain_loss`, chunk by chunk. Gradients are computed in the forward pass, while a chunk's logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        scale: Tensor,
        vocab_size: int,
        cap: float | None,
        score_chunk: ChunkFunction,
    ) -> Tensor:
        weight = weight_VD.to(x_ND.dtype)
        x_gradient = torch.empty_like(x_ND)
        weight_gradient = torch.zeros_like(weight_VD)
        loss = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        for start in range(0, len(x_ND), CHUNK_TOKENS):
            x_nD, targets_n = x_ND[start : start + CHUNK_TOKENS], targets_N[start : start + CHUNK_TOKENS]
            chunk_sum, gradient_nV = score_chunk(x_nD, weight, targets_n, scale, vocab_size, cap)
            loss += chunk_sum
            torch.mm(gradient_nV, weight, out=x_gradient[start : start + CHUNK_TOKENS])
            if gradient_nV.dtype == weight_gradient.dtype:
                weight_gradient.addmm_(gradient_nV.T, x_nD)
            else:
                weight_gradient += gradient_nV.T @ x_nD
            del gradient_nV  # else it is still there while the next chunk's logits are
        ctx.save_for_backward(x_gradient, weight_gradient)
        return torch.stack([loss * scale, loss])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients of element 0; element 1, the sum itself, is only read and carries none."""
        x_gradient, weight_gradient = ctx.saved_tensors
        outer = gradients[0][0]
        return x_gradient * outer, weight_gradient * outer, None, None, None, None, None


class LossModel(nn.Module):
    """The model and its loss in one module: what trains, and what is wrapped for many processes.

    inputs_BT, targets_BT, scale [] -> fp32 [2]: (sum of the token losses) x scale, to call backward on, and the sum.
    """

    def __init__(self, model: LanguageModel, *, chunked: bool, compiled: bool = False, mode: str = "default") -> None:
        super().__init__()
        self.model = model
        self._is_chunked = chunked
        self._plain: Callable[..., Tensor] = plain_loss
        self._chunk: ChunkFunction = chunk_loss
        self._tokens: Callable[..., Tensor] = token_losses
        if compiled:
            self._plain = torch.compile(plain_loss, dynamic=False, mode=mode)
            self._chunk = torch.compile(chunk_loss, dynamic=False, mode=mode)
            self._tokens = torch.compile(token_losses, dynamic=False, mode=mode)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, scale: Tensor) -> Tensor:
        x_ND, targets_N = self.model.hidden_states(inputs_BT).flatten(0, 1), targets_BT.flatten()
        weight_VD = self.model.lm_head.weight
        vocab_size, cap = self.config.vocab_size, self.config.logit_softcap
        if self._is_chunked:
            losses: Tensor = ChunkedCrossEntropy.apply(x_ND, weight_VD, targets_N, scale, vocab_size, cap, self._chunk)
            return losses
        return self._plain(x_ND, weight_VD, targets_N, scale, vocab_size, cap)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def logits_at(self, tokens_BT: Tensor, positions_B: Tensor) -> Tensor:
        """Return the model's logits_at, which sampling reads."""
        return self.model.logits_at(tokens_BT, positions_B)

    @torch.no_grad()
    def token_losses(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the loss of each token in nats, fp32 [B, T], 0 where ignored, which evaluations read."""
        x_ND, targets_N = self.model.hidden_states(inputs_BT).flatten(0, 1), targets_BT.flatten()
        size = CHUNK_TOKENS if self._is_chunked else len(x_ND)
        losses = [
            self._tokens(self.model.lm_head(x_nD), targets_n, self.config.vocab_size, self.config.logit_softcap)
            for x_nD, targets_n in zip(x_ND.split(size), targets_N.split(size), strict=True)
        ]
        return torch.cat(losses).view_as(targets_BT)
