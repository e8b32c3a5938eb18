"""Files over HTTP that are whole and right or not there: resumed, retried, checked against a pinned sha256."""

import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from data_prep.atomic import fsync_directory, sha256_of_file
from data_prep.errors import InputError
from data_prep.workers import Progress

ATTEMPTS = 6  # without a single byte between them
FIRST_ATTEMPTS = 2  # where no server ever answered: most likely there is no network
TIMEOUT_SECONDS = 60.0
LONGEST_PAUSE_SECONDS = 120.0
BLOCK_BYTES = 2**20
RETRIED = {408, 425, 429, 500, 502, 503, 504}


def fetch(url: str, sha256: str, path: Path, *, num_bytes: int | None = None) -> None:
    """A file with that hash at `path`: the one that is there, or downloaded now, going on from an earlier attempt."""
    if path.is_file():
        if sha256_of_file(path) == sha256:
            return
        raise InputError(f"{path}: its sha256 is not the pinned {sha256[:16]}...; remove it to download it again")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    print(f"downloading {url} to {path}", file=sys.stderr, flush=True)
    _download(url, part, num_bytes)
    found = sha256_of_file(part)
    if found != sha256:
        part.unlink()
        raise InputError(f"{url}: its sha256 is {found[:16]}..., not the pinned {sha256[:16]}...; removed it")
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    fsync_directory(path.parent)


def _download(url: str, part: Path, num_bytes: int | None) -> None:
    """Fill `part`, which may hold the beginning already. A broken connection goes on where it broke."""
    progress = Progress("download", max(0, (num_bytes or 0) - (part.stat().st_size if part.exists() else 0)))
    failures = 0
    attempts = FIRST_ATTEMPTS
    while True:
        had = part.stat().st_size if part.exists() else 0
        if num_bytes is not None and had == num_bytes:
            return
        try:
            _receive(url, part, had, progress)
            return
        except urllib.error.HTTPError as error:
            attempts = ATTEMPTS
            if error.code == 416 and had:  # the beginning that is there is not one of this file, or is all of it
                if num_bytes is None:
                    return
                part.unlink()
            elif error.code not in RETRIED:
                raise InputError(f"{url}: {error.code} {error.reason}") from error
            reason, asked = f"{error.code} {error.reason}", error.headers.get("Retry-After", "")
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason, asked = str(getattr(error, "reason", error)) or type(error).__name__, ""
        if part.exists() and part.stat().st_size > had:
            attempts, failures = ATTEMPTS, 0
        else:
            failures += 1
        if failures == attempts:
            raise InputError(
                f"{url}: {reason}, {attempts} times; the same command tries again from what has come, "
                "or fetch it elsewhere and give it with --input"
            )
        pause = min(float(asked) if asked.isdigit() else 2.0**failures, LONGEST_PAUSE_SECONDS)
        print(f"download  {reason}; again in {pause:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)


def _receive(url: str, part: Path, had: int, progress: Progress) -> None:
    request = urllib.request.Request(url, headers={"Range": f"bytes={had}-"} if had else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        goes_on = response.status == 206  # 200: this server sends the whole file whatever was asked
        promised = response.headers.get("Content-Length")
        received = 0
        with part.open("ab" if goes_on else "wb") as file:
            while block := response.read(BLOCK_BYTES):
                file.write(block)
                received += len(block)
                progress.add(len(block), 0)
        if promised is not None and received < int(promised):
            raise ConnectionError(f"connection closed after {received:,} of {int(promised):,} bytes")
