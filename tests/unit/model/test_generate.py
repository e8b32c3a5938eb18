"""Text from a trained run by the command line: one prompt, a file of them, and what is refused."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import load_model
from model.generate import main as generate_main
from model.generate import sample_generator
from model.gpt import GPT
from tests.helpers.runs import ROOT, called, tiny_config
from train.main import run
from train.processes.group import ProcessGroup


@pytest.fixture(scope="module")
def trained_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("speak") / "run"
    run(tiny_config(tiny_data, run_dir, steps=100), ProcessGroup(0, 1, torch.device("cpu")))
    return run_dir


def generate(*args: str) -> "subprocess.CompletedProcess[str]":
    return called(generate_main, *args)


def said(*args: str) -> list[dict[str, Any]]:
    done = generate(*args)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


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
    for flags in (["--batch-size", "1"], ["--batch-size", "2"], ["--no-cache"]):
        assert generate(*args, "--num-samples", "3", *flags).stdout == three, flags


def test_a_single_checkpoint_speaks_as_its_run_does(trained_run: Path) -> None:
    checkpoint = str(trained_run / "checkpoints" / "step_00000100")
    args = ["--max-tokens", "20"]
    assert generate(checkpoint, *args).stdout == generate(str(trained_run), *args).stdout != ""


def test_a_file_of_prompts_comes_back_as_json_lines(trained_run: Path, tmp_path: Path) -> None:
    """As each prompt says by itself, whatever the batch, of lengths that pass the context of 32 and do not."""
    file = tmp_path / "prompts.jsonl"
    prompts = ["The cat", "A", "The dog and the cat and the dog and the cat", ""]
    lines = [json.dumps(prompt if i % 2 else {"prompt": prompt}) for i, prompt in enumerate(prompts)]
    file.write_text("\n\n".join(lines))
    args = [str(trained_run), "--prompts-file", str(file), "--max-tokens", "40", "--num-samples", "2", "--keep", "16"]
    found = said(*args)
    assert [(row["prompt"], row["sample"]) for row in found] == [(p, i) for p in prompts for i in (1, 2)]
    tokenizer = load_model(trained_run).tokenizer
    for row in found:
        assert list(row) == ["prompt", "sample", "text", "tokens", "stopped_by"]
        assert row["stopped_by"] == "max_tokens" and len(row["tokens"]) == 40
        assert tokenizer.decode_bytes(row["tokens"]).decode() == row["text"]
    assert len({row["text"] for row in found}) == len(found)
    assert said(*args, "--batch-size", "3") == said(*args, "--no-cache", "--batch-size", "1") == found
    alone = generate(str(trained_run), "--prompt", "The cat", "--max-tokens", "40", "--keep", "16")
    assert alone.stdout == f"The cat{found[0]['text']}\n"


def test_prompts_come_from_standard_input(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a stop string ends each before itself."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'"The "\n{"prompt": "A "}\n')))
    whole = said(str(trained_run), "--prompts-file", "-", "--max-tokens", "60")
    stop = whole[0]["text"][20:22]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'"The "\n{"prompt": "A "}\n')))
    found = said(str(trained_run), "--prompts-file", "-", "--max-tokens", "60", "--stop", stop)
    assert found[0]["stopped_by"] == "stop"
    for cut, row in zip(found, whole, strict=True):
        assert cut["text"] == row["text"].split(stop)[0] and cut["tokens"] == row["tokens"][: len(cut["tokens"])]
        assert (cut["stopped_by"] == "stop") == (stop in row["text"])


def test_loaded_weights_are_the_trained_ones(trained_run: Path) -> None:
    trained = load_model(trained_run)
    assert trained.step == 100
    assert isinstance(trained.model, GPT) and trained.model.is_tied
    assert trained.model.lm_head.weight is trained.model.transformer["wte"].weight
    assert not trained.model.training


def test_every_sample_has_random_numbers_of_its_own() -> None:
    positions = [(seed, index, prompt) for seed in (1, 2) for index in range(20) for prompt in range(200)]
    first = {torch.rand(2, generator=sample_generator(*place)).numpy().tobytes() for place in positions}
    assert len(first) == len(positions)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere"], "no such run directory"),
        (["RUN", "--prompt", "\u00fc"], "--prompt '\u00fc': character '\u00fc' at 0 is not among this tokenizer's"),
        (["RUN", "--top-k", "0"], "--top-k 0 must be at least 1"),
        (["RUN", "--top-p", "1.5"], "--top-p 1.5 must be more than 0 and at most 1"),
        (["RUN", "--max-tokens", "0"], "--max-tokens 0 must be at least 1"),
        (["RUN", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["RUN", "--keep", "33"], "--keep 33 must be at least 1 and at most the model's context, 32"),
        (["RUN", "--stop", "a", ""], "--stop ''"),
        (["RUN", "--no-cache", "--compile"], "--compile compiles the step of one token after a cache: not with"),
        (["RUN", "--prompt", "a", "--prompts-file", "-"], "--prompt and --prompts-file: give one of them"),
        (["RUN", "--prompts-file", "EMPTY/gone"], "EMPTY/gone"),
        (["EMPTY"], "no checkpoint in it yet"),
    ],
)
def test_bad_input_is_one_line_and_status_2(trained_run: Path, tmp_path: Path, args: list[str], said: str) -> None:
    done = generate(*(arg.replace("RUN", str(trained_run)).replace("EMPTY", str(tmp_path)) for arg in args))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and said.replace("EMPTY", str(tmp_path)) in done.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"The", "no JSON"),
        (b'"The', "no JSON"),
        (b"\xff\xfe\xff", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'["The"]', "give a JSON string"),
        (b'{"prompt": 1}', "give a JSON string"),
        (b'{"prompt": "The", "seed": 1}', "give a JSON string"),
        (b'{"text": "The"}', "give a JSON string"),
        (b"null", "give a JSON string"),
        (b'"\\ud800"', "not among this tokenizer's"),
    ],
)
def test_a_bad_line_of_prompts_is_named(trained_run: Path, tmp_path: Path, line: bytes, said: str) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(b'"The"\n' + line + b"\n")
    done = generate(str(trained_run), "--prompts-file", str(tmp_path / "prompts.jsonl"), "--max-tokens", "2")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"--prompts-file {tmp_path}/prompts.jsonl:2: " in done.stderr and said in done.stderr
