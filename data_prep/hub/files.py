"""Parquet files of a data set on the Hugging Face Hub: listed at a pinned commit, fetched, held against their sha256.

`list_files` needs the network; `download` only for what is not on the disk yet. HF_ENDPOINT (a mirror), HF_TOKEN and
HF_HUB_OFFLINE work as everywhere; so do proxies. What each of the two does about a server that refuses:

- the library waits out 429 as `RateLimit` or `Retry-After` says (in seconds), for pages of the listing and for files,
  and goes on with a Range request where a connection was closed in the middle of a file;
- what it gives up on (any refusal of its first request, 5xx to a file's GET, a reset connection) is asked for again
  here, as the headers say, at most download.ATTEMPTS times without a new file between them.

It keeps no half of a file (since 1.18: huggingface/huggingface_hub#4306): one that is killed begins again with the
files that it had not finished, at most FILES_AT_ONCE of them.
"""

import contextlib
import fcntl
import glob
import json
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from common.errors import InputError, first_line
from common.files import sha256_of_file, write_json_atomically
from data_prep.hub.download import TIMEOUT_SECONDS, Patience, asked_seconds, may_pass
from data_prep.pipeline.workers import Progress

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

# 14 files of sample/10BT, 9,672,101 rows, 28,518,193,415 bytes, as public repositories record it.
PINNED = {"HuggingFaceFW/fineweb-edu": "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"}
# The same in HuggingFaceFW/fineweb-edu and HuggingFaceFW/fineweb; beside these, every crawl by its name.
FOLDERS = {
    "sample-10BT": "sample/10BT",
    "sample-100BT": "sample/100BT",
    "sample-350BT": "sample/350BT",
    "default": "data",
}
CRAWL = re.compile(r"CC-MAIN-\d{4}-\d{2}")
COMMIT = re.compile(r"[0-9a-f]{40}")
ENDPOINT = "https://huggingface.co"
FILES_AT_ONCE = 4  # of 2 GB each: more would only lose more when killed
FILES_PER_CALL = 64  # the library holds every file of the repository against every name that it is given
WATCH_SECONDS = 1.0
RECORD = ".verified.json"
LOCK = ".downloading"
WITHOUT = "--source local --data-files GLOB works without a network"

Result = TypeVar("Result")


@dataclass(frozen=True)
class HubFile:
    """path: in the repository, e.g. sample/10BT/000_00000.parquet. sha256: its Git LFS id, None for a file without."""

    path: str
    num_bytes: int
    sha256: str | None


@dataclass(frozen=True)
class HubListing:
    """revision: the commit, 40 hex digits. files: sorted by path."""

    dataset: str
    revision: str
    files: tuple[HubFile, ...]


def list_files(dataset: str, name: str, revision: str | None) -> HubListing:
    """The parquet files of a configuration (`sample-10BT`, `default`, ...) at a revision: the pinned one, or main's.

    InputError where there is no such data set, revision, configuration or network.
    """
    if name not in FOLDERS and not CRAWL.fullmatch(name):
        raise InputError(f"--name {name}: must be {', '.join(FOLDERS)} or a crawl like CC-MAIN-2024-10")
    folder = FOLDERS.get(name, f"data/{name}")
    wanted = revision or PINNED.get(dataset, "main")
    api = _library(dataset)

    def ask() -> tuple[str, list[HubFile]]:
        from huggingface_hub.hf_api import RepoFile

        commit = _commit(api, dataset, wanted)
        entries = api.list_repo_tree(dataset, folder, recursive=True, revision=commit, repo_type="dataset")
        return commit, [
            HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None)
            for entry in entries
            if isinstance(entry, RepoFile) and entry.path.endswith(".parquet")
        ]

    commit, files = _asked(ask, f"{dataset} at {wanted}", f"no {folder} in it (--name {name})")
    if not files:
        raise InputError(f"{dataset} at {commit}: no .parquet file in {folder} (--name {name})")
    for file in files:
        if not file.path.startswith(f"{folder}/") or ".." in PurePosixPath(file.path).parts:
            raise InputError(f"{dataset} at {commit}: lists {file.path!r}, which is not in {folder} (HF_ENDPOINT)")
    return HubListing(dataset, commit, tuple(sorted(files, key=lambda file: file.path)))


def download(listing: HubListing, files: Sequence[HubFile], folder: Path) -> list[Path]:
    """Paths of `files` below `folder`, in their order, each with the right size and sha256; fetched where not there.

    A file is hashed once: what was found of it, and its time of change, is kept in `folder`. One that is wrong is
    removed, and fetched again, at once if it lay there before, else by the next call (InputError).
    """
    record = _read_record(folder)
    unknown = [file for file in files if not _is_known(file, folder, record)]
    if unknown:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder):
            unknown = [file for file in unknown if not _is_known(file, folder, _read_record(folder))]
            _check(unknown, folder)
            missing = [file for file in unknown if not (folder / file.path).exists()]
            for begin in range(0, len(missing), FILES_PER_CALL):
                _fetch(listing, missing[begin : begin + FILES_PER_CALL], folder)
                wrong = _check(missing[begin : begin + FILES_PER_CALL], folder)
                if wrong:
                    raise InputError(f"{', '.join(wrong)}: removed what came; the same command fetches it again")
    return [folder / file.path for file in files]


def _read_record(folder: Path) -> dict[str, list[int | str]]:
    """{path in the repository: [bytes, time of change in ns, sha256]} of what was hashed; of no use if damaged."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return record if isinstance(record, dict) else {}


def _found_before(file: HubFile, folder: Path, record: dict[str, list[int | str]]) -> str | None:
    """The sha256 that this very file had."""
    path = folder / file.path
    if not path.is_file() or file.path not in record:
        return None
    state = path.stat()
    *recorded, sha256 = record[file.path]
    return str(sha256) if recorded == [state.st_size, state.st_mtime_ns] else None


def _is_known(file: HubFile, folder: Path, record: dict[str, list[int | str]]) -> bool:
    found = _found_before(file, folder, record)
    return found is not None and file.sha256 in (None, found) and record[file.path][0] == file.num_bytes


def _check(files: Sequence[HubFile], folder: Path) -> list[str]:
    """Hash those that are there and not known; remove and name the wrong ones. A sound file of another kind stays."""
    record = _read_record(folder)
    there = [file for file in files if (folder / file.path).is_file() and not _is_known(file, folder, record)]
    progress = Progress("check", sum(file.num_bytes for file in there))
    wrong = []
    for file in there:
        path = folder / file.path
        before = _found_before(file, folder, record)
        if before is not None:
            raise InputError(
                f"{path}: is whole, but of another revision or data set (sha256 {before[:16]}..., not "
                f"{str(file.sha256)[:16]}...); choose another folder, or remove it"
            )
        state = path.stat()
        found = sha256_of_file(path) if state.st_size == file.num_bytes else None
        if found is None:
            fault = f"{path} has {state.st_size:,} bytes, not {file.num_bytes:,}"
        elif file.sha256 not in (None, found):
            fault = f"{path} has sha256 {found[:16]}..., not {str(file.sha256)[:16]}..."
        else:
            record[file.path] = [state.st_size, state.st_mtime_ns, found]
            write_json_atomically(folder / RECORD, record)
            progress.add(file.num_bytes, 0)
            continue
        path.unlink()
        wrong.append(fault)
        print(f"download  removed {fault}", file=sys.stderr, flush=True)
    return wrong


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"download  waiting for another process that downloads to {folder}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(listing: HubListing, files: Sequence[HubFile], folder: Path) -> None:
    """Every one of `files`, none of which is there, to its place below `folder`; what came is not looked at."""
    num_bytes = sum(file.num_bytes for file in files)
    beginnings = folder / ".cache" / "huggingface" / "download"
    for orphan in beginnings.rglob("*.????????.incomplete"):  # of a process that was killed; nothing would use it
        orphan.unlink()
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InputError(f"{folder}: {num_bytes / 1e9:,.1f} GB to download, only {free / 1e9:,.1f} GB are free")
    api = _library(listing.dataset)

    def missing() -> list[HubFile]:
        return [file for file in files if not (folder / file.path).is_file()]

    def transfer() -> None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import tqdm

        class BarsAtTerminals(tqdm):  # the library shows one of its three bars everywhere
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **(options | {"disable": None}))

        # What is refused here is told as it is. The library, where `folder` holds anything, would be content with that.
        _commit(api, listing.dataset, listing.revision)
        snapshot_download(
            listing.dataset,
            repo_type="dataset",
            revision=listing.revision,
            allow_patterns=[glob.escape(file.path) for file in missing()],
            local_dir=folder,
            endpoint=api.endpoint,
            max_workers=FILES_AT_ONCE,
            tqdm_class=BarsAtTerminals,
        )
        if missing():
            raise ConnectionError(f"{len(missing())} of {len(files)} files did not come")

    print(f"downloading {len(files)} files, {num_bytes / 1e6:,.1f} MB, to {folder}", file=sys.stderr, flush=True)
    about = f"{listing.dataset} at {listing.revision}"
    with _lines_of_progress(lambda: _bytes_there(files, folder, beginnings), num_bytes):
        _asked(transfer, about, f"no longer has {files[0].path}", lambda: len(files) - len(missing()))


def _bytes_there(files: Sequence[HubFile], folder: Path, beginnings: Path) -> int:
    num_bytes = 0
    for path in [*(folder / file.path for file in files), *beginnings.rglob("*.incomplete")]:
        with contextlib.suppress(FileNotFoundError):  # renamed since
            num_bytes += path.stat().st_size
    return num_bytes


@contextlib.contextmanager
def _lines_of_progress(num_bytes: Callable[[], int], total_bytes: int) -> Iterator[None]:
    """Lines where no person sees the library's bars, which it shows at a terminal alone."""
    progress = Progress("download", total_bytes)
    done = threading.Event()

    def watch() -> None:
        before = 0
        while not done.wait(WATCH_SECONDS):
            now = num_bytes()
            progress.add(now - before, 0)
            before = now

    watcher = threading.Thread(target=watch, daemon=True)
    if not sys.stderr.isatty():
        watcher.start()
    try:
        yield
    finally:
        done.set()
        if watcher.is_alive():
            watcher.join()


def _library(dataset: str) -> "HfApi":
    """The Hub's client for the endpoint that the environment names now; InputError where it is not installed."""
    # Read when it is imported. Xet's transfers would be retried inside hf_xet, whatever the headers say, and telemetry
    # asks the Hub something of its own first. Both can be set to 0.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise InputError(
            f"--dataset {dataset}: the Hub needs huggingface_hub: pip install -e '.[data]' ({WITHOUT})"
        ) from error
    return HfApi(endpoint=(os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/"))


def _commit(api: "HfApi", dataset: str, revision: str) -> str:
    """The commit that a revision is now; asked even of a commit, for the library asks this only once, and clearly."""
    found = api.dataset_info(dataset, revision=revision, expand=["sha"], timeout=TIMEOUT_SECONDS).sha
    commit = revision if COMMIT.fullmatch(revision) else found
    if commit is None or not COMMIT.fullmatch(commit):
        raise InputError(f"{api.endpoint}: names no commit for {dataset} at {revision} (HF_ENDPOINT)")
    return commit


def _asked(ask: Callable[[], Result], about: str, no_entry: str, num_done: Callable[[], int] = lambda: 0) -> Result:
    """ask(), again where waiting may help and patience lasts: `num_done` says whether there was any progress."""
    from huggingface_hub.errors import HFValidationError, HTTPError

    patience = Patience()
    while True:
        had = num_done()
        try:
            with _plain_warnings():
                return ask()
        except HFValidationError as error:
            raise InputError(f"{about}: no name of a data set on the Hub (--dataset, like OWNER/NAME)") from error
        except json.JSONDecodeError as error:
            raise InputError(f"{about}: what answers is not the Hub (HF_ENDPOINT, or a proxy's login page)") from error
        except (HTTPError, OSError) as error:
            reason, asked, answered = _what_passes(error, about, no_entry)
        if not patience.wait(reason, asked, answered=answered, advanced=num_done() > had):
            raise InputError(
                f"{about}: {reason}, {patience.attempts} times; the same command goes on from the files that have "
                f"come, and {WITHOUT}"
            )


def _what_passes(caught: Exception, about: str, no_entry: str) -> tuple[str, float | None, bool]:
    """(reason, seconds that the server asks to wait, whether one answered); raises what no waiting helps against."""
    from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # The library hides the reason behind "please check your connection".
    error = caught.__cause__ if isinstance(caught, LocalEntryNotFoundError) and caught.__cause__ else caught
    if isinstance(error, OfflineModeIsEnabled):
        raise InputError(f"{about}: HF_HUB_OFFLINE is set; {WITHOUT}") from caught
    if isinstance(error, FileMetadataError):
        raise InputError(f"{about}: {first_line(error)}") from caught
    if isinstance(error, HfHubHTTPError):
        response = error.response
        if not may_pass(response.status_code):
            raise InputError(f"{about}: {response.status_code}, {_refusal(error, no_entry)}") from caught
        asked = asked_seconds(response.headers.get("Retry-After"), response.headers.get("RateLimit"))
        return f"{response.status_code} {response.reason_phrase}", asked, True
    if isinstance(error, OSError) and error.errno is not None:  # of the disk: no server can help
        raise caught
    return first_line(error), None, False


def _refusal(error: "HfHubHTTPError", no_entry: str) -> str:
    """What a person can do about it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, RevisionNotFoundError):
        return "no such revision of it (--revision)"
    if isinstance(error, RemoteEntryNotFoundError):
        return no_entry
    if isinstance(error, GatedRepoError):
        return "gated: accept its terms on its page, then set HF_TOKEN to a token of that account"
    if isinstance(error, RepositoryNotFoundError) or error.response.status_code in (401, 404):
        return "no such data set for you (--dataset); one that is private needs a valid HF_TOKEN"
    said = (error.server_message or error.response.reason_phrase).splitlines()
    return f"{said[0] if said else 'refused'} (--dataset, HF_TOKEN)"


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """The library's warnings, most of which say for how long it waits, as lines like ours, without signed addresses."""

    class Line(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = re.sub(r"\?[^\s']*", "", record.getMessage().splitlines()[0])
            print(f"download  {line}", file=sys.stderr, flush=True)

    logger = logging.getLogger("huggingface_hub")
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [Line(logging.WARNING)], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before
