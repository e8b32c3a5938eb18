"""lm-evaluation-harness on our model and, as its own `hf` model, on the folder that we export of it: the same numbers.

Local tasks of each kind of request; nothing here needs a network.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.textfiles import Options, prepare
from data_prep.tokenizer import BpeTokenizer
from model.hf_bridge import main as bridge
from tests.helpers.corpus import make_text
from tests.helpers.groups import run_on_ranks
from tests.helpers.hellaswag_items import make_rows
from tests.helpers.runs import ROOT, called, tiny_config
from train import harness
from train.main import run
from train.processes.group import ProcessGroup

pytestmark = [
    pytest.mark.long(reason="lm-eval takes ten seconds to import"),
    pytest.mark.filterwarnings("ignore"),  # of lm-eval, datasets and transformers about each other
]
ALONE = ProcessGroup(0, 1, torch.device("cpu"))
CHOICE = 'output_type: multiple_choice\ndoc_to_choice: "{{endings}}"\ndoc_to_target: label\n'
TASKS = {
    "tiny_choice": CHOICE + 'doc_to_text: "{{ctx}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n',
    "tiny_bare_choice": CHOICE + 'doc_to_text: ""\ntarget_delimiter: ""\nmetric_list: [{metric: acc}]\n',
    "tiny_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{long}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "tiny_generation": """
output_type: generate_until
doc_to_text: "{{ctx}}"
doc_to_target: "{{long}}"
generation_kwargs: {until: ["e o", "n;"], max_gen_toks: 20, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/: of byte pairs; exported/: the same for transformers; tasks/."""
    folder = tmp_path_factory.mktemp("harness")
    pieces = [bytes([byte]) for byte in range(256)] + [b" t", b"he", b" the", b"an", b"and", b" a"]
    BpeTokenizer({piece: rank for rank, piece in enumerate(pieces)}, name="tiny").save(folder)
    (folder / "text.txt").write_text(make_text(20_000), encoding="utf-8")
    prepare(Options(input=(str(folder / "text.txt"),), out=folder / "data", tokenizer=str(folder / "tokenizer")))
    config = tiny_config(folder / "data", folder / "run", steps=40, seq_len=64, batch_tokens=768)
    run(config, ALONE)
    assert called(bridge, "export", str(folder / "run"), "--out", str(folder / "exported")).returncode == 0
    docs = folder / "docs.json"
    docs.write_text("".join(json.dumps(row | {"long": make_text(300, seed=row["ind"])}) + "\n" for row in make_rows(9)))
    (folder / "tasks").mkdir()
    for name, text in TASKS.items():
        kwargs = json.dumps({"data_files": {"validation": str(docs)}, "cache_dir": str(folder / "cache")})
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {kwargs}\nvalidation_split: validation\n"
        (folder / "tasks" / f"{name}.yaml").write_text(head + text)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE=1 and HF_DATASETS_OFFLINE=1, also where the libraries have read them already."""
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(importlib.import_module(module), "HF_HUB_OFFLINE", True)


def evaluated(model: str, model_args: dict[str, Any], folder: Path, tasks: list[str]) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    settings: dict[str, Any] = {"batch_size": 3, "device": "cpu", "bootstrap_iters": 0, "log_samples": True}
    results: dict[str, Any] = lm_eval.simple_evaluate(model, model_args, tasks, task_manager=manager, **settings)
    return results


def answers(results: dict[str, Any], task: str) -> list[Any]:
    """Return the model's answers in the order of the documents."""
    return [sample["resps"] for sample in sorted(results["samples"][task], key=lambda each: each["doc_id"])]


def test_our_model_has_the_numbers_of_the_exported_folder(folder: Path) -> None:
    from train.evals import harness_model

    harness_model.use(ALONE)
    ours = evaluated("gpt-ladder", {"path": str(folder / "run")}, folder, list(TASKS))
    args = {"pretrained": str(folder / "exported"), "dtype": "float32"}
    theirs = evaluated("hf", args, folder, list(TASKS))
    for task in TASKS:
        our_answers, their_answers = answers(ours, task), answers(theirs, task)
        assert len(our_answers) == 9
        if task.startswith("tiny_generation"):
            assert our_answers == their_answers
            assert any(text for ((text,),) in our_answers)
            continue
        leaves = torch.utils._pytree.tree_leaves
        for own, other in zip(leaves(our_answers), leaves(their_answers), strict=True):
            if isinstance(own, bool) or own in ("True", "False"):
                assert own == other
            else:
                assert float(own) == pytest.approx(float(other), abs=1e-4)
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-5), (task, metric)


def test_the_command(folder: Path, tmp_path: Path) -> None:
    """lm-eval's own command line, for our model; in an interpreter of its own, since both set up the process."""
    command = [sys.executable, "train/harness.py", str(folder / "run"), "--tasks", "tiny_choice", "--limit", "3"]
    command += ["--include_path", str(folder / "tasks"), "--output_path", str(tmp_path / "results.json")]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "|tiny_choice|" in done.stdout and "gpt-ladder" in done.stdout
    (written,) = tmp_path.rglob("results*.json")
    assert json.loads(written.read_text())["n-samples"]["tiny_choice"]["effective"] == 3


def in_ranks(group: ProcessGroup, folder: Path) -> Any:
    from train.evals import harness_model

    harness_model.use(group)
    results = evaluated("gpt-ladder", {"path": str(folder / "run")}, folder, ["tiny_choice", "tiny_text"])
    return results["results"] if results is not None else None


def test_two_processes_share_the_requests(folder: Path) -> None:
    first, second = run_on_ranks(2, in_ranks, folder)
    assert second is None
    alone = in_ranks(ALONE, folder)
    for task in alone:
        for metric, value in alone[task].items():
            if isinstance(value, float):
                assert first[task][metric] == pytest.approx(value, rel=1e-6)


def test_requests_that_the_model_cannot_do_are_refused(folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    from common.errors import InputError
    from train.evals.harness_model import LadderLM

    def request(*args: Any) -> Instance:
        return Instance(request_type="loglikelihood", doc={}, arguments=args, idx=0)

    model = LadderLM(str(folder / "run"))
    with pytest.raises(InputError, match="generates with num_beams, which this model does not have"):
        model.generate_until([request("a", {"num_beams": 4, "max_gen_toks": 4})])
    with pytest.raises(InputError, match="generates 64 tokens, which the context of 64 has no room for"):
        model.generate_until([request("a", {"max_gen_toks": 64})])
    with pytest.raises(InputError, match="a continuation takes 65 tokens, more than the context, 64"):
        model.loglikelihood([request("a", "b" * 65)])
    run(tiny_config(tiny_data, tmp_path / "chars", steps=1), ALONE)
    chars = LadderLM(str(tmp_path / "chars"))
    assert chars.loglikelihood([request("The ", "cat")])[0][0] < 0
    with pytest.raises(InputError, match=r"the tokenizer \(char\) has no end-of-text token"):
        chars.loglikelihood([request("", "cat")])
    bad: list[tuple[dict[str, Any], str]] = [
        ({"dtype": "fp64"}, "--dtype 'fp64' must be fp32 or bf16"),
        ({"batch_size": "auto"}, "--batch_size auto must be a number of at least 1"),
        ({"device": "cuda:0"}, "--device cuda:0: torch .* sees no GPU here"),
    ]
    for options, message in bad:
        with pytest.raises(InputError, match=message):
            LadderLM(str(folder / "run"), **options)


def test_samples_differ_and_can_be_repeated(folder: Path) -> None:
    from lm_eval.api.instance import Instance

    from train.evals.harness_model import LadderLM

    sampled = ("The ", {"do_sample": True, "max_gen_toks": 16})
    requests = [Instance(request_type="generate_until", doc={}, arguments=sampled, idx=0) for _ in range(4)]
    first, again = (LadderLM(str(folder / "run"), batch_size=1).generate_until(requests) for _ in range(2))
    assert len(set(first)) == 4 and again == first


def test_lm_evals_command_line() -> None:
    for words in (["--dtype", "bf16"], ["--dtype=bf16"]):
        *_, model_args, _, tasks, flag, size = harness.command_line(["RUN", *words, "--tasks", "x"])
        assert json.loads(model_args) == {"path": "RUN", "dtype": "bf16"}
        assert (tasks, flag, size) == ("x", "--batch_size", "8")
    for own in (["--batch_size", "2"], ["--batch_size=2"], ["-b", "2"], ["--config", "c.yaml"]):
        assert harness.command_line(["RUN", *own])[-len(own) :] == own


def test_errors_of_the_command(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    done = called(harness.main, "--tasks", "x")
    assert done.returncode == 2
    assert done.stderr == "harness: --tasks: the model comes first: train/harness.py MODEL --tasks ...\n"
    assert "usage:" in called(harness.main, "--help").stdout
    monkeypatch.setitem(sys.modules, "lm_eval._cli", None)
    done = called(harness.main, "runs/none", "--tasks", "x")
    assert (done.returncode, done.stderr) == (2, "harness: the harness needs lm-eval: pip install -e '.[eval]'\n")
