"""model/generate.py on a trained run: one prompt, a file of prompts, and what it refuses."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.tokenizer import BpeTokenizer, CharTokenizer
from model import lens
from model.checkpoint import load_model
from model.generate import encode_prompt, main, sample_generator
from tests.helpers.runs import ROOT, called, tiny_config, tiny_flags
from train import main as trainer
from train import validate
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


def test_every_bit_of_a_seed_counts_and_small_seeds_draw_as_before() -> None:
    seeds = (1, 1337, 2**32 - 1)
    before = [3669339992, 5005344000, 4294983848241874]
    assert [sample_generator(seed, 2, 3).initial_seed() for seed in seeds] == before
    drawn = {torch.rand(1, generator=sample_generator(1 + (1 << bit), 0)).item() for bit in range(1, 63)}
    assert len(drawn) == 62


@pytest.mark.parametrize("seed", ["-1", str(2**63), str(2**64), "9" * 400])
def test_all_commands_have_one_range_of_seeds(trained_run: Path, tiny_data: Path, tmp_path: Path, seed: str) -> None:
    line = f"--seed {seed} must lie between 0 and {2**63 - 1}"
    for command, args in (
        (main, (str(trained_run), "--seed", seed)),
        (lens.main, ("induction", str(trained_run), "--seed", seed)),
        (trainer.main, (*tiny_flags(tiny_data, tmp_path / "run"), "--seed", seed)),
    ):
        done = called(command, *args)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and line in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_the_largest_seed_is_taken_by_all(trained_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    seed = str(2**63 - 1)
    assert called(main, str(trained_run), "--seed", seed, "--max-tokens", "3").returncode == 0
    assert called(lens.main, "induction", str(trained_run), "--seed", seed, "--half", "8").returncode == 0
    config = dataclasses.replace(tiny_config(tiny_data, tmp_path / "run", steps=2), seed=2**63 - 1)
    run(config, ProcessGroup(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("step", ["\u00b2", "\u0661", "1\u00b3", "+1", "1_0", " 1"])
def test_a_step_has_plain_digits(trained_run: Path, tiny_data: Path, tmp_path: Path, step: str) -> None:
    name = f"{trained_run}@{step}"
    for command, args in (
        (main, (name,)),
        (validate.main, (name,)),
        (trainer.main, (*tiny_flags(tiny_data, tmp_path / "run"), "--from-checkpoint", name)),
    ):
        done = called(command, *args)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "no such run directory or checkpoint" in done.stderr


def test_prompts_may_begin_with_a_byte_order_mark_and_hold_no_endless_number(trained_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'"The "\n')
    assert json_lines(trained_run, "--prompts-file", str(path), "--max-tokens", "2")[0]["prompt"] == "The "
    path.write_text("9" * 5_000)
    done = called(main, str(trained_run), "--prompts-file", str(path))
    assert done.returncode == 2 and done.stderr.startswith(f"generate: --prompts-file {path}:1: no JSON")


IN_TURN = """
import sys; sys.path[0] = sys.argv[1]
from model import generate, hf_bridge; from train import validate
run, out = sys.argv[2:]
generate.main([run, "--max-tokens", "3"])
validate.main([run, "--tokens", "64"])
hf_bridge.main(["export", run, "--out", out])
generate.main([out, "--max-tokens", "3"])
"""


def test_a_run_directory_that_is_no_utf8_is_read_and_named(trained_run: Path, tmp_path: Path) -> None:
    """In a process of its own, since its console decides what can be printed."""
    pytest.importorskip("safetensors")
    folder = Path(os.fsdecode(os.fsencode(tmp_path / "r") + b"\xff\xe9"))
    shutil.copytree(trained_run, folder)
    out = Path(os.fsdecode(os.fsencode(tmp_path / "o") + b"\xff"))
    command = [sys.executable, "-c", IN_TURN, *map(str, (ROOT, folder, out))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("generate: ") and "rename the folder" in done.stderr
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"{out}: step 100".encode("utf-8", "backslashreplace").decode() in done.stdout
    report = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    assert json.loads(report)["model"].startswith(str(folder))
    assert "\\udcff" in (out / "README.md").read_text(encoding="utf-8")
    out.rename(tmp_path / "out")
    assert called(main, str(tmp_path / "out"), "--max-tokens", "3").returncode == 0
