"""Break one important line after the other in a copy of the tree; a test must fail for each.

    python -m tests.golden.mutations                 # all of them; some ten minutes on one core
    python -m tests.golden.mutations "loss scale"    # those whose names contain this

The exit status is 1 if any mutation survives.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutation(NamedTuple):
    """A replacement of `old` by `new` in `file`, for which one of `tests` (pytest's arguments) must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    Mutation(
        "loss scaled twice",
        "train/losses.py",
        "return torch.stack([loss * scale, loss.detach()])",
        "return torch.stack([loss * scale * scale, loss.detach()])",
        "tests/unit/train/test_losses.py",
    ),
    Mutation(
        "padding scored",
        "train/losses.py",
        "loss = F.cross_entropy(logits_NV, targets_N,",
        "loss = F.cross_entropy(F.pad(logits_NV, (0, 7)), targets_N,",
        "tests/unit/train/test_losses.py",
    ),
    Mutation(
        "loss divided by this rank's share",
        "train/state.py",
        "group.world / self.step_tokens(position)",
        "1 / self.step_tokens(position)",
        "tests/distributed/test_modes.py -k gradient",
    ),
    Mutation(
        "DDP never synchronises",
        "train/parallel/apply.py",
        "module.require_backward_grad_sync = is_last",
        "module.require_backward_grad_sync = False",
        "tests/distributed/test_modes.py -k gradient",
    ),
    Mutation(
        "FSDP2 reduces every micro-batch",
        "train/parallel/apply.py",
        "module.set_requires_gradient_sync(is_last)",
        "module.set_requires_gradient_sync(True)",
        "tests/distributed/test_communication.py",
    ),
    Mutation(
        "replicas counted twice in the norm",
        "train/loop.py",
        "/ processes.parallel_plan.replicas",
        "/ 1",
        "tests/distributed/test_modes.py",
    ),
    Mutation(
        "order of sequences without the epoch",
        "train/data.py",
        "key=(self._seed << 32) + epoch",
        "key=(self._seed << 32)",
        "tests/unit/train/test_data.py",
    ),
    Mutation(
        "one round fewer in the permutation",
        "train/data.py",
        "NUM_ROUNDS = 6",
        "NUM_ROUNDS = 5",
        "tests/golden",
    ),
    Mutation(
        "every rank reads the first rank's sequences",
        "train/data.py",
        "position + rank * plan.sequences_per_rank",
        "position + 0 * plan.sequences_per_rank",
        "tests/unit/train/test_data.py",
    ),
    Mutation(
        "every micro-batch has the dropout of the first",
        "train/data.py",
        "dropout_seeds(self._seed, first + start,",
        "dropout_seeds(self._seed, first,",
        "tests/unit/train/test_data.py",
    ),
    Mutation(
        "initial values do not depend on the name",
        "model/base.py",
        'hashlib.sha256(f"{seed}/{name}".encode())',
        'hashlib.sha256(f"{seed}".encode())',
        "tests/golden",
    ),
    Mutation(
        "biases and norms decay",
        "train/optim.py",
        '(kind != "vector" and config.name == "adamw")',
        'config.name == "adamw"',
        "tests/unit/train/test_optim.py",
    ),
    Mutation(
        "the warm-up begins at 0",
        "train/optim.py",
        "config.lr_peak * (step + 1) / config.warmup_steps",
        "config.lr_peak * step / config.warmup_steps",
        "tests/unit/train/test_optim.py",
    ),
    Mutation(
        "small gradients are blown up to the clipping norm",
        "train/optim.py",
        "excess = (norm / config.clip_norm).clamp(min=1.0)",
        "excess = norm / config.clip_norm",
        "tests/unit/train/test_optim.py tests/golden",
    ),
    Mutation(
        "steps after a bad one are made",
        "train/guards/nonfinite.py",
        "is_finite = is_finite & ~self.is_halted",
        "is_finite = is_finite",
        "tests/distributed/test_nonfinite.py",
    ),
    Mutation(
        "a step that is not finite is made",
        "train/optim.py",
        "(~is_finite).float()",
        "torch.zeros_like(norm)",
        "tests/unit/train/test_optim.py tests/distributed/test_nonfinite.py",
    ),
    Mutation(
        "Muon steps along its momentum, not beyond it",
        "train/muon.py",
        "    torch._foreach_lerp_(gradients, momenta, momentum)\n",
        "    torch._foreach_copy_(gradients, momenta)\n",
        "tests/unit/train/test_muon.py",
    ),
    Mutation(
        "Muon takes tall matrices for wide ones",
        "train/muon.py",
        "return max(1.0, rows / columns) ** 0.5",
        "return max(1.0, columns / rows) ** 0.5",
        "tests/unit/train/test_muon.py",
    ),
    Mutation(
        "Muon takes queries, keys and values for one matrix",
        "model/gpt.py",
        'return 3 if name.endswith("c_attn.weight") else 1',
        "return 1",
        "tests/unit/train/test_muon.py",
    ),
    Mutation(
        "Muon makes a step that is not finite",
        "train/muon.py",
        "        torch.where(is_finite, gradient, buffer, out=gradient)\n",
        "        pass\n",
        "tests/unit/train/test_muon.py",
    ),
    Mutation(
        "slices of Muon's weights come back in another order",
        "train/parallel/state_slices.py",
        "for shard in range(grid.shards) for replica in range(grid.replicas)]",
        "for replica in range(grid.replicas) for shard in range(grid.shards)]",
        "tests/distributed/test_muon.py -k hsdp4",
    ),
    Mutation(
        "AdamW's slices are not handed round",
        "train/optim.py",
        "    if optimizer.slices is not None:\n        optimizer.slices.share(",
        "    if False and optimizer.slices is not None:\n        optimizer.slices.share(",
        "tests/distributed/test_muon.py -k ddp",
    ),
    Mutation(
        "the oldest checkpoint is resumed",
        "model/checkpoint.py",
        "for checkpoint in reversed(list_checkpoints(run_dir)):",
        "for checkpoint in list_checkpoints(run_dir):",
        "tests/distributed/test_checkpoints.py tests/unit/train/test_directory.py tests/distributed/test_exact.py",
    ),
    Mutation(
        "hashes of checkpoints are not compared",
        "model/checkpoint.py",
        'if hashlib.file_digest(file, "sha256").hexdigest() != sha256:',
        "if False:",
        "tests/distributed/test_checkpoints.py",
    ),
    Mutation(
        "metadata may leave a part of a tensor as it was",
        "model/dcp_metadata.py",
        "require(position == whole, fault)",
        "require(position <= whole, fault)",
        "tests/unit/model/test_dcp_metadata.py",
    ),
    Mutation(
        "a checkpoint gets its name though a rank failed",
        "train/run/checkpoints.py",
        "        if text := self._group.on_main(reasons):\n",
        "        if (text := self._group.on_main(reasons)) and False:\n",
        "tests/distributed/test_checkpoints.py tests/distributed/test_disk.py",
    ),
    Mutation(
        "an atomic write is not",
        "common/files.py",
        "        temporary.replace(path)\n        fsync_directory(path.parent)\n    except OSError",
        "        path.write_bytes(temporary.read_bytes())\n        fsync_directory(path.parent)\n    except OSError",
        "tests/distributed/test_disk.py tests/unit/train/test_directory.py",
    ),
    Mutation(
        "the optimizer's state is not restored",
        "train/run/resume.py",
        "tensors = checkpoint_tensors(model, optimizer, loss_scale, step=",
        "tensors = tensors_to_read(model, checkpoint.metadata) or dict(step=",
        "tests/distributed/test_exact.py",
    ),
    Mutation(
        "rows after the restored step stay",
        "train/metrics/rows.py",
        'if row["step"] <= last_step]',
        "]",
        "tests/e2e/test_loop.py tests/distributed/test_exact.py",
    ),
    Mutation(
        "another optimizer is the same run",
        "train/run/identity.py",
        '*("--train.batch-stages", "--train.dtype", "--train.fp8", "--optim"),',
        '*("--train.batch-stages", "--train.dtype", "--train.fp8"),',
        "tests/unit/train/test_directory.py",
    ),
    Mutation(
        "two writers in one run directory",
        "train/run/lock.py",
        "os.link(mine, self._path)",
        "mine.replace(self._path)",
        "tests/unit/train/test_directory.py",
    ),
    Mutation(
        "documents of both splits",
        "data_prep/pipeline/selection.py",
        "def drop_duplicates(documents: Documents) -> None:\n",
        "def drop_duplicates(documents: Documents) -> None:\n    return\n",
        "tests/unit/data_prep/test_selection.py tests/unit/data_prep/test_fineweb.py",
    ),
]


def copy_tree(folder: Path) -> None:
    """Copy the files of the tree that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def is_caught(mutation: Mutation, tree: Path) -> bool:
    """Apply the mutation, run its tests, restore the file, and return whether a test failed."""
    path = tree / mutation.file
    content = path.read_text(encoding="utf-8")
    if content.count(mutation.old) != 1:
        raise SystemExit(
            f"{mutation.name}: {mutation.file} contains the text {content.count(mutation.old)} times, needed once"
        )
    path.write_text(content.replace(mutation.old, mutation.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests.split()]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    path.write_text(content, encoding="utf-8")
    if done.returncode not in (0, 1):  # pytest itself failed, for example on a missing test file
        raise SystemExit(f"{mutation.name}: pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print(f"{'caught  ' if failed else 'SURVIVES'} {mutation.name}  {failed[0][:150] if failed else ''}", flush=True)
    return bool(failed)


def main() -> None:
    mutations = [mutation for mutation in MUTATIONS if not sys.argv[1:] or sys.argv[1] in mutation.name]
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary) / "tree"
        copy_tree(tree)
        if (ROOT.parent / "shared").is_dir():
            (Path(temporary) / "shared").symlink_to(ROOT.parent / "shared")
        survivors = [mutation.name for mutation in mutations if not is_caught(mutation, tree)]
    print(f"{len(mutations) - len(survivors)} of {len(mutations)} caught")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
