"""Sampling against a token-by-token reference in numpy, by probabilities and by draws."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from common.errors import InputError
from model.generation.sampling import NUCLEUS_GUESS, Sampling, choices, draw

LOGITS = torch.randn(128, generator=torch.Generator().manual_seed(1)) * 3
VOCAB_SIZE = 100  # the other logits are padding
Array = npt.NDArray[np.float64]


def reference(
    logits: npt.ArrayLike, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> Array:
    """Filter token by token from the likeliest down: temperature, top-k, then top-p, then min-p."""
    scaled = np.asarray(logits, dtype=np.float64)[:VOCAB_SIZE] / temperature
    weights = np.exp(scaled - scaled.max())
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))[:top_k]
    total, mass, kept = weights[order].sum(), 0.0, []
    for token in order:
        if top_p is None or top_p == 1 or mass / total < top_p:
            kept.append(token)
            mass += weights[token]
    kept = [token for token in kept if min_p is None or weights[token] >= min_p * weights[order[0]]]
    probabilities = np.zeros(len(weights))
    probabilities[kept] = weights[kept] / weights[kept].sum()
    return probabilities


def dense(logits: Tensor, sampling: Sampling) -> Array:
    """Return the result of `choices` as a probability for each token."""
    probabilities_BN, ids_BN = choices(logits[None], sampling, min(VOCAB_SIZE, len(logits)))
    dense_V = torch.zeros(min(VOCAB_SIZE, len(logits)), dtype=torch.float64)
    ids_N = torch.arange(len(dense_V)) if ids_BN is None else ids_BN[0]
    assert len(ids_N.unique()) == len(ids_N)
    dense_V[ids_N] = probabilities_BN[0]
    return dense_V.numpy()


CASES = [
    (1.0, None, None, None),
    (0.5, None, None, None),
    (2.0, 5, None, None),
    (1.0, 1, None, None),
    (1.0, 1000, None, None),
    (1.0, None, 0.9, None),
    (1.5, 40, 0.8, None),
    (1.0, None, 1e-9, None),
    (1.0, None, 1.0, None),
    (1.0, None, None, 0.05),
    (3.0, None, None, 1.0),
    (2.0, 60, 0.95, 0.02),
    (1e-6, 50, None, None),
    (1e-300, None, None, None),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_probabilities_equal_numpys(case: tuple[float, int | None, float | None, float | None]) -> None:
    with np.errstate(over="ignore"):
        expected_V = reference(LOGITS.numpy(), *case)
    probabilities_V = dense(LOGITS, Sampling(*case))
    np.testing.assert_array_equal(probabilities_V > 0, expected_V > 0)
    np.testing.assert_allclose(probabilities_V, expected_V, atol=1e-12)


def test_draws_follow_the_probabilities_with_a_generator_per_row() -> None:
    sampling = Sampling(1.0, 8, 0.9)
    rows = choices(LOGITS.expand(5_000, -1), sampling, VOCAB_SIZE)
    tokens = draw(rows, [torch.Generator().manual_seed(i) for i in range(2)] * 2_500)
    counts = np.bincount(np.array(tokens), minlength=VOCAB_SIZE)
    expected_V = reference(LOGITS.numpy(), 1.0, 8, 0.9, None)
    assert counts[expected_V == 0].sum() == 0
    assert np.abs(counts / 5_000 - expected_V).sum() / 2 < 0.02  # total variation
    three = choices(LOGITS.expand(3, -1), Sampling(2.0, None), VOCAB_SIZE)
    one = choices(LOGITS[None], Sampling(2.0, None), VOCAB_SIZE)
    together = draw(three, [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)])
    assert together == [draw(one, [torch.Generator().manual_seed(seed)])[0] for seed in (5, 6, 7)]
    assert draw(three, [torch.Generator().manual_seed(5), None, None]) == [together[0], None, None]


def kept(values: list[float], *settings: Any) -> list[int]:
    """Return the tokens that are left of probabilities; `settings` are top_k, top_p and min_p."""
    return np.flatnonzero(dense(torch.tensor(values).log(), Sampling(1.0, *settings))).tolist()


def test_the_kept_tokens_exactly() -> None:
    quarters, mixed, halves = [0.25] * 4, [0.125, 0.5, 0.125, 0.25], [0.5, 0.25, 0.125, 0.125]
    ties = [0.1, 0.3, 0.15, 0.15, 0.3, 0.15]
    for tokens, values, settings in (
        # The nucleus is the smallest set that reaches p, and ties go to the lower id.
        ([0], quarters, (None, 0.25)),
        ([0, 1], quarters, (None, 0.5)),
        ([0, 1, 2], quarters, (None, 0.500001)),
        ([0, 1, 2, 3], quarters, (None, 1.0)),
        ([1, 3], mixed, (None, 0.7)),
        ([0, 1, 3], mixed, (None, 0.8)),
        # min-p is relative to the likeliest token, and equal to the limit is enough.
        ([0, 1], halves, (None, None, 0.49)),
        ([0], halves, (None, None, 0.51)),
        ([0, 1, 2, 3], halves, (None, None, 0.24)),
        ([0, 2], [0.375, 0.25, 0.375], (None, None, 1.0)),
        # Ties at top-k's limit go to the lower id.
        *((wanted, ties, (len(wanted),)) for wanted in ([1], [1, 4], [1, 2, 4], [1, 2, 3, 4], [1, 2, 3, 4, 5])),
        # top-k comes before top-p: 0.4 of all is 0.53 of two tokens, which reaches 0.5.
        ([0], [0.4, 0.35, 0.25], (2, 0.5)),
        ([0, 1], [0.4, 0.35, 0.25], (None, 0.5)),
    ):
        assert kept(values, *settings) == tokens, (values, settings)


def test_greedy_takes_the_likeliest_token_and_the_lower_of_two() -> None:
    for sampling in (Sampling(0.0, None), Sampling(0.0, 5, 0.5, 0.5)):
        assert np.flatnonzero(dense(LOGITS, sampling)).tolist() == [int(LOGITS[:VOCAB_SIZE].argmax())]
    assert np.flatnonzero(dense(torch.tensor([0.0, 2.0, 1.0, 2.0]), Sampling(0.0))).tolist() == [1]


def test_the_nucleus_of_a_large_vocabulary_is_exact() -> None:
    """The next smaller set misses p in fp64, for sets of a few tokens and of almost all."""
    logits_V = torch.randn(50_257, generator=torch.Generator().manual_seed(2)) * 2
    probabilities = np.exp(logits_V.double().numpy())
    probabilities = -np.sort(-probabilities / probabilities.sum())
    sizes = []
    for top_p in (0.1, 0.5, 0.9, 0.99999):
        size = int((choices(logits_V[None], Sampling(1.0, None, top_p), 50_257).probabilities_BN > 0).sum())
        assert probabilities[: size - 1].sum() < top_p <= probabilities[:size].sum()
        sizes.append(size)
    assert sizes[0] < NUCLEUS_GUESS < sizes[-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    logits_BV = LOGITS.expand(2, -1).clone()
    logits_BV[1, 7] = value
    for sampling in (Sampling(), Sampling(0.0)):
        with pytest.raises(InputError, match="logits are not finite"):
            choices(logits_BV, sampling, VOCAB_SIZE)
    logits_BV[1, 7], logits_BV[1, 120] = 0.0, value  # padding does not matter
    choices(logits_BV, Sampling(), VOCAB_SIZE)


def test_settings_out_of_range_are_refused() -> None:
    nan, infinite = float("nan"), float("inf")
    for name, values in (
        ("temperature", [-1.0, nan, infinite]),
        ("top_k", [0]),
        ("top_p", [0.0, 1.1, nan]),
        ("min_p", [0.0, 2.0]),
    ):
        for value in values:
            with pytest.raises(InputError, match=f"--{name.replace('_', '-')} {value} must be"):
                Sampling(**{name: value})  # type: ignore[arg-type]
