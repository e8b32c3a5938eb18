"""Measure the golden numbers: what tiny fixed runs, data sets and samples come to.

    python -m tests.golden.measure       # writes tests/golden/golden.json anew; takes about a minute on one core

Tests that compare one mode with another cannot see what moves all modes alike. These numbers can: record them again
only in a commit that means to change them, and say there why they changed.
"""

import hashlib
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the order of addition depends on the threads
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from torch import Tensor

from data_prep.fineweb import main as fineweb
from data_prep.manifest import read_manifest
from data_prep.textfiles import main as textfiles
from model.generate import main as generate
from tests.helpers.corpus import make_text
from tests.helpers.groups import leaving_no_group, run_on_ranks
from tests.helpers.pages import make_pages, write_pages
from tests.helpers.runs import called, curve, final_tensors, make_tiny_data, tiny_flags, validations
from train.command_line import parse
from train.data import permute, substitutes
from train.main import run
from train.presets import PRESETS
from train.processes.group import ProcessGroup

GOLDEN = Path(__file__).with_name("golden.json")
STEPS = 8

MUON = "--optim.name muon --optim.lr-peak 0.02 --optim.vector-lr 0.01 --optim.momentum-warmup-steps 5"

# Name -> number of processes and the flags on top of tests/helpers/runs.py's tiny run.
RUNS: dict[str, tuple[int, str]] = {
    "plain": (1, ""),
    "another seed": (1, "--seed 7"),
    "micro-batches": (1, "--train.micro-batch 2"),
    "chunked loss": (1, "--train.loss chunked"),
    "activation checkpointing": (1, "--train.activation-checkpointing"),
    "bf16": (1, "--train.dtype bf16"),
    "fp16 with a loss scale": (1, "--train.dtype fp16"),
    "no clipping": (1, "--optim.clip-norm None"),
    "wsd": (1, "--optim.schedule wsd --optim.warmdown-fraction 0.5"),
    "constant": (1, "--optim.schedule constant"),
    "skipped sequences": (1, "--data.skip-sequences 0 1 2 3 4 5 6 7 8 9"),
    "rope": (1, "--model.position-embedding rope"),
    "no positions": (1, "--model.position-embedding none"),
    "rmsnorm": (1, "--model.norm rmsnorm"),
    "no norms": (1, "--model.norm none"),
    "post-norm": (1, "--model.norm-place post"),
    "relu2": (1, "--model.mlp relu2"),
    "silu": (1, "--model.mlp silu"),
    "swiglu": (1, "--model.mlp swiglu"),
    "mlp width": (1, "--model.mlp-width 48"),
    "own head": (1, "--model.no-tie"),
    "no bias": (1, "--model.no-bias"),
    "qk-norm": (1, "--model.qk-norm"),
    "soft cap": (1, "--model.logit-softcap 3"),
    "soft cap, chunked": (1, "--model.logit-softcap 3 --train.loss chunked"),
    "zero-initialised projections": (1, "--model.zero-init-projections"),
    "value residual": (1, "--model.value-residual"),
    "switches of recipes": (
        1,
        "--model.no-tie --model.zero-init-head --model.logit-softcap 3 --model.softcap-form rsqrt "
        "--model.embedding-norm --model.embedding-shortcut --model.value-embeddings 1 --model.skips",
    ),
    "naive attention": (1, "--model.attention naive"),
    "window": (1, "--model.window 9"),
    "dropout": (1, "--model.dropout 0.1"),
    "mean of the weights": (1, "--optim.average-fraction 0.5"),
    "batch stages": (1, "--train.batch-stages 3:768 6:1152"),
    "muon": (1, MUON),
    "bigram": (1, "--model.kind bigram"),
    "head": (1, "--model.kind head"),
    "heads": (1, "--model.kind heads"),
    "block": (1, "--model.kind block"),
    "ddp on 2": (2, "--parallel.mode ddp --train.micro-batch 3"),
    "fsdp on 2": (2, "--parallel.mode fsdp --train.micro-batch 3"),
    "hsdp on 4": (4, "--parallel.mode hsdp --parallel.shard-size 2 --train.micro-batch 1"),
    "muon, ddp on 2": (2, f"{MUON} --parallel.mode ddp --train.micro-batch 3"),
    "muon, hsdp on 4": (4, f"{MUON} --parallel.mode hsdp --parallel.shard-size 2 --train.micro-batch 1"),
}


def machine() -> str:
    """Return what decides the last bits of a sum: processor, its instructions and torch's build."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = [
        line.split(":")[1].strip() for line in lines if line.startswith(("model name", "model\t", "cpu family"))
    ]
    kind = [platform.machine(), *processor[:3], torch.backends.cpu.get_cpu_capability(), torch.__version__]
    return ", ".join(kind)


def digest(tensors: dict[str, Tensor]) -> str:
    """Return the sha256 of names, dtypes, shapes and bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def train_all(group: ProcessGroup, data: Path, folder: Path, names: list[str]) -> None:
    for name in names:
        flags = [*tiny_flags(data, folder / name), "--train.steps", str(STEPS), "--validate.every", str(STEPS)]
        flags += ["--sample.every", "None"]
        with leaving_no_group(group):
            run(parse([*flags, *RUNS[name][1].split()], PRESETS), group)


def measure_runs(data: Path, folder: Path) -> dict[str, Any]:
    """Train every run of RUNS -> its losses, gradient norms, validation losses and the sha256 of its last state."""
    for world in (1, 2, 4):
        run_on_ranks(world, train_all, data, folder, [name for name in RUNS if RUNS[name][0] == world])
    return {
        name: {
            "losses": [loss for _, loss, _, _ in curve(folder / name)],
            "norms": [norm for _, _, norm, _ in curve(folder / name)],
            "val_losses": [loss for _, loss, _ in validations(folder / name)],
            "state": digest(final_tensors(folder / name)),
        }
        for name in RUNS
    }


def measure_data(folder: Path, rank_file: Path) -> dict[str, Any]:
    """Prepare data sets by each command and tokenizer -> the fingerprint of the stream and the sha256 of each shard."""
    (folder / "text.txt").write_text(make_text(30_000, seed=3), encoding="utf-8")
    for number in range(2):
        write_pages(folder / "pages" / f"{number:03d}_00000.parquet", make_pages(60, number))
    prepared = ["--input", str(folder / "text.txt"), "--split-documents-on", "Cat", "--shard-tokens", "5000"]
    pages = ["--source", "local", "--data-files", str(folder / "pages" / "*.parquet"), "--tokenizer", str(rank_file)]
    pages += ["--shard-tokens", "5000"]
    commands: dict[str, tuple[Any, list[str]]] = {
        "characters": (textfiles, [*prepared, "--tokenizer", "char"]),
        "bytes": (textfiles, [*prepared, "--tokenizer", "byte"]),
        "GPT-2's byte pairs": (textfiles, [*prepared, "--tokenizer", str(rank_file)]),
        "pages": (fineweb, pages),
        "pages in order": (fineweb, [*pages, "--split-mode", "first-shard", "--dedup", "none", "--shuffle", "none"]),
    }
    measured = {}
    for name, (command, args) in commands.items():
        out = folder / "prepared" / name
        done = called(command, *args, "--out", str(out), "--workers", "1")
        assert done.returncode == 0, done.stderr
        shards = sorted([*out.glob("*.bin"), *out.glob("*.idx")])
        measured[name] = {"fingerprint": read_manifest(out).fingerprint} | {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards
        }
    return measured


def measure_order() -> dict[str, Any]:
    """Return where the computed permutation sends the first sequences, and what stands in for skipped ones."""
    first = torch.arange(12).numpy().astype("uint64")
    return {
        "permutations": {f"{n} {key}": permute(first, n, key).tolist() for n in (12, 562, 10**9) for key in (0, 1337)},
        "stand-ins": {str(sequence): other for sequence, other in substitutes([3, 4, 9, 11], 12).items()},
    }


def measure_samples(run_dir: Path) -> dict[str, str]:
    """Sample from a trained run with each way of drawing -> the text that the command prints."""
    ways = {
        "greedy": "--temperature 0",
        "drawn": "",
        "top-k and top-p": "--top-k 5 --top-p 0.9",
        "no cache": "--no-cache",
    }
    samples = {}
    for name, flags in ways.items():
        done = called(generate, str(run_dir), "--prompt", "The ", "--max-tokens", "60", "--seed", "3", *flags.split())
        assert done.returncode == 0, done.stderr
        samples[name] = done.stdout
    return samples


def measure(folder: Path, rank_file: Path) -> dict[str, Any]:
    """Return all golden numbers, made in an empty `folder`."""
    torch.set_num_threads(1)
    (folder / "runs").mkdir()
    runs = measure_runs(make_tiny_data(folder), folder / "runs")
    return {
        "machine": machine(),
        "runs": runs,
        "data": measure_data(folder, rank_file),
        "order": measure_order(),
        "samples": measure_samples(folder / "runs" / "plain"),
    }


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as temporary:
        numbers = measure(Path(temporary), root.parent / "shared" / "data" / "gpt2.tiktoken")
    GOLDEN.write_text(json.dumps(numbers, indent=1) + "\n", encoding="ascii")
    print(GOLDEN)
