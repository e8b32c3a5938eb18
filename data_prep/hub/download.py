"""Files over HTTP that are whole and right or not there: resumed, retried, checked against a pinned sha256."""

import datetime
import email.utils
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from common.errors import InputError, reading_from, writing_to
from common.files import fsync_directory, sha256_of_file
from data_prep.pipeline.workers import Progress

ATTEMPTS = 6  # without a single byte between them
FIRST_ATTEMPTS = 2  # where no server ever answered: most likely there is no network
TIMEOUT_SECONDS = 60.0
LONGEST_PAUSE_SECONDS = 600.0  # the Hub counts requests in windows of 300 s
BLOCK_BYTES = 2**20


def may_pass(status: int) -> bool:
    """Is this HTTP status one that the same request may not meet again?"""
    return status in {408, 425, 429} or status >= 500


def asked_seconds(retry_after: str | None, rate_limit: str | None = None) -> float | None:
    """How long the headers of a refusal ask to wait; None where they do not say.

    Retry-After is seconds or a date (RFC 9110, 10.2.3). The Hub's RateLimit is `"api";r=0;t=55` (nothing remains for
    55 s; draft-ietf-httpapi-ratelimit-headers-09); a second more is waited, for it counts in whole ones.
    """
    if limit := re.search(r"r=0;t=(\d+)", (rate_limit or "").replace(" ", "")):
        return float(limit[1]) + 1
    if retry_after is None or retry_after.strip().isdigit():
        return float(retry_after) if retry_after else None
    try:
        until = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (until - datetime.datetime.now(until.tzinfo)).total_seconds())


class Patience:
    """When to ask again, and when no more: after ATTEMPTS without progress, FIRST_ATTEMPTS if no server answered."""

    def __init__(self) -> None:
        self.attempts = FIRST_ATTEMPTS
        self._failures = 0

    def wait(self, reason: str, asked: float | None, *, answered: bool, advanced: bool) -> bool:
        """Wait for `asked` seconds, else for longer each time, and say so on stderr; False, at once, after the last."""
        if answered or advanced:
            self.attempts = ATTEMPTS
        self._failures = 0 if advanced else self._failures + 1
        if self._failures == self.attempts:
            return False
        pause = min(2.0**self._failures if asked is None else asked, LONGEST_PAUSE_SECONDS)
        print(f"download  {reason}; again in {pause:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        return True


def fetch(url: str, sha256: str, path: Path, *, num_bytes: int | None = None) -> None:
    """A file with that hash at `path`: the one that is there, or downloaded now, going on from an earlier attempt."""
    with reading_from(path):
        if path.is_file():
            if sha256_of_file(path) == sha256:
                return
            raise InputError(f"{path}: its sha256 is not the pinned {sha256[:16]}...; remove it to download it again")
    with writing_to(path.parent):
        _fetch_anew(url, sha256, path, num_bytes)


def _fetch_anew(url: str, sha256: str, path: Path, num_bytes: int | None) -> None:
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
    patience = Patience()
    while True:
        had = part.stat().st_size if part.exists() else 0
        if num_bytes is not None and had == num_bytes:
            return
        asked = None
        try:
            _receive(url, part, had, progress)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416 and had:  # the beginning that is there is not one of this file, or is all of it
                if num_bytes is None:
                    return
                part.unlink()
            elif not may_pass(error.code):
                raise InputError(f"{url}: {error.code} {error.reason}") from error
            reason, answered = f"{error.code} {error.reason}", True
            asked = asked_seconds(error.headers.get("Retry-After"), error.headers.get("RateLimit"))
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason, answered = str(getattr(error, "reason", error)) or type(error).__name__, False
        advanced = part.exists() and part.stat().st_size > had
        if not patience.wait(reason, asked, answered=answered, advanced=advanced):
            raise InputError(
                f"{url}: {reason}, {patience.attempts} times; the same command tries again from what has come, "
                "or fetch it elsewhere and give it with --input"
            )


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
