"""List, at a pinned commit, and fetch the parquet files of a data set on the Hugging Face Hub.

`list_files` needs the network; `download` only for what is not on the disk yet. HF_ENDPOINT (a mirror), HF_TOKEN and
HF_HUB_OFFLINE work as everywhere; so do proxies. download.py fetches, not the library's snapshot_download, which keeps
nothing of a file when its process is killed or its connection reset, gives up at the first 5xx to a file's request, and
takes a folder that holds anything for the answer when the Hub refuses.
"""

import contextlib
import fcntl
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from common.errors import InputError, writing_to
from data_prep.hub.download import TIMEOUT_SECONDS, clear_http_errors, fetch
from data_prep.pipeline.workers import Progress

# 14 files of sample/10BT, 9,672,101 rows, 28,518,193,415 bytes, as public repositories record it.
PINNED = {"HuggingFaceFW/fineweb-edu": "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"}
# The same in HuggingFaceFW/fineweb-edu and HuggingFaceFW/fineweb; beside these, every crawl by its name.
FOLDERS = {f"sample-{size}": f"sample/{size}" for size in ("10BT", "100BT", "350BT")} | {"default": "data"}
CRAWL = re.compile(r"CC-MAIN-\d{4}-\d{2}")
COMMIT = re.compile(r"\A[0-9a-f]{40}\Z")
FILES_AT_ONCE = 4
RECORD = ".verified"  # a line for each file that was hashed
LOCK = ".downloading"


@dataclass(frozen=True)
class HubFile:
    """path: in the repository, e.g. sample/10BT/000_00000.parquet. sha256: its Git LFS id."""

    path: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class HubListing:
    """revision: the commit, 40 hex digits. files: sorted by path."""

    dataset: str
    revision: str
    files: tuple[HubFile, ...]


def list_files(dataset: str, name: str, revision: str | None) -> HubListing:
    """Return the parquet files of a configuration (`sample-10BT`, ...) at a revision: the pinned one, or main's."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    if name not in FOLDERS and not CRAWL.fullmatch(name):
        raise InputError(f"--name {name}: must be {', '.join(FOLDERS)} or a crawl like CC-MAIN-2024-10")
    folder = FOLDERS.get(name, f"data/{name}")
    wanted = revision or PINNED.get(dataset, "main")
    url = f"{constants.ENDPOINT}/api/datasets/{quote(dataset)}/revision/{quote(wanted, safe='')}"
    with clear_http_errors(f"{dataset} at {wanted}"):
        try:
            # HfApi.dataset_info would give up at the first 429.
            answer = http_backoff("GET", url, headers=build_hf_headers(), timeout=TIMEOUT_SECONDS)
            hf_raise_for_status(answer)
            sha = answer.json()["sha"]
            [commit] = COMMIT.findall(wanted) or COMMIT.findall(sha)
            tree = HfApi().list_repo_tree(dataset, folder, recursive=True, revision=commit, repo_type="dataset")
            entries = [entry for entry in tree if entry.path.endswith(".parquet")]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{url}: what answers is not the Hub (HF_ENDPOINT, or a proxy's login page)") from error
    files = []
    for entry in entries:
        path, lfs = PurePosixPath(entry.path), getattr(entry, "lfs", None)
        if lfs is None or not path.is_relative_to(folder) or ".." in path.parts:
            raise InputError(f"{url}: lists {entry.path!r}, outside of {folder} or without a sha256 (HF_ENDPOINT)")
        files.append(HubFile(entry.path, lfs.size, lfs.sha256))
    if not files:
        raise InputError(f"{dataset} at {commit}: no .parquet file in {folder} (--name {name})")
    return HubListing(dataset, commit, tuple(sorted(files, key=lambda file: file.path)))


def download(listing: HubListing, files: Sequence[HubFile], folder: Path) -> list[Path]:
    """Return the paths of `files` below `folder`, in their order, each with the right sha256; fetched where not there.

    A file is hashed once: its sha256, size and time of change are kept in `folder`. A wrong one is fetched again.
    """
    if _unknown(files, folder):
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with _alone_in(folder):
                _fetch(listing, _unknown(files, folder), folder)
    return [folder / file.path for file in files]


def _fetch(listing: HubListing, files: Sequence[HubFile], folder: Path) -> None:
    """Have every one of `files` in its place, hashed and recorded."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    num_bytes = sum(file.num_bytes for file in files if not (folder / file.path).is_file())
    free = shutil.disk_usage(folder).free + sum(part.stat().st_size for part in folder.rglob("*.part"))
    if free < num_bytes:
        raise InputError(f"{folder}: {num_bytes / 1e9:,.1f} GB to download, only {free / 1e9:,.1f} GB are free")
    progress = Progress("download", sum(file.num_bytes for file in files))
    headers = build_hf_headers()

    def bring(file: HubFile) -> str:
        path = folder / file.path
        url = f"{constants.ENDPOINT}/datasets/{listing.dataset}/resolve/{listing.revision}/{quote(file.path)}"
        fetch(url, file.sha256, path, progress, headers, repair=True)
        return _state(file, folder)

    with (
        ThreadPoolExecutor(FILES_AT_ONCE) as pool,
        (folder / RECORD).open("a", encoding="utf-8", buffering=1) as record,
    ):
        record.writelines(f"{state}\n" for state in pool.map(bring, files))


def _unknown(files: Sequence[HubFile], folder: Path) -> list[HubFile]:
    """Return the files that are not there as they were when they were hashed."""
    record = folder / RECORD
    states = set(record.read_text(encoding="utf-8", errors="replace").splitlines()) if record.is_file() else set()
    return [file for file in files if not (folder / file.path).is_file() or _state(file, folder) not in states]


def _state(file: HubFile, folder: Path) -> str:
    status = (folder / file.path).stat()
    return f"{file.sha256} {status.st_size} {status.st_mtime_ns} {file.path}"


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process downloads to `folder`, and keep the others waiting."""
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"download  waiting for another process that downloads to {folder}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
