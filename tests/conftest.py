"""Shared data, a tiny data set, and the rule that CI skips nothing."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

# Before torch is imported anywhere: bits are compared, and the order of addition depends on the threads.
os.environ["OMP_NUM_THREADS"] = "1"
if os.environ.get("GPU_TESTS") != "cuda":  # as benchmarks/gpu_check.py sets it for tests/gpu
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo processes share one machine, whatever GPUs it has
if (SHARED_DATA / "tiktoken_cache").is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED_DATA / "tiktoken_cache")

import torch

from tests.helpers.groups import keep_frozen
from tests.helpers.runs import make_tiny_data

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None]:  # a hook wrapper yields once and returns the report
    report = yield
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):  # type: ignore[attr-defined]
        report.outcome = "failed"  # type: ignore[attr-defined]
    return report


# Longest first, so that workers end together (with --no-loadscope-reorder; files stay whole).
LONGEST = (
    "test_damaged_files",
    "test_modes",
    "test_golden",
    "test_memory",
    "test_nonfinite",
    "test_loop",
    "test_validate",
    "test_parallel",
    "test_precision",
    "test_fineweb_kills",
    "test_exact",
    "test_tracking",
    "test_sweep",
    "test_commands",
    "test_compiled_models",
    "test_harness",
    "test_fineweb",
    "test_hub",
    "test_async_checkpoints",
    "test_communication",
    "test_checkpoints",
    "test_disk",
    "test_lock",
    "test_watchdog",
    "test_survival",
    "test_soak",
    "test_lens",
    "test_hf_bridge",
    "test_directory",
    "test_losses",
    "test_switches",
    "test_tokenizer",
    "test_textfiles",
    "test_ladder",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


unfreeze = gc.unfreeze


def pytest_collection_finish() -> None:
    keep_frozen()


def pytest_sessionfinish() -> None:
    unfreeze()  # so that pytest's last look finds what leaked


@pytest.fixture
def nothing_frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For a test of the collections themselves."""
    with monkeypatch.context() as patch:
        patch.setattr(gc, "unfreeze", unfreeze)
        unfreeze()
        yield
        gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text; see its README."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real text at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A character data set of 20,000 generated characters, several shards."""
    return make_tiny_data(tmp_path_factory.mktemp("tiny"))
