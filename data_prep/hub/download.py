"""Fetch files over HTTP that are whole and right or not there: continued, tried again, held against a sha256.

huggingface_hub waits out 408, 429 and 5xx, as RateLimit or Retry-After says. What it does not do is done here: a
transfer that was cut, reset or killed goes on with a Range request from the bytes that have come.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from common.errors import InputError, first_line, reading_from, writing_to
from common.files import fsync_directory, sha256_of_file
from data_prep.pipeline.workers import Progress

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # which asks the Hub something of its own first

ATTEMPTS = 5  # without a new byte between them; with the pauses half a minute
TIMEOUT_SECONDS = 60.0
ADVICE = "the same command goes on from what has come; --input or --source local --data-files work without a network"
Headers = Mapping[str, str] | None
REFUSALS = {  # by the Hub's X-Error-Code
    "GatedRepo": "gated: accept the terms on the data set's page, then set HF_TOKEN to a token of that account",
    "RepoNotFound": "no such data set for you (--dataset); one that is private needs a valid HF_TOKEN",
    "RevisionNotFound": "no such revision of the data set (--revision)",
    "EntryNotFound": "no such folder or file in the data set (--name)",
}


@contextlib.contextmanager
def clear_http_errors(about: str) -> Iterator[None]:
    """Turn what no more waiting helps against, a refusal or a dead network, into an InputError."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except HfHubHTTPError as error:
        status, code = error.response.status_code, error.response.headers.get("X-Error-Code", "")
        reason = REFUSALS.get(code) or error.server_message or error.response.reason_phrase or "refused"
        hint = " (HF_TOKEN)" if status in (401, 403) else ""
        raise InputError(f"{about}: {status}, {reason.splitlines()[0]}{hint}; {ADVICE}") from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise InputError(f"{about}: {first_line(error)}; {ADVICE}") from error


def fetch(url: str, sha256: str, path: Path, progress: Progress, headers: Headers = None, repair: bool = False) -> None:
    """Have a file with that hash at `path`: the one that is there or, if it is missing or to be repaired, a new one."""
    with reading_from(path):
        is_sound = path.is_file() and sha256_of_file(path) == sha256
    if is_sound:
        return progress.add(_size(path))
    if path.is_file():
        if not repair:
            raise InputError(f"{path}: its sha256 is not the pinned {sha256[:16]}...; remove it to download it again")
        print(f"download  {path}: its sha256 is not {sha256[:16]}...; fetching it again", file=sys.stderr, flush=True)
    print(f"downloading {url} to {path}", file=sys.stderr, flush=True)
    part = path.with_name(f"{path.name}.part")
    with writing_to(path.parent), clear_http_errors(url):
        path.parent.mkdir(parents=True, exist_ok=True)
        progress.add(_size(part))
        _receive(url, part, progress, headers or {})
        received = sha256_of_file(part)
        if received != sha256:
            part.unlink()
            line = f"{url}: its sha256 is {received[:16]}..., not the pinned {sha256[:16]}..."
            raise InputError(f"{line}; removed what came, the same command fetches it again")
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        return fsync_directory(path.parent)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _receive(url: str, part: Path, progress: Progress, headers: Mapping[str, str]) -> None:
    """Fill `part`, which may hold the beginning already, from an earlier attempt or process."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

    failures = 0
    while True:
        begin = _size(part)
        wanted = {**headers, "Accept-Encoding": "identity"} | ({"Range": f"bytes={begin}-"} if begin else {})
        answer = http_stream_backoff("GET", url, headers=wanted, timeout=TIMEOUT_SECONDS, retry_on_exceptions=())
        try:
            with answer as response:
                if response.status_code == 416 and begin:  # nothing follows: the hash says whether all is there
                    return
                hf_raise_for_status(response)
                # 200: this server sends the whole file whatever the request says.
                with part.open("ab" if response.status_code == 206 else "wb") as file:
                    for block in response.iter_bytes():
                        file.write(block)
                        progress.add(len(block))
                return
        except HTTPError as error:
            failures = 1 if _size(part) > begin else failures + 1
            if isinstance(error, HfHubHTTPError) or failures == ATTEMPTS:
                raise
            print(f"download  {first_line(error)}; again in {2**failures} s", file=sys.stderr, flush=True)
            time.sleep(2**failures)
