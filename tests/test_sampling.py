"""Distributions against numpy, and text from a trained run by the command line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.codec import ByteCodec, CharCodec
from data_prep.errors import InputError
from model.config import ModelConfig
from model.generate import main as generate_main
from model.generate import stream_text
from model.gpt import GPT, build_model
from model.sampling import Sampling, generate_tokens, next_token_probabilities
from model.trained import load_trained
from tests.runs import ROOT, called, tiny_config
from train.main import run
from train.mesh import Mesh

LOGITS = torch.randn(128, generator=torch.Generator().manual_seed(1)) * 3


def reference(temperature: float, top_k: int | None, vocab_size: int) -> np.ndarray:
    logits = LOGITS[:vocab_size].double().numpy() / temperature
    if top_k is not None:
        logits[np.argsort(-logits, kind="stable")[top_k:]] = -np.inf
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
def test_probabilities_equal_numpys(temperature: float, top_k: int | None) -> None:
    found = next_token_probabilities(LOGITS, Sampling(temperature, top_k), vocab_size=100)
    assert found.shape == (100,)  # no padding
    np.testing.assert_allclose(found.numpy(), reference(temperature, top_k, 100), atol=1e-6)


def test_draws_follow_the_probabilities() -> None:
    probabilities = next_token_probabilities(LOGITS, Sampling(1.0, 8), vocab_size=100)
    draws = torch.multinomial(probabilities, 100_000, replacement=True, generator=torch.Generator().manual_seed(1))
    counts = np.bincount(draws.numpy(), minlength=100)
    expected = reference(1.0, 8, 100) * 100_000
    kept = expected > 0
    assert counts[~kept].sum() == 0 and kept.sum() == 8
    assert ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum() < 24  # chi-square, 7 degrees, p = 0.001


def test_greedy_takes_the_likeliest() -> None:
    probabilities = next_token_probabilities(LOGITS, Sampling(0.0, None), vocab_size=100)
    assert probabilities.argmax() == LOGITS[:100].argmax() and probabilities.sum() == 1


def test_generation_equals_the_model_on_exact_lengths_past_the_context() -> None:
    model = build_model(ModelConfig(2, 2, 32, vocab_size=50, context_len=8), seed=3).eval()
    generator = torch.Generator().manual_seed(1)
    found = generate_tokens(model, [1, 2, 3], sampling=Sampling(0.0, None), generator=generator)
    tokens = [1, 2, 3]
    for _ in range(12):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens[-8:]]))[0, -1, :50].argmax()))
    assert [next(found) for _ in range(12)] == tokens[3:]


def test_stop_token_ends_it() -> None:
    model = build_model(ModelConfig(1, 1, 8, vocab_size=50, context_len=8), seed=3).eval()
    likeliest = int(model(torch.tensor([[1]]))[0, -1, :50].argmax())
    generator = torch.Generator().manual_seed(1)
    found = generate_tokens(model, [1], sampling=Sampling(0.0, None), generator=generator, stop_id=likeliest)
    assert list(found) == []


def test_streams_whole_characters_only() -> None:
    text = "h\u00e9llo \U0001f600"
    pieces = list(stream_text(ByteCodec(), text.encode()))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert list(stream_text(ByteCodec(), [0xE2, 0x82]))[-1] == "\ufffd"
    assert "".join(stream_text(CharCodec("ab"), [0, 1, 1])) == "abb"


@pytest.mark.parametrize(("temperature", "top_k", "said"), [(-1.0, 5, "--temperature"), (1.0, 0, "--top-k")])
def test_bad_settings_are_refused(temperature: float, top_k: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Sampling(temperature, top_k)


@pytest.fixture(scope="module")
def trained_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("speak") / "run"
    run(tiny_config(tiny_data, run_dir, steps=100), Mesh(0, 1, torch.device("cpu")))
    return run_dir


def generate(*args: str) -> "subprocess.CompletedProcess[str]":
    return called(generate_main, *args)


def test_a_trained_run_speaks(trained_run: Path) -> None:
    """The script itself once, and what it does for other arguments without a new interpreter."""
    args = [str(trained_run), "--prompt", "The cat", "--max-tokens", "60", "--seed", "4"]
    script = [sys.executable, "model/generate.py", *args, "--num-samples", "3"]
    three = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    samples = three.split("--- sample ")[1:]
    assert len(samples) == 3 and len({sample[2:] for sample in samples}) == 3
    assert all(sample[2:].startswith("The cat") and len(sample) >= 60 for sample in samples)
    assert generate(*args).stdout == samples[0][2:], "sample 1 must not depend on how many are asked for"
    assert generate(*args, "--temperature", "0").stdout != samples[0][2:]


def test_a_single_checkpoint_speaks_as_its_run_does(trained_run: Path) -> None:
    checkpoint = str(trained_run / "checkpoints" / "step_00000100")
    args = ["--max-tokens", "20"]
    assert generate(checkpoint, *args).stdout == generate(str(trained_run), *args).stdout != ""


def test_loaded_weights_are_the_trained_ones(trained_run: Path) -> None:
    trained = load_trained(trained_run)
    assert trained.step == 100
    assert isinstance(trained.model, GPT) and trained.model.is_tied
    assert trained.model.lm_head.weight is trained.model.transformer["wte"].weight
    assert not trained.model.training


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere"], "no such run directory"),
        (["RUN", "--prompt", "\u00fc"], "not among this tokenizer's"),
        (["RUN", "--top-k", "0"], "--top-k 0 must be at least 1"),
        (["RUN", "--max-tokens", "0"], "--max-tokens 0 must be at least 1"),
        (["EMPTY"], "no checkpoint in it yet"),
    ],
)
def test_bad_input_is_one_line_and_status_2(trained_run: Path, tmp_path: Path, args: list[str], said: str) -> None:
    places = {"RUN": str(trained_run), "EMPTY": str(tmp_path)}
    done = generate(*(places.get(arg, arg) for arg in args))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and said in done.stderr
