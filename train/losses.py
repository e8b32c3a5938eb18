"""Cross-entropy as a sum over tokens, plain and chunked: any split of a batch adds up to the same number.

The chunked loss computes the logits of some thousand positions at a time and, in training, their gradient at once. So
the logits of a micro-batch (B x T x V, the largest tensor of a small GPT-2) never exist. It multiplies the same
matrices the same number of times as the plain loss; only the order of the additions differs.

torch 2.13's F.linear_cross_entropy does not serve here: it returns the sum in the dtype of its input (in bf16 three
digits), adds up the weight's gradient in that dtype too, and has no soft cap.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.base import LanguageModel, softcap_slope, softcapped
from model.config import ModelConfig, Softcap
from model.linear import linear
from train.parallel import fp8
from train.parallel.fp8 import Scaled

IGNORED = -100  # a target that is not scored


class Head(NamedTuple):
    """The head's weights in the compute dtype, and for --train.fp8 in 8-bit floats by rows and by columns."""

    weight_VD: Tensor
    rows: Scaled | None = None
    columns: Scaled | None = None


ChunkFunction = Callable[..., tuple[Tensor, Tensor, Tensor]]


def token_losses(logits_NV: Tensor, targets_N: Tensor, vocab_size: int, softcap: Softcap | None = None) -> Tensor:
    """Return the loss of each token in nats, fp32 [N], 0 where the target is ignored.

    Columns of `logits_NV` from `vocab_size` on are padding. The logits are not capped yet.
    """
    logits_NV = softcapped(logits_NV[:, :vocab_size].float(), softcap)
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="none")


def plain_loss(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    scale: Tensor,
    vocab_size: int,
    softcap: Softcap | None = None,
    *,
    product: Callable[[Tensor, Tensor], Tensor] = linear,
) -> Tensor:
    """Return fp32 [2]: (sum of the token losses) x scale, and the sum itself without a gradient."""
    logits_NV = softcapped(product(x_ND, weight_VD.to(x_ND.dtype))[:, :vocab_size].float(), softcap)
    loss = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="sum")
    return torch.stack([loss * scale, loss.detach()])


def chunk_loss(
    x_nD: Tensor, head: Head, targets_n: Tensor, scale: Tensor, vocab_size: int, softcap: Softcap | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a chunk's sum of token losses, fp32, and the gradients of (sum x scale) by its logits and by x.

    The gradients are [n, V] and [n, D] in x's dtype. d loss / d logit = softmax - one-hot (Bridle 1990, equation 8), 0
    for ignored targets and in padding columns; a soft cap multiplies it by its slope.
    """
    if head.rows is None:
        logits_nV = linear(x_nD, head.weight_VD)
    else:
        logits_nV = fp8.product(fp8.scaled(x_nD), head.rows, x_nD.dtype, is_forward=True)
    logits_nV = softcapped(logits_nV.float(), softcap)
    slope_nV = None if softcap is None else softcap_slope(logits_nV, softcap)
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
    gradient_nV = gradient_nV.to(x_nD.dtype)
    if head.columns is None:
        x_gradient_nD = gradient_nV @ head.weight_VD
    else:
        x_gradient_nD = fp8.product(fp8.scaled(gradient_nV), head.columns, x_nD.dtype, is_forward=False)
    return losses_n.sum(), gradient_nV, x_gradient_nD


def make_head(weight_VD: Tensor, *, is_fp8: bool) -> Head:
    """Return the head's weights as `chunk_loss` reads them."""
    return Head(weight_VD, fp8.scaled(weight_VD), fp8.scaled(weight_VD.t().contiguous())) if is_fp8 else Head(weight_VD)


def add_product(total_VD: Tensor, gradient_nV: Tensor, x_nD: Tensor) -> None:
    """Add gradient^T @ x, a product of any dtype with fp32 sums, to an fp32 total, in place."""
    if gradient_nV.dtype == total_VD.dtype:
        total_VD.addmm_(gradient_nV.T, x_nD)
    elif total_VD.is_cuda:  # the product adds its fp32 sums itself, and no [V, D] in x's dtype is written and read
        torch.addmm(total_VD, gradient_nV.T, x_nD, out_dtype=total_VD.dtype, out=total_VD)
    else:
        total_VD += gradient_nV.T @ x_nD


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
        softcap: Softcap | None,
        chunk_tokens: int,
        prepare_head: Callable[[Tensor], Head],
        score_chunk: ChunkFunction,
    ) -> Tensor:
        head = prepare_head(weight_VD.to(x_ND.dtype))
        x_gradient = torch.empty_like(x_ND)
        weight_gradient = torch.zeros_like(weight_VD)
        loss = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        for start in range(0, len(x_ND), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            chunk_sum, gradient_nV, x_gradient[chunk] = score_chunk(
                x_ND[chunk], head, targets_N[chunk], scale, vocab_size, softcap
            )
            loss += chunk_sum
            add_product(weight_gradient, gradient_nV, x_ND[chunk])
            del gradient_nV  # else it is still there while the next chunk's logits are
        ctx.save_for_backward(x_gradient, weight_gradient)
        return torch.stack([loss * scale, loss])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients of element 0; element 1, the sum itself, is only read and carries none."""
        x_gradient, weight_gradient = ctx.saved_tensors
        outer = gradients[0][0]
        return x_gradient * outer, weight_gradient * outer, *[None] * 7


class LossModel(nn.Module):
    """The model and its loss in one module: what trains, and what is wrapped for many processes.

    inputs_BT, targets_BT, scale [] -> fp32 [2]: (sum of the token losses) x scale, to call backward on, and the sum. A
    model with dropout also needs seeds_B.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        chunk_tokens: int | None,
        is_fp8: bool = False,
        compiled: bool = False,
        mode: str = "default",
    ) -> None:
        """`chunk_tokens` None: the plain loss. `is_fp8`: the head's products in training are in FP8."""
        super().__init__()
        self.model = model
        self._chunk_tokens = chunk_tokens
        self._plain: Callable[..., Tensor] = partial(plain_loss, product=fp8.linear) if is_fp8 else plain_loss
        self._head: Callable[..., Head] = partial(make_head, is_fp8=is_fp8)
        self._chunk: ChunkFunction = chunk_loss
        self._tokens: Callable[..., Tensor] = token_losses
        if compiled:
            compiles = partial(torch.compile, dynamic=False, mode=mode)
            self._plain, self._chunk, self._tokens = map(compiles, (self._plain, chunk_loss, token_losses))
            self._head = compiles(self._head) if is_fp8 else self._head

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, scale: Tensor, seeds_B: Tensor | None = None) -> Tensor:
        assert (seeds_B is not None) == (self.config.dropout > 0)
        x_ND, targets_N = self.model.training_states(inputs_BT, seeds_B).flatten(0, 1), targets_BT.flatten()
        arguments = x_ND, self.model.lm_head.weight, targets_N, scale, self.config.vocab_size, self.config.softcap
        if self._chunk_tokens is None:
            return self._plain(*arguments)
        losses: Tensor = ChunkedCrossEntropy.apply(*arguments, self._chunk_tokens, self._head, self._chunk)
        return losses

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
        size = self._chunk_tokens or len(x_ND)
        losses = [
            self._tokens(self.model.lm_head(x_nD), targets_n, self.config.vocab_size, self.config.softcap)
            for x_nD, targets_n in zip(x_ND.split(size), targets_N.split(size), strict=True)
        ]
        return torch.cat(losses).view_as(targets_BT)
