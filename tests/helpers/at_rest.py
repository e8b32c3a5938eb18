"""Damage to a run or its data while no process trains it, and how a person would mend what no start can."""

import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.damage import KINDS, damage
from tests.helpers.faults import Episode
from train.metrics.rows import KEPT_FILES

# The user who runs the soak may be root, who reads everything.
FILE_KINDS = tuple(kind for kind in KINDS if kind != "unreadable")


@dataclass(frozen=True)
class Damage:
    """What was damaged, with a copy of the run and the data as they were before."""

    text: str
    path: Path
    backup: Path
    is_data: bool

    @property
    def is_of_rows(self) -> bool:
        return self.path.name in KEPT_FILES

    def mend(self, run_dir: Path, data: Path) -> None:
        """Put everything back, as a person with a backup would."""
        for path, copy in ((run_dir, self.backup / "run"), (data, self.backup / "data")):
            shutil.rmtree(path)
            shutil.copytree(copy, path, symlinks=True)


def inflict(episode: Episode, run_dir: Path, data: Path, folder: Path) -> Damage | None:
    """Do the episode's damage and return it; None if there is nothing to damage yet. `folder` is for copies."""
    if episode.at_rest is None or not (run_dir / "status.json").exists():
        return None
    kind, seed = episode.at_rest
    rng = random.Random(seed)
    backup, outside = folder / "backup", folder / "outside"
    outside.mkdir(exist_ok=True)
    shutil.copytree(run_dir, backup / "run", symlinks=True)
    shutil.copytree(data, backup / "data", symlinks=True)
    if kind == "wrong data":
        path = rng.choice(sorted([*data.glob("*.bin"), *data.glob("*.idx")]))
        content = path.read_bytes()
        where = rng.randrange(len(content))
        path.write_bytes(content[:where] + bytes([content[where] ^ rng.randint(1, 255)]) + content[where + 1 :])
        return Damage(f"byte {where} of {path.name} changed", path, backup, is_data=True)
    files = [path for path in run_dir.rglob("*") if path.is_file() and not path.is_symlink()]
    files = [path for path in files if ".aside_" not in str(path)]
    is_checkpoint = kind == "damaged checkpoint"
    files = [path for path in files if path.parent.name.startswith("step_") == is_checkpoint]
    if not files:
        return None
    path = rng.choice(sorted(files))
    text = damage(path, rng, outside, FILE_KINDS)
    if path.name == "lock.json" and path.is_file():
        os.utime(path, (0, 0))  # or the start waits a minute for a heartbeat
    return Damage(f"{path.relative_to(run_dir)}: {text}", path, backup, is_data=False)
