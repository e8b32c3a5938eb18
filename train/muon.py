"""Muon (Jordan et al. 2024): momentum, of which each matrix is replaced by an orthogonal matrix near to it.

With the singular value decomposition U S V^T of a matrix, that is U V^T: all directions are learnt at one rate. It is
found by products of matrices alone. train/parallel/state_slices.py spreads matrices over processes.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from model.gpt import num_matrices
from model.linear import product_without_gradient
from train.parallel.apply import local
from train.parallel.state_slices import Grid, MatrixOwners, StateSlices

Polynomial = tuple[float, float, float]  # (a, b, c): a x + b x^3 + c x^5, applied to every singular value x

# Jordan et al. 2024. From 0.001 on, singular values end between 0.47 and 1.21, from 0.01 on between 0.68 and 1.14.
NEWTON_SCHULZ: Sequence[Polynomial] = ((3.4445, -4.7750, 2.0315),) * 5
LEAST_NORM = 1e-7  # so that 0 stays 0: behind projections that begin at 0, other matrices have no gradient at first


Key = TypeVar("Key")


def orthogonalised(
    matrices: Mapping[Key, Tensor], polynomials: Sequence[Polynomial] = NEWTON_SCHULZ
) -> dict[Key, Tensor]:
    """Return for each matrix U S V^T nearly U V^T, in the matrix's dtype.

    On a GPU all matrices of one shape, or of its transpose, are one batch. On a CPU that would save no time, and alone
    a matrix has the same bits whichever others its owner has.
    """
    results: dict[Key, Tensor] = {}
    for keys in _batches(matrices):
        x_BNM = torch.stack([matrices[key].T if _is_tall(matrices[key]) else matrices[key] for key in keys])
        norm_B11 = torch.linalg.vector_norm(x_BNM, dim=(1, 2), keepdim=True, dtype=torch.float32)
        x_BNM.div_(norm_B11.clamp(min=LEAST_NORM))
        for polynomial in polynomials:
            x_BNM = _applied_in_batches(x_BNM, polynomial) if x_BNM.is_cuda else _applied(x_BNM[0], polynomial)[None]
        for key, x_NM in zip(keys, x_BNM, strict=True):
            results[key] = x_NM.T if _is_tall(matrices[key]) else x_NM
    return results


def _batches(matrices: Mapping[Key, Tensor]) -> list[list[Key]]:
    """Return the keys of matrices that are computed together."""
    batches: dict[object, list[Key]] = {}
    for key, matrix in matrices.items():
        batches.setdefault(tuple(sorted(matrix.shape)) if matrix.is_cuda else key, []).append(key)
    return list(batches.values())


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def _applied_in_batches(x_BNM: Tensor, polynomial: Polynomial) -> Tensor:
    """Return a X + (b X X^T + c (X X^T)^2) X."""
    a, b, c = polynomial
    gram_BNN = x_BNM @ x_BNM.mT
    gram_BNN = torch.baddbmm(gram_BNN, gram_BNN, gram_BNN, beta=b, alpha=c)
    return torch.baddbmm(x_BNM, gram_BNN, x_BNM, beta=a)


def _applied(x_NM: Tensor, polynomial: Polynomial) -> Tensor:
    """Return the same of one matrix as (a I + b X X^T + c (X X^T)^2) X, by the faster products of a CPU."""
    a, b, c = polynomial
    gram_NN = product_without_gradient(x_NM, x_NM)
    square_NN = product_without_gradient(gram_NN, gram_NN)  # gram_NN is its own transpose
    factor_NN = torch.add(gram_NN.mul_(b), square_NN, alpha=c)
    factor_NN.diagonal().add_(a)
    return product_without_gradient(factor_NN, x_NM.T)


def cost(shape: Sequence[int]) -> float:
    """Return the multiplications and additions of `orthogonalised` for a matrix."""
    short, long = sorted(shape)
    return len(NEWTON_SCHULZ) * (4 * short**2 * long + 2 * short**3)


def rate_scale(shape: Sequence[int]) -> float:
    """Return the factor of a matrix's learning rate: outputs then change alike for all shapes (Jordan et al. 2024)."""
    rows, columns = shape
    return max(1.0, rows / columns) ** 0.5


def make_owners(weights: Mapping[str, Tensor], grid: Grid) -> MatrixOwners:
    """Return which rank owns each weight, given by its name. What its matrices cost decides."""
    shapes = [(len(weight), weight.shape[1]) for weight in weights.values()]
    parts = map(num_matrices, weights)
    costs = [n * cost((rows // n, columns)) for n, (rows, columns) in zip(parts, shapes, strict=True)]
    return MatrixOwners(shapes, costs, grid)


def update_dtype(device_type: str) -> torch.dtype:
    """Return the dtype in which matrices are sent and orthogonalised. Five steps in bf16 lose nothing that matters."""
    return torch.bfloat16 if device_type == "cuda" else torch.float32


class MatrixUpdates:
    """Muon's update of a model's weights that are matrices, which with their momentum may be spread over ranks."""

    def __init__(self, weights: dict[str, nn.Parameter], slices: StateSlices | None) -> None:
        self._weights = list(weights.values())
        self._parts = list(map(num_matrices, weights))
        self._shapes = [(len(w) // parts, w.shape[1]) for w, parts in zip(self._weights, self._parts, strict=True)]
        self._slices = slices
        self._owners = None if slices is None else make_owners(weights, slices.grid)

    def apply(
        self,
        gradients: Sequence[Tensor],
        momenta: Sequence[Tensor],
        momentum: float,
        rate: float,
        weight_decay: float,
        divisor: Tensor | None,
        is_finite: Tensor,
    ) -> None:
        """Update this rank's momenta in place, and its shards of the weights. Collective if there are slices.

        `gradients` are `divisor` times too large, and are overwritten. Where `is_finite` is False, nothing else
        changes: the momentum takes the gradient's place, and the rate is 0.
        """
        _turn_into_directions(gradients, momenta, momentum, divisor, is_finite)
        slices = [gradient.to(update_dtype(gradient.device.type)) for gradient in gradients]
        if self._owners is None or self._slices is None:
            updates = list(self._orthogonalised(dict(enumerate(slices))).values())
        else:
            updates = self._owners.run(slices, self._orthogonalised, self._slices)
        shards = [local(weight.detach()) for weight in self._weights]
        torch._foreach_mul_(shards, torch.where(is_finite, 1 - rate * weight_decay, 1.0))
        for shard, update, shape in zip(shards, updates, self._shapes, strict=True):
            scaled_rate = torch.where(is_finite, rate * rate_scale(shape), 0.0)
            shard.addcmul_(update.to(shard.dtype), scaled_rate, value=-1)

    def _orthogonalised(self, weights: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return the orthogonalised weights, by parameter: queries, keys and values each by itself."""
        matrices = {
            (index, part): matrix
            for index, weight in weights.items()
            for part, matrix in enumerate(weight.view(self._parts[index], *self._shapes[index]))
        }
        results = orthogonalised(matrices)
        whole = {}
        for index in weights:
            parts = [results.pop((index, part)) for part in range(self._parts[index])]
            whole[index] = torch.cat(parts) if len(parts) > 1 else parts[0]
        return whole


def _turn_into_directions(
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    momentum: float,
    divisor: Tensor | None,
    is_finite: Tensor,
) -> None:
    """Update the momenta in place, and put Nesterov's step from each into its gradient's place."""
    gradients, momenta = list(gradients), list(momenta)
    if divisor is not None:
        torch._foreach_div_(gradients, divisor)
    for gradient, buffer in zip(gradients, momenta, strict=True):
        torch.where(is_finite, gradient, buffer, out=gradient)
    torch._foreach_lerp_(momenta, gradients, 1 - momentum)
    torch._foreach_lerp_(gradients, momenta, momentum)
