"""A fault on one rank is every rank's fault, in one line, and nobody waits for the one that has gone."""

from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from tests.groups import run_on_ranks
from tests.runs import tiny_config
from train.main import run
from train.mesh import Mesh


def outcome_of(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except InputError as error:
        return str(error)
    return "no error"


def train_where_one_rank_lacks_the_data(mesh: Mesh, data: Path, folder: Path) -> list[str]:
    elsewhere = folder / "not_here" if mesh.rank == 1 else data
    missing = outcome_of(run, tiny_config(elsewhere, folder / "run"), mesh)
    blocked = outcome_of(run, tiny_config(data, folder / "blocked"), mesh)
    return [missing, blocked, str(mesh.gather(mesh.rank)), str(mesh.on_main(lambda: mesh.rank))]


def test_faults_of_one_rank_are_shared(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where the run directory should be")
    outcomes = run_on_ranks(3, train_where_one_rank_lacks_the_data, tiny_data, tmp_path)
    assert outcomes[0] == outcomes[1] == outcomes[2]
    missing, blocked, ranks, main = outcomes[0]
    assert missing.startswith(f"rank 1: {tmp_path}/not_here: no such data directory")
    assert "File exists" in blocked and "\n" not in blocked
    assert (ranks, main) == ("[0, 1, 2]", "0")
    assert not (tmp_path / "run").exists()
