"""Damage to a run or its data while no process trains it, and how a person would mend what no start can."""

import os
import random
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.damage import KINDS, damage
from tests.helpers.faults import Episode
from train.metrics.rows import KEPT_FILES

# The user who runs the soak may be root, who reads everything.
FILE_KINDS = tuple(kind for kind in KINDS if kind != "unreadable")


@dataclass(frozen=True)
class Damage:
    """What was damaged before a start, with a copy of the run and the data as they were."""

    texts: list[str]
    paths: list[Path]
    run_dir: Path
    data: Path
    backup: Path

    def __str__(self) -> str:
        return "; ".join(self.texts)

    @property
    def is_of_data(self) -> bool:
        return any(path.is_relative_to(self.data) for path in self.paths)

    @property
    def is_of_rows(self) -> bool:
        return any(path.name in KEPT_FILES for path in self.paths)

    def mend(self) -> None:
        """Put everything back, as a person with a backup would."""
        for path in (self.run_dir, self.data):
            shutil.rmtree(path)
            copy_all(self.backup / path.name, path)


def copy_all(path: Path, to: Path) -> None:
    """Copy a folder with all that is in it, FIFOs and links too."""
    subprocess.run(["cp", "-a", path, to], check=True)


def inflict(episode: Episode, run_dir: Path, data: Path, folder: Path) -> Damage | None:
    """Do the episode's damage and return it; None if there is nothing to damage yet. `folder` is for copies."""
    if not episode.at_rest or not (run_dir / "status.json").exists():
        return None
    backup, outside = folder / "backup", folder / "outside"
    for path in (backup, outside):
        path.mkdir()
    for path in (run_dir, data):
        copy_all(path, backup / path.name)
    done = Damage([], [], run_dir, data, backup)
    for kind, seed in episode.at_rest:
        rng = random.Random(seed)
        if kind == "wrong data":
            files = [*data.glob("*.bin"), *data.glob("*.idx")]
        else:
            files = [path for path in run_dir.rglob("*") if path.is_file() and not path.is_symlink()]
            files = [path for path in files if ".aside_" not in str(path)]
            is_checkpoint = kind == "damaged checkpoint"
            files = [path for path in files if path.parent.name.startswith("step_") == is_checkpoint]
        if not files:
            continue
        path = rng.choice(sorted(files))
        text = damage(path, rng, outside, ["flipped"] if kind == "wrong data" else FILE_KINDS)
        if path.name == "lock.json" and path.is_file():
            os.utime(path, (0, 0))  # or the start waits a minute for a heartbeat
        done.texts.append(
            f"{path.relative_to(path.parents[1] if kind == 'damaged checkpoint' else path.parent)}: {text}"
        )
        done.paths.append(path)
    return done if done.paths else None
