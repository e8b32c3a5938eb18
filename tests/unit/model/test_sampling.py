"""Distributions against numpy, by probability and by draws."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from common.errors import InputError
from model.generation.sampling import NUCLEUS_GUESS, Sampling, choices, draw

LOGITS = torch.randn(128, generator=torch.Generator().manual_seed(1)) * 3
VOCAB_SIZE = 100  # the others are padding
Array = npt.NDArray[np.float64]


def reference(
    logits: npt.ArrayLike, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> Array:
    """Token by token from the likeliest down: temperature, top-k, top-p of what is left, min-p of what is left."""
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


def found_for(logits: Tensor, sampling: Sampling) -> Array:
    """`choices` as a probability for each token."""
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
        wanted = reference(LOGITS.numpy(), *case)
    found = found_for(LOGITS, Sampling(*case))
    np.testing.assert_array_equal(found > 0, wanted > 0)
    np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case[0] >= 0.5], ids=str)
def test_a_hundred_thousand_draws_follow_numpys_probabilities(
    case: tuple[float, int | None, float | None, float | None],
) -> None:
    """As `draw` draws, many at once. Chi-square over the tokens that are expected ten times; nothing else is drawn."""
    wanted = reference(LOGITS.numpy(), *case)
    probabilities_BN, ids_BN = choices(LOGITS[None], Sampling(*case), VOCAB_SIZE)
    generator = torch.Generator().manual_seed(1)
    columns = torch.multinomial(probabilities_BN[0], 100_000, replacement=True, generator=generator)
    tokens = columns if ids_BN is None else ids_BN[0, columns]
    counts = np.bincount(tokens.numpy(), minlength=VOCAB_SIZE)
    assert counts[wanted == 0].sum() == 0
    expected = wanted * 100_000
    often = expected >= 10
    degrees = max(1, often.sum() - 1)
    statistic = ((counts[often] - expected[often]) ** 2 / expected[often]).sum()
    # Chi-square's 0.999 quantile by Wilson & Hilferty 1931
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.09 * np.sqrt(2 / (9 * degrees))) ** 3


def test_one_draw_at_a_time_follows_too() -> None:
    """`draw` itself, a generator for each row: 5,000 rows at once."""
    sampling = Sampling(1.0, 8, 0.9)
    found = choices(LOGITS.expand(5_000, -1), sampling, VOCAB_SIZE)
    generators = [torch.Generator().manual_seed(i) for i in range(2)] * 2_500
    tokens = draw(found, generators)
    counts = np.bincount(np.array(tokens), minlength=VOCAB_SIZE)
    wanted = reference(LOGITS.numpy(), 1.0, 8, 0.9, None)
    assert counts[wanted == 0].sum() == 0
    assert np.abs(counts / 5_000 - wanted).sum() / 2 < 0.02  # total variation


def test_rows_are_drawn_by_their_own_generators() -> None:
    found = choices(LOGITS.expand(3, -1), Sampling(2.0, None), VOCAB_SIZE)
    seeds = (5, 6, 7)
    together = draw(found, [torch.Generator().manual_seed(seed) for seed in seeds])
    one = choices(LOGITS[None], Sampling(2.0, None), VOCAB_SIZE)
    assert together == [draw(one, [torch.Generator().manual_seed(seed)])[0] for seed in seeds]
    assert draw(found, [torch.Generator().manual_seed(5), None, None]) == [together[0], None, None]


# --- The sets, exactly ------------------------------------------------------------------------------------------------


def kept(probabilities: list[float], **how: float) -> list[int]:
    sampling = Sampling(1.0, None, how.get("top_p"), how.get("min_p"))
    return np.flatnonzero(found_for(torch.tensor(probabilities).log(), sampling)).tolist()


def test_the_nucleus_is_the_smallest_set_that_reaches_p() -> None:
    quarters = [0.25] * 4  # whose probabilities are exact: reaching p is enough, and ties go to the lower id
    assert kept(quarters, top_p=0.25) == [0]
    assert kept(quarters, top_p=0.5) == [0, 1]
    assert kept(quarters, top_p=0.500001) == [0, 1, 2]
    assert kept(quarters, top_p=1.0) == [0, 1, 2, 3]
    assert kept([0.125, 0.5, 0.125, 0.25], top_p=0.7) == [1, 3]
    assert kept([0.125, 0.5, 0.125, 0.25], top_p=0.8) == [0, 1, 3]


def test_the_nucleus_of_a_large_vocabulary_is_exact() -> None:
    """Every smaller set misses p, in fp64, for sets of some tokens and of almost all."""
    logits_V = torch.randn(50_257, generator=torch.Generator().manual_seed(2)) * 2
    probabilities = np.exp(logits_V.double().numpy())
    probabilities = -np.sort(-probabilities / probabilities.sum())
    sizes = []
    for top_p in (0.1, 0.3, 0.5, 0.9, 0.99, 0.99999):
        size = int((choices(logits_V[None], Sampling(1.0, None, top_p), 50_257).probabilities_BN > 0).sum())
        assert probabilities[: size - 1].sum() < top_p <= probabilities[:size].sum()
        sizes.append(size)
    assert sizes[0] < NUCLEUS_GUESS < sizes[-1]


def test_min_p_is_measured_by_the_likeliest() -> None:
    assert kept([0.5, 0.25, 0.125, 0.125], min_p=0.49) == [0, 1]
    assert kept([0.5, 0.25, 0.125, 0.125], min_p=0.51) == [0]
    assert kept([0.5, 0.25, 0.125, 0.125], min_p=0.24) == [0, 1, 2, 3]
    assert kept([0.375, 0.25, 0.375], min_p=1.0) == [0, 2]  # as likely as the likeliest is likely enough


def test_ties_go_to_the_lower_id() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 1.0, 2.0, 1.0])
    for top_k, wanted in ((1, [1]), (2, [1, 4]), (3, [1, 2, 4]), (4, [1, 2, 3, 4]), (5, [1, 2, 3, 4, 5])):
        assert np.flatnonzero(found_for(logits, Sampling(1.0, top_k))).tolist() == wanted
    assert np.flatnonzero(found_for(logits, Sampling(0.0))).tolist() == [1]


def test_greedy_takes_the_likeliest_whatever_else_is_asked() -> None:
    for sampling in (Sampling(0.0, None), Sampling(0.0, 5, 0.5, 0.5)):
        found = found_for(LOGITS, sampling)
        assert found.argmax() == LOGITS[:VOCAB_SIZE].argmax() and found.sum() == 1


def test_top_k_is_taken_before_top_p() -> None:
    """0.4 of all is 0.53 of what top-k leaves, which reaches 0.5."""
    logits = torch.tensor([0.4, 0.35, 0.25]).log()
    assert np.flatnonzero(found_for(logits, Sampling(1.0, 2, 0.5))).tolist() == [0]
    assert np.flatnonzero(found_for(logits, Sampling(1.0, None, 0.5))).tolist() == [0, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    logits_BV = LOGITS.expand(2, -1).clone()
    logits_BV[1, 7] = value
    for sampling in (Sampling(), Sampling(0.0)):
        with pytest.raises(InputError, match="logits are not finite"):
            choices(logits_BV, sampling, VOCAB_SIZE)
    logits_BV[1, 7], logits_BV[1, 120] = 0.0, value  # padding is no token
    choices(logits_BV, Sampling(), VOCAB_SIZE)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": float("inf")}, "--temperature inf"),
        ({"top_k": 0}, "--top-k 0 must be at least 1"),
        ({"top_p": 0.0}, "--top-p 0.0 must be more than 0 and at most 1"),
        ({"top_p": 1.1}, "--top-p 1.1"),
        ({"top_p": float("nan")}, "--top-p nan"),
        ({"min_p": 0.0}, "--min-p 0.0"),
        ({"min_p": 2.0}, "--min-p 2.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Sampling(**settings)  # type: ignore[arg-type]
