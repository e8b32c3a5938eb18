"""The presets: their sizes, and the costs that their docstrings state."""

import dataclasses
import re
from typing import Any

import pytest

from model.cost import model_cost
from model.costs.gpu_peaks import peak_flops
from train import presets
from train.command_line import parse
from train.config import Config, resolve, with_vocabulary
from train.config_checks import faults_of, settings_without_effect
from train.presets import PRESETS

WITH_COST = [name for name, config in PRESETS.items() if config.train.dtype == "bf16"]
VOCAB_SIZES = {"gpt2-small-134m": 32_000, "tinystories": 10_000, "openwebtext-32k": 32_000, "phase1": 65}


def flops(config: Config) -> float:
    vocab_size = VOCAB_SIZES.get(config.preset, 65 if "char" in config.preset else 50_257)
    sized = with_vocabulary(resolve(config), vocab_size)
    return model_cost(sized.model).flops_per_token * config.train.steps * config.train.batch_tokens


def parameters(name: str, **switches: Any) -> int:
    config = with_vocabulary(resolve(PRESETS[name]), VOCAB_SIZES.get(name, 50_257)).model
    return model_cost(dataclasses.replace(config, **switches)).num_parameters


def test_the_sizes_are_the_published_ones() -> None:
    """35.9M: 8 (4 x 512^2 + 3 x 512 x 1408) + 2 x 10,000 x 512, and so on, and the norms."""
    gpt2 = ["gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    sizes = [model_cost(PRESETS[name].model).num_parameters for name in gpt2]
    assert sizes == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]  # the released checkpoints'
    assert round(parameters("gpt2-small-134m") / 1e6, 1) == 134.1
    assert round(parameters("tinystories") / 1e6, 1) == 35.9
    assert round(parameters("openwebtext-32k") / 1e6, 1) == 58.5
    assert round(parameters("openwebtext-32k", tie=True) / 1e6, 1) == 42.1
    assert 390_000 < parameters("phase1") < 430_000
    assert 10e6 < parameters("phase2") < 50e6
    assert PRESETS["tinystories"].train.steps * PRESETS["tinystories"].train.batch_tokens == 163_840_000


def test_every_preset_is_sound() -> None:
    for name, config in PRESETS.items():
        assert parse([name], PRESETS).preset == name
        assert faults_of(config) == [] and settings_without_effect(config, "cuda", 8, "ddp") == []


@pytest.mark.parametrize("name", WITH_COST)
def test_the_cost_in_the_docstring_is_that_of_the_config(name: str) -> None:
    text = getattr(presets, name.replace("-", "_")).__doc__
    stated = re.search(r"Cost: ([\d.e]+) FLOPs", text)
    assert stated is not None and flops(PRESETS[name]) == pytest.approx(float(stated[1]), rel=0.03)
    hours = re.search(r"([\d.]+) hours on 8 H100 at 40 %", text)
    assert (hours is None) == (not name.startswith(("gpt2", "speedrun")))
    if hours is not None:
        peak = peak_flops("NVIDIA H100 80GB HBM3", "bf16")
        assert peak is not None
        assert flops(PRESETS[name]) / (8 * 0.4 * peak) / 3600 == pytest.approx(float(hours[1]), rel=0.03)
