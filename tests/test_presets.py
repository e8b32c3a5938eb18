"""The recipes, and what their docstrings say that they cost."""

import re

import pytest

from model.budget import budget
from model.peaks import peak_flops
from train import presets
from train.config import Config, faults_of, resolve, settings_without_effect, with_vocabulary
from train.presets import PRESETS

WITH_COST = [name for name, config in PRESETS.items() if config.train.dtype == "bf16"]


def flops(config: Config) -> float:
    sized = with_vocabulary(resolve(config), 65 if "char" in config.preset else 50_257)
    return budget(sized.model).flops_per_token * config.train.steps * config.train.batch_tokens


def test_the_names() -> None:
    gpt2 = ["gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    assert list(PRESETS) == [*gpt2, "shakespeare-char", "shakespeare-char-cpu", "stories-cpu", "quickstart"]
    sizes = [budget(PRESETS[name].model).num_parameters for name in gpt2]
    assert sizes == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]  # the released checkpoints'


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_sound(name: str) -> None:
    assert faults_of(PRESETS[name]) == []
    assert settings_without_effect(PRESETS[name], "cuda", 8, "ddp") == []


@pytest.mark.parametrize("name", WITH_COST)
def test_the_cost_in_the_docstring_is_the_budgets(name: str) -> None:
    text = getattr(presets, name.replace("-", "_")).__doc__
    stated = re.search(r"Cost: ([\d.e]+) FLOPs", text)
    assert stated is not None and flops(PRESETS[name]) == pytest.approx(float(stated[1]), rel=0.03)
    hours = re.search(r"([\d.]+) hours on 8 H100 at 40 %", text)
    assert (hours is None) == (name == "shakespeare-char")
    if hours is not None:
        peak = peak_flops("NVIDIA H100 80GB HBM3", "bf16")
        assert peak is not None
        assert flops(PRESETS[name]) / (8 * 0.4 * peak) / 3600 == pytest.approx(float(hours[1]), rel=0.03)
