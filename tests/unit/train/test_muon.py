"""Muon against the singular value decomposition and torch.optim.Muon; owners and slices as tables."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.config import ModelConfig
from model.gpt import GPT, build_model
from train import muon
from train.config import OptimConfig
from train.muon import NEWTON_SCHULZ, _applied, _applied_in_batches, cost, orthogonalised
from train.optim import build_optimizer, kind_of, learning_rate, momentum_at, sum_of_squares, update
from train.parallel.state_slices import Grid, MatrixOwners, assign

CONFIG = OptimConfig(name="muon", lr_peak=0.02, embedding_lr=3e-3, vector_lr=1e-3, clip_norm=0.5, weight_decay=0.1)
TINY = ModelConfig(num_layers=2, num_heads=2, width=16, vocab_size=40, context_len=8)
CONVERGING = ((1.875, -1.25, 0.375),) * 40  # x (15 - 10 x^2 + 3 x^4) / 8, whose fixed point 1 attracts (0, 1]


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16), (1, 8)])
def test_a_matrix_becomes_its_nearest_orthogonal_one(shape: tuple[int, int]) -> None:
    matrix = random_matrix(*shape)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    exact = orthogonalised({0: matrix}, CONVERGING)[0]
    torch.testing.assert_close(exact, u @ vh, rtol=0, atol=1e-4)
    five_steps = orthogonalised({0: matrix})[0]
    in_its_directions = u.T @ five_steps @ vh.T
    values = in_its_directions.diagonal()
    torch.testing.assert_close(in_its_directions, values.diag(), rtol=0, atol=1e-5)
    assert values.min() > 0.4 and values.max() < 1.25


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert not orthogonalised({0: torch.zeros(4, 8)})[0].any()


def test_matrices_beside_each_other_do_not_change_each_other() -> None:
    matrices = {index: random_matrix(16, 16 * (1 + index % 2), index) for index in range(5)}
    together = orthogonalised(matrices)
    for index, matrix in matrices.items():
        assert torch.equal(together[index], orthogonalised({index: matrix})[index])


def with_gradients(model: GPT, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def test_three_updates_equal_torchs_muon_and_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon computes in bf16. Here it is made to compute in fp32, as ours does on a CPU.

    Queries, keys and values are given to it as three parameters.
    """
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    ours, theirs = build_model(TINY, seed=1), build_model(TINY, seed=1)
    matrices: dict[str, list[Tensor]] = {}
    embeddings: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, parameter in theirs.named_parameters():
        kind = kind_of(name, parameter, theirs)
        if kind == "matrix":
            chunks = parameter.detach().chunk(3 if "c_attn" in name else 1)
            matrices[name] = [chunk.clone().requires_grad_() for chunk in chunks]
        else:
            (embeddings if kind == "embedding" else vectors).append(parameter)
    matrix_optimizer = torch.optim.Muon(
        [part for whole in matrices.values() for part in whole], lr=0.02, momentum=0.95, weight_decay=0.1
    )
    groups = [{"params": embeddings, "lr": 3e-3}, {"params": vectors, "lr": 1e-3}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    optimizer = build_optimizer(ours, CONFIG)
    for step in range(3):
        with_gradients(ours, seed=step)
        with_gradients(theirs, seed=step)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for name, whole in matrices.items():
            gradient = theirs.get_parameter(name).grad
            assert gradient is not None
            for part, part_gradient in zip(whole, gradient.chunk(len(whole)), strict=True):
                part.grad = part_gradient
        matrix_optimizer.step()
        adamw.step()
        norm = sum_of_squares(ours.parameters()).sqrt().float()
        update(optimizer, step, 0.02, norm, torch.isfinite(norm))
    for (name, mine), reference in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        expected = torch.cat(matrices[name]) if name in matrices else reference
        torch.testing.assert_close(mine, expected, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad: float) -> None:
    model = build_model(TINY, seed=1)
    optimizer = build_optimizer(model, CONFIG)
    for step, factor in enumerate((1.0, bad)):
        before = copy.deepcopy([*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())])
        with_gradients(model, seed=step)
        first = next(model.blocks[1].parameters())
        first.grad = first.grad * factor if first.grad is not None else None
        norm = sum_of_squares(model.parameters()).sqrt().float()
        update(optimizer, step, 0.02, norm, torch.isfinite(norm))
    after = [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
    assert any(tensor.any() for tensor in after)
    for tensor, old in zip(after, before, strict=True):
        assert torch.equal(tensor, old)


def test_parts_that_begin_at_zero_stay_finite_and_move() -> None:
    """A zero projection gives the matrices before it no gradient at first: their update is 0, not 0 / 0."""
    model = build_model(dataclasses.replace(TINY, zero_init_projections=True), seed=1)
    optimizer = build_optimizer(model, CONFIG)
    tokens_BT = torch.arange(16).view(2, 8)
    for step in range(3):
        model(tokens_BT).logsumexp(dim=-1).mean().backward()
        norm = sum_of_squares(model.parameters()).sqrt().float()
        update(optimizer, step, 0.02, norm, torch.isfinite(norm))
        model.zero_grad()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    assert model.get_parameter("transformer.h.0.mlp.c_proj.weight").any()


def test_kinds_of_parameters_and_their_rates() -> None:
    model = build_model(dataclasses.replace(TINY, tie=False), seed=1)
    groups = {group.kind: group for group in build_optimizer(model, dataclasses.replace(CONFIG, head_lr=4e-3)).groups}
    rates = {kind: group.relative_rate * CONFIG.lr_peak for kind, group in groups.items()}
    assert rates == pytest.approx({"matrix": 0.02, "embedding": 3e-3, "head": 4e-3, "vector": 1e-3})
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p] for p in groups["embedding"].parameters} == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert {names[p] for p in groups["head"].parameters} == {"lm_head.weight"}
    assert {names[p].split(".", 3)[3] for p in groups["matrix"].parameters} == {
        *("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    }
    assert {group.kind for group in groups.values() if group.weight_decay} == {"matrix"}


def test_momentum_rises_to_its_value() -> None:
    warmed_up = dataclasses.replace(CONFIG, momentum_warmup_steps=10)
    assert [momentum_at(step, warmed_up) for step in (0, 5, 10, 99)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert momentum_at(0, CONFIG) == 0.95
    low = dataclasses.replace(warmed_up, momentum=0.5)
    assert momentum_at(0, low) == 0.5, "a momentum below the first one does not fall to it"


def test_all_rates_follow_one_schedule() -> None:
    """A quarter of the peak, as in the first of four steps of warm-up, moves every parameter a quarter as far."""
    config = dataclasses.replace(CONFIG, warmup_steps=4, weight_decay=0.0)
    assert learning_rate(0, config, 10) == config.lr_peak / 4
    moved: list[list[Tensor]] = []
    for rate in (config.lr_peak, learning_rate(0, config, 10)):
        model = build_model(TINY, seed=1)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with_gradients(model, seed=2)
        norm = sum_of_squares(model.parameters()).sqrt().float()
        update(build_optimizer(model, config), 0, rate, norm, norm.isfinite())
        moved.append([p.detach() - old for p, old in zip(model.parameters(), before, strict=True)])
    for name, far, near in zip(dict(build_model(TINY, seed=1).named_parameters()), *moved, strict=True):
        assert far.any(), name
        torch.testing.assert_close(near, far / 4, rtol=1e-3, atol=1e-7, msg=name)


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(3, 1), Grid(1, 3), Grid(2, 2), Grid(2, 4), Grid(64, 8)], ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 1000])
def test_every_row_has_one_rank(grid: Grid, num_rows: int) -> None:
    slices = [grid.slice_rows(num_rows, rank) for rank in range(grid.world)]
    assert sorted(row for rows in slices for row in rows) == list(range(num_rows))
    for shard in range(grid.shards):
        of_shard = [row for replica in range(grid.replicas) for row in slices[replica * grid.shards + shard]]
        assert of_shard == list(grid.shard_rows(num_rows, shard)), "a shard's slices lie in it, in the replicas' order"
    chunks = torch.arange(num_rows).chunk(grid.shards)
    assert [list(grid.shard_rows(num_rows, shard)) for shard in range(len(chunks))] == [c.tolist() for c in chunks]


def test_owners_are_balanced_and_rounds_hold_every_matrix() -> None:
    shapes = [(768 * k, 768) if k != 5 else (768, 3072) for _ in range(12) for k in (3, 1, 4, 5)]
    costs = [(3 if shape[0] == 3 * 768 else 1) * cost((min(shape[0], 768), shape[1])) for shape in shapes]
    owned = assign(costs, 8)
    loads = [sum(costs[index] for index in indices) for indices in owned]
    assert max(loads) < 1.1 * sum(costs) / 8
    owners = MatrixOwners(shapes, costs, Grid(1, 8))
    assert len(owners.rounds) == 2
    assert sorted(index for number in owners.rounds for indices in number for index in indices) == list(range(48))
    assert len(MatrixOwners(shapes, costs, Grid(64, 1)).rounds) == 1, "no rank owns two"


def test_batches_of_a_gpu_are_computed_like_single_matrices() -> None:
    matrix = random_matrix(8, 24) / 20
    for polynomial in NEWTON_SCHULZ[:2]:
        expected = _applied(matrix, polynomial)
        torch.testing.assert_close(_applied_in_batches(torch.stack([matrix, matrix]), polynomial)[1], expected)
        matrix = expected


def test_an_update_on_a_gpu_is_in_bf16_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake CUDA tensors have shapes, dtypes and devices, and raise where the host would read a number.

    AdamW's kernel is not in a build of torch for CPUs.
    """
    seen: list[tuple[torch.dtype, str]] = []
    sound = _applied_in_batches

    def applied_in_batches(x_BNM: Tensor, polynomial: muon.Polynomial) -> Tensor:
        seen.append((x_BNM.dtype, x_BNM.device.type))
        return sound(x_BNM, polynomial)

    monkeypatch.setattr(muon, "_applied_in_batches", applied_in_batches)
    with FakeTensorMode(), torch.device("cuda"):
        model = GPT(TINY)
        optimizer = build_optimizer(model, CONFIG)
        (group,) = [group for group in optimizer.groups if group.kind == "matrix"]
        momenta = [optimizer.state[parameter]["momentum"] for parameter in group.parameters]
        gradients = [torch.empty_like(momentum) for momentum in momenta]
        assert optimizer.matrix_updates is not None
        optimizer.matrix_updates.apply(gradients, momenta, 0.95, 0.02, 0.1, torch.ones(()), torch.ones(()).isfinite())
    assert seen == [(torch.bfloat16, "cuda")] * 2 * 5, "two batches: 16 x 16, and 16 x 64 with its transpose"
    assert {tensor.dtype for tensor in [*momenta, *group.parameters]} == {torch.float32}
