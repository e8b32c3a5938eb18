"""The whole way from the Hub to shards, with a server that plays it (tests/unit/data_prep/test_hub.py)."""

from pathlib import Path

import pytest

from data_prep import fineweb, fineweb_plan
from data_prep.hub.files import PINNED
from data_prep.manifest import read_manifest
from tests.helpers.data_dirs import contents, names
from tests.helpers.pages import make_pages, write_pages
from tests.helpers.runs import called
from tests.unit.data_prep.test_fineweb import refusal
from tests.unit.data_prep.test_hub import DATASET, MAIN, FakeHub, Fault, pauses, server

__all__ = ["pauses", "server"]  # fixtures, used by name

COMMIT = PINNED[DATASET]


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fineweb_plan, "UNIT_BYTES", 5_000)


@pytest.fixture
def pages(tmp_path: Path, server: FakeHub) -> Path:
    """Three files in a folder, which the Hub has too."""
    server.files.clear()
    for number in range(3):
        name = f"sample/10BT/{number:03d}_00000.parquet"
        path = write_pages(tmp_path / "copy" / name, make_pages(40, number))
        server.files[name] = path.read_bytes()
    return tmp_path / "copy" / "sample" / "10BT"


@pytest.fixture
def flags(tmp_path: Path, shared_data: Path) -> list[str]:
    out = str(tmp_path / "data" / "out")
    given = ["--out", out, "--tokenizer", str(shared_data / "gpt2.tiktoken"), "--workers", "1"]
    return [*given, "--val-tokens", "500", "--shard-tokens", "3000"]


def test_all_of_it_equals_the_local_files(tmp_path: Path, pages: Path, flags: list[str], server: FakeHub) -> None:
    server.faults["get"] = [Fault(429, {"Retry-After": "1"}), Fault(503)]
    done = called(fineweb.main, *flags)
    assert done.returncode == 0, done.stderr
    assert f"{DATASET} sample-10BT at {COMMIT[:12]}, 3 files" in done.stdout
    out = tmp_path / "data" / "out"
    manifest = read_manifest(out)
    assert manifest.source["revision"] == COMMIT
    assert [file["name"] for file in manifest.source["files"]] == sorted(server.files)
    inputs = ("--source", "local", "--data-files", str(pages))
    local = called(fineweb.main, *inputs, *flags, "--out", str(tmp_path / "local"))
    assert local.returncode == 0, local.stderr
    mine, theirs = contents(out), contents(tmp_path / "local")
    del mine["manifest.json"], theirs["manifest.json"]
    assert mine == theirs
    server.asked.clear()
    assert "already complete" in called(fineweb.main, *flags).stdout
    assert "already complete" in called(fineweb.main, *flags, "--revision", COMMIT).stdout
    assert "of other input" in refusal(called(fineweb.main, *flags, "--revision", MAIN))
    assert server.asked == []


def test_stages_need_the_network_only_for_the_download(
    tmp_path: Path, pages: Path, flags: list[str], server: FakeHub
) -> None:
    line = refusal(called(fineweb.main, *flags, "--stage", "tokenize"))
    assert "000_00000.parquet: not there (3 of 3 files are not); --stage download fetches them" in line
    assert called(fineweb.main, *flags, "--stage", "download").returncode == 0
    server.asked.clear()
    assert called(fineweb.main, *flags, "--stage", "tokenize").returncode == 0
    assert called(fineweb.main, *flags, "--stage", "pack").returncode == 0
    assert called(fineweb.main, *flags, "--stage", "verify").returncode == 0
    assert server.asked == []
    assert names(tmp_path / "data") == ["downloads", "out"]


def test_another_data_set_keeps_the_commit_that_main_was(
    tmp_path: Path, pages: Path, flags: list[str], server: FakeHub
) -> None:
    other = [*flags, "--dataset", "HuggingFaceFW/fineweb"]
    assert called(fineweb.main, *other, "--stage", "download").returncode == 0
    assert called(fineweb.main, *other, "--stage", "tokenize").returncode == 0
    assert server.of("info").count("main") == 1
    assert called(fineweb.main, *other, "--stage", "pack").returncode == 0
    assert read_manifest(tmp_path / "data" / "out").source["revision"] == MAIN
    assert "already complete" in called(fineweb.main, *other).stdout


def test_a_small_try_downloads_the_files_it_needs(
    tmp_path: Path, pages: Path, flags: list[str], server: FakeHub
) -> None:
    done = called(fineweb.main, *flags, "--max-tokens", "1500", "--val-tokens", "100")
    assert done.returncode == 0, done.stderr
    assert [what.split()[0] for what in server.of("get")] == ["sample/10BT/000_00000.parquet"]
    splits = read_manifest(tmp_path / "data" / "out").splits
    assert 1000 < sum(split.tokens for split in splits.values()) <= 1500


def test_a_dry_run_and_a_refusal_download_nothing(
    tmp_path: Path, pages: Path, flags: list[str], server: FakeHub
) -> None:
    done = called(fineweb.main, *flags, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "3 files" in done.stdout and "to download" in done.stdout
    assert not (tmp_path / "data").exists()
    assert "--name sample-20BT: must be" in refusal(called(fineweb.main, *flags, "--name", "sample-20BT"))
    server.faults["info"] = [Fault(404)]
    refusal(called(fineweb.main, *flags))
    assert names(tmp_path / "data") == [] and server.of("get") == []
