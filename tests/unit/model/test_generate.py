"""model/generate.py on a trained run: one prompt, a file of prompts, and what it refuses."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.tokenizer import BpeTokenizer, CharTokenizer
from model.checkpoint import load_model
from model.generate import encode_prompt, main, sample_generator
from tests.helpers.runs import called, tiny_config
from train.main import run
from train.processes.group import ProcessGroup


@pytest.fixture(scope="module")
def trained_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("generate") / "run"
    run(tiny_config(tiny_data, run_dir, steps=100), ProcessGroup(0, 1, torch.device("cpu")))
    return run_dir


def generated(path: Path, *args: str) -> str:
    done = called(main, str(path), *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def json_lines(path: Path, *args: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in generated(path, *args).splitlines()]


def test_samples_of_a_prompt(trained_run: Path) -> None:
    args = ["--prompt", "The cat", "--max-tokens", "60", "--seed", "4"]
    three = generated(trained_run, *args, "--num-samples", "3")
    samples = [sample[2:] for sample in three.split("--- sample ")[1:]]
    assert len(samples) == len(set(samples)) == 3
    assert all(sample.startswith("The cat") and len(sample) >= 60 for sample in samples)
    assert generated(trained_run, *args) == samples[0], "sample 1 must not depend on --num-samples"
    assert generated(trained_run, *args, "--temperature", "0") != samples[0]
    for flags in (["--batch-size", "1"], ["--batch-size", "2"], ["--no-cache"]):
        assert generated(trained_run, *args, "--num-samples", "3", *flags) == three, flags
    checkpoint = trained_run / "checkpoints" / "step_00000100"
    assert generated(checkpoint, *args) == samples[0]


def test_a_file_of_prompts_gives_json_lines(trained_run: Path, tmp_path: Path) -> None:
    """Each prompt gets what it gets alone, in batches of any size, within the context of 32 and past it."""
    prompts = ["The cat", "A", "The dog and the cat and the dog and the cat", ""]
    lines = [json.dumps(prompt if i % 2 else {"prompt": prompt}) for i, prompt in enumerate(prompts)]
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(lines))
    more = ["--max-tokens", "40", "--keep", "16"]
    args = ["--prompts-file", str(tmp_path / "prompts.jsonl"), "--num-samples", "2", *more]
    rows = json_lines(trained_run, *args)
    assert [(row["prompt"], row["sample"]) for row in rows] == [(p, i) for p in prompts for i in (1, 2)]
    tokenizer = load_model(trained_run).tokenizer
    for row in rows:
        assert list(row) == ["prompt", "sample", "text", "tokens", "stopped_by"]
        assert row["stopped_by"] == "max_tokens" and len(row["tokens"]) == 40
        assert tokenizer.decode_bytes(row["tokens"]).decode() == row["text"]
    assert len({row["text"] for row in rows}) == len(rows)
    for flags in (["--batch-size", "3"], ["--no-cache", "--batch-size", "1"]):
        assert json_lines(trained_run, *args, *flags) == rows
    assert generated(trained_run, "--prompt", "The cat", *more) == f"The cat{rows[0]['text']}\n"


def test_prompts_from_standard_input_and_a_stop_string(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_stdin(*args: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'"The "\n{"prompt": "A "}\n')))
        return json_lines(trained_run, "--prompts-file", "-", "--max-tokens", "60", *args)

    whole = from_stdin()
    stop = whole[0]["text"][20:22]
    stopped = from_stdin("--stop", stop)
    assert stopped[0]["stopped_by"] == "stop"
    for cut, row in zip(stopped, whole, strict=True):
        assert cut["text"] == row["text"].split(stop)[0] and cut["tokens"] == row["tokens"][: len(cut["tokens"])]
        assert (cut["stopped_by"] == "stop") == (stop in row["text"])


def test_a_prompt_begins_a_document_and_is_never_empty() -> None:
    pairs = BpeTokenizer({bytes([i]): i for i in range(256)}, name="bytes")
    assert encode_prompt(pairs, "a") == [256, 97] and encode_prompt(pairs, "") == [256]
    letters = CharTokenizer("\nab")
    assert encode_prompt(letters, "a") == [1] and encode_prompt(letters, "") == [0]


def test_every_sample_has_its_own_random_numbers() -> None:
    keys = [(seed, index, prompt) for seed in (1, 2) for index in range(20) for prompt in range(200)]
    first = {torch.rand(2, generator=sample_generator(*key)).numpy().tobytes() for key in keys}
    assert len(first) == len(keys)


@pytest.fixture
def refusal(trained_run: Path, tmp_path: Path) -> Callable[..., str]:
    """Return the one line with which the command refuses its arguments; RUN and EMPTY stand for folders."""

    def refused(*args: str) -> str:
        done = called(main, *(arg.replace("RUN", str(trained_run)).replace("EMPTY", str(tmp_path)) for arg in args))
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr.replace(str(tmp_path), "EMPTY")

    return refused


def test_bad_flags_are_refused(refusal: Callable[..., str]) -> None:
    for args, message in (
        (["nowhere"], "no such run directory"),
        (["RUN", "--prompt", "\u00fc"], "--prompt '\u00fc': character '\u00fc' at 0 is not among this tokenizer's"),
        (["RUN", "--top-k", "0"], "--top-k 0 must be at least 1"),
        (["RUN", "--max-tokens", "0"], "--max-tokens 0 must be at least 1"),
        (["RUN", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["RUN", "--keep", "33"], "--keep 33 must be at least 1 and at most the model's context, 32"),
        (["RUN", "--stop", "a", ""], "--stop ''"),
        (["RUN", "--no-cache", "--compile"], "--compile compiles the step of one token after a cache: not with"),
        (["RUN", "--prompt", "a", "--prompts-file", "-"], "--prompt and --prompts-file: give one of them"),
        (["RUN", "--prompts-file", "EMPTY/gone"], "EMPTY/gone"),
        (["EMPTY"], "no checkpoint in it yet"),
    ):
        assert message in refusal(*args)


def test_a_bad_line_of_prompts_is_named(tmp_path: Path, refusal: Callable[..., str]) -> None:
    for message, lines in (
        ("no JSON", [b"The", b'"The', b"\xff\xfe\xff", b"[" * 100_000]),
        (
            "give a JSON string",
            [b'["The"]', b'{"prompt": 1}', b'{"prompt": "A", "seed": 1}', b'{"text": "A"}', b"null"],
        ),
        ("not among this tokenizer's", [b'"\\ud800"']),
        ("no JSON", [b"1" * 5_000]),
        ("a line of more than 16,777,216 bytes", [b'"' + b"x" * 2**24]),
    ):
        for line in lines:
            (tmp_path / "prompts.jsonl").write_bytes(b'"The"\n' + line + b"\n")
            text = refusal("RUN", "--prompts-file", "EMPTY/prompts.jsonl", "--max-tokens", "2")
            assert "--prompts-file EMPTY/prompts.jsonl:2: " in text and message in text
