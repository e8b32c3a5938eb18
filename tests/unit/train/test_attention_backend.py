"""--train.attention-backend on a CPU: what is chosen, kept, shown and refused. tests/gpu has what only a GPU can do."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, _sdpa_kernel, sdpa_kernel

from common.errors import InputError
from model.gpt import build_model
from tests.helpers.runs import curve, tiny_config
from train.config import Config
from train.config_checks import settings_without_effect
from train.data import plan_batches
from train.main import run
from train.parallel.attention import BACKENDS, Trial, fastest_first, kept_backend, settle_attention_backend
from train.processes.group import ProcessGroup
from train.run.directory import RunDirectory

ALONE = ProcessGroup(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def torchs_own_choice() -> Iterator[list[SDPBackend]]:
    before, tag = _cur_sdpa_kernel_backends(with_priority=True), torch.compiler.config.cache_key_tag
    yield before
    _sdpa_kernel(before, set_priority=True)
    torch.compiler.config.cache_key_tag = tag


def configured(backend: Any, tmp_path: Path = Path(), **model: Any) -> Config:
    config = tiny_config(tmp_path, tmp_path / "run", attention_backend=backend)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def settled(backend: str, **model: Any) -> tuple[Config, dict[str, Any], str | None]:
    config = configured(backend, **model)
    return settle_attention_backend(config, plan_batches(config, 1), {}, ALONE)


def trial(**model: Any) -> Trial:
    config = configured("auto", **model)
    return Trial(config, plan_batches(config, 1), ALONE.device)


def test_auto_is_torchs_own_choice_on_a_cpu(torchs_own_choice: list[SDPBackend]) -> None:
    assert settled("auto") == (configured("auto"), {}, None)
    assert _cur_sdpa_kernel_backends(with_priority=True) == torchs_own_choice
    assert torch.compiler.config.cache_key_tag == ""


def test_a_named_backend_comes_first_and_the_others_stay_for_other_shapes() -> None:
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
        assert settled("flash") == (configured("flash"), {}, None)
        order = _cur_sdpa_kernel_backends(with_priority=True)
    assert order[0] == SDPBackend.FLASH_ATTENTION and set(order) >= {*BACKENDS.values(), SDPBackend.MATH}
    assert torch.compiler.config.cache_key_tag == " attention flash"


@pytest.mark.parametrize("backend", ["cudnn", "efficient", "fa3"])
def test_what_a_cpu_has_not_is_refused_in_one_line(
    backend: str, tiny_data: Path, tmp_path: Path, torchs_own_choice: list[SDPBackend]
) -> None:
    reason = "No module named 'flash_attn_interface'" if backend == "fa3" else "No viable backend for scaled_dot"
    with pytest.raises(InputError) as caught:
        run(tiny_config(tiny_data, tmp_path / "run", attention_backend=backend), ALONE)
    text = str(caught.value)
    assert text.startswith(
        f"--train.attention-backend {backend} cannot compute this run's attention (device cpu, torch "
    )
    assert reason in text and text.endswith("; use --train.attention-backend auto") and "\n" not in text
    assert _cur_sdpa_kernel_backends(with_priority=True) == torchs_own_choice


def test_a_trial_times_what_there_is_and_passes_over_what_there_is_not() -> None:
    random_state = torch.get_rng_state()
    milliseconds = {name: trial().milliseconds(name) for name in BACKENDS}
    assert [name for name, time in milliseconds.items() if time is not None] == ["flash"]
    assert milliseconds["flash"] is not None and milliseconds["flash"] > 0
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("window", [None, 5])
def test_a_trial_has_the_models_shapes_memory_order_and_mask(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """Kernels differ in the orders that they take, and few take a mask."""
    seen: list[list[Any]] = []
    original = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, mask_TT: Tensor | None, *, is_causal: bool) -> Tensor:
        mask = None if mask_TT is None else (mask_TT.tolist(), mask_TT.dtype, mask_TT.stride())
        seen.append([mask, is_causal, *((operand.shape, operand.stride()) for operand in (q, k, v))])
        return original(q, k, v, mask_TT, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    trial(window=window).seconds("flash")
    build_model(configured("auto", window=window).model, seed=1)(torch.zeros(6, 32, dtype=torch.int64))
    warm_up, timed, *layers = seen
    assert layers == [warm_up, timed]


def test_the_slowest_rank_decides() -> None:
    measured: list[dict[str, float | None]] = [
        {"flash": 2.0, "efficient": 3.0, "cudnn": 1.0, "fa3": None},
        {"flash": 2.1, "efficient": 3.0, "cudnn": 2.5, "fa3": 0.5},
    ]
    assert list(fastest_first(measured).items()) == [("flash", 2.1), ("cudnn", 2.5), ("efficient", 3.0)]
    assert fastest_first([dict.fromkeys(BACKENDS)]) == {}


def test_a_measurement_is_kept_under_the_same_conditions_only() -> None:
    conditions = trial().conditions
    kept = {"attention": {"backend": "cudnn", "conditions": json.loads(json.dumps(conditions))}}
    assert kept_backend(kept, conditions) == "cudnn"
    assert kept_backend(kept, trial(num_heads=4).conditions) is None
    assert kept_backend(kept, trial(window=8).conditions) is None
    assert kept_backend({}, conditions) is None
    assert kept_backend({"attention": {"backend": "quick", "conditions": conditions}}, conditions) is None
    assert kept_backend({"attention": ["cudnn"]}, conditions) is None


def test_a_run_may_change_it_on_the_way(tiny_data: Path, tmp_path: Path) -> None:
    """It is no part of the model, and on a CPU the named kernel is torch's own choice: bitwise the same run."""
    config = tiny_config(tiny_data, tmp_path / "run", steps=10, attention_backend="flash")
    run(config, ALONE)
    assert "fp32, eager, attention by flash; checkpoint" in (config.directory / "log.txt").read_text()
    longer = dataclasses.replace(config.train, attention_backend="auto")
    run(dataclasses.replace(config, train=longer), ALONE)  # continues at its end
    run(tiny_config(tiny_data, tmp_path / "plain", steps=10), ALONE)
    assert curve(tmp_path / "run") == curve(tmp_path / "plain")
    state = json.loads(next((tmp_path / "run" / "checkpoints").glob("*/state.json")).read_text())
    assert "attention_backend" not in state["config"]["model"]


def test_config_json_keeps_it_beside_the_micro_batch(tiny_data: Path, tmp_path: Path) -> None:
    """Running out of memory drops the micro-batch that did not fit, and no other measurement."""
    attention = {"backend": "cudnn", "conditions": {"device": "NVIDIA H200"}}
    config = tiny_config(tiny_data, tmp_path / "run", steps=10)
    run(config, ALONE)
    path = config.directory / "config.json"
    fingerprint = json.loads(path.read_text())["data"]
    vocabulary = json.loads(path.read_text())["config"]["model"]["vocab_size"]
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocabulary, eot_id=None))

    def found() -> Any:
        return json.loads(path.read_text())["found"]

    with RunDirectory(config, fingerprint, ALONE) as directory:
        directory.record({"attention": attention})
        directory.record({"micro_batch": 3, "conditions": {}})
        assert found() == {"attention": attention, "micro_batch": 3, "conditions": {}}
    with RunDirectory(config, fingerprint, ALONE) as directory:
        assert directory.measured == found() == {"attention": attention, "micro_batch": 3, "conditions": {}}
        directory.forget()
        assert found() == {"attention": attention}


def test_where_it_does_nothing_a_warning_says_so() -> None:
    def warnings(backend: str, **model: Any) -> list[str]:
        lines = settings_without_effect(configured(backend, **model), "cuda", 1, "none")
        return [line for line in lines if "attention-backend" in line]

    assert warnings("flash") == warnings("auto", attention="naive") == []
    expected = "--train.attention-backend cudnn has no effect with --model."
    assert warnings("cudnn", attention="naive") == [expected + "attention naive"]
    assert warnings("cudnn", kind="heads") == [expected + "kind heads"]
    assert settled("cudnn", attention="naive") == (configured("cudnn", attention="naive"), {}, None)


@pytest.mark.long(reason="Inductor compiles C++ twice")
def test_a_compiled_kernel_of_another_choice_is_not_taken_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's cache on disk knows the graph before the choice, so it would give back the other kernel."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.randn(2, 4, 64, 48, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def attention(x: Tensor) -> Tensor:
        q, k, v = (x * 2).split(16, dim=3)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def compiled() -> Tensor:
        torch.compiler.reset()
        return torch.compile(attention, dynamic=False)(x)

    with sdpa_kernel([SDPBackend.MATH]):
        with_all_scores = compiled()
    settled("flash")
    assert torch.equal(compiled(), attention(x)) and not torch.equal(with_all_scores, attention(x))
