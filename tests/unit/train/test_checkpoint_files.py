"""The files of a checkpoint: parts that each rank writes by itself, sealed with hashes of what was meant."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from common.errors import InputError
from model.checkpoint import SUMS_FILE, files_of, require_hashes
from train.run import directory
from train.run.checkpoint_files import Part, seal, write_part

# Larger than what Python's buffer holds, and smaller.
SHARES: list[dict[str, Tensor]] = [
    {"model.a": torch.randn(300, 1000), "model.b": torch.arange(7.0)},
    {"model.c": torch.randn(5, 3), "optimizer.c.step": torch.zeros(())},
    {},
]


def write_parts(folder: Path) -> list[Part]:
    return [write_part(folder, tensors, rank) for rank, tensors in enumerate(SHARES)]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_what_the_ranks_wrote_and_sha256sum_agrees(tmp_path: Path) -> None:
    seal(tmp_path, write_parts(tmp_path), {"progress": "here"}, is_first=True)
    names = {"__0_0.distcp", "__1_0.distcp", "__2_0.distcp", ".metadata", "state.json"}
    assert {path.name for path in tmp_path.iterdir()} == names | {SUMS_FILE}
    done = subprocess.run(["sha256sum", "-c", SUMS_FILE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("OK") == len(names)
    expected = {name: tensor for tensors in SHARES for name, tensor in tensors.items()}
    loaded: dict[str, Any] = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert json.loads((tmp_path / "state.json").read_text()) == {"progress": "here"}


def test_damage_between_writing_and_sealing_is_found(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    path = tmp_path / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    seal(tmp_path, parts, {}, is_first=True)
    with pytest.raises(InputError, match=r"__1_0\.distcp is damaged"):
        require_hashes(tmp_path, files_of(tmp_path))


def test_sealing_opens_no_file_of_a_part_and_as_many_for_any_number_of_them(tmp_path: Path) -> None:
    parts, opened, is_sealing = write_parts(tmp_path), list[str](), True

    def note(event: str, args: tuple[Any, ...]) -> None:
        if is_sealing and event == "open" and Path(str(args[0])).parent == tmp_path:
            opened.append(Path(str(args[0])).name)

    sys.addaudithook(note)  # nothing can remove it
    seal(tmp_path, parts, {}, is_first=False)
    is_sealing = False
    assert len(opened) == 3 and not [name for name in opened if "distcp" in name], opened


def test_what_could_not_be_loaded_is_not_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "SECONDS_TO_SEE", 0.1)
    parts = write_parts(tmp_path)
    (tmp_path / "__1_0.distcp").unlink()
    with pytest.raises(InputError, match=r"__1_0\.distcp of other ranks cannot be seen from rank 0"):
        seal(tmp_path, parts, {}, is_first=True)
    half = Part(parts[0].plan, [], parts[0].sums)  # its tensors have no place
    with pytest.raises(InputError, match=r"refused: 'model\.a' has no place for its bytes"):
        seal(tmp_path, [half], {}, is_first=True)
