"""Holds the data to its manifest before the first step: one process of each host reads, and all of them wait."""

import functools
import socket
import time
from collections.abc import Callable, Collection
from pathlib import Path

from common.errors import InputError, warn
from data_prep.manifest import Manifest
from data_prep.pipeline.workers import Progress
from data_prep.shard_check import ShardCheck, stated_files
from data_prep.tokenizer import load_tokenizer
from train.processes.group import ProcessGroup
from train.processes.ranks import take_rank
from train.processes.stop_requests import StopRequests

RECORDS = "verified"  # in the run directory
POLL_SECONDS = 0.5
LARGE_BYTES = 10**9  # Reading so much is announced.


def check_data(
    directory: Path,
    manifest: Manifest,
    splits: Collection[str],
    *,
    group: ProcessGroup,
    stop_requests: StopRequests,
    flag: str,
    run_dir: Path | None = None,
    heartbeat: Callable[[], None] = lambda: None,
) -> str | None:
    """Raise InputError on all ranks unless tokenizer and shards are those of the manifest. Collective.

    Return None, or the reason if a stop was asked for meanwhile. `run_dir` keeps which shards each host has read, so
    that only changed ones are read again; None: read all. No rank waits long in one collective, and there is a
    heartbeat whenever some rank has read on. `flag` is the one that leaves this check out.
    """
    remedy = f"restore it or prepare the data again; {flag} takes it as it is"

    def begin() -> ShardCheck:
        if take_rank().local_rank != 0:
            return ShardCheck([], manifest.vocab_size)
        if load_tokenizer(directory).describe() != manifest.tokenizer:
            raise InputError(f"{directory}: its tokenizer is not the one in its manifest; {remedy}")
        record = None if run_dir is None else run_dir / RECORDS / f"{socket.gethostname()}.json"
        files = stated_files(directory, [manifest.splits[name] for name in splits if name in manifest.splits])
        return ShardCheck(files, manifest.vocab_size, record=record)

    def refuse_faults() -> None:
        if check.faults:
            fault, *others = check.faults.values()
            more = f" ({len(others)} more faults; data_prep/verify.py names them)" if others else ""
            raise InputError(f"{fault}{more}; {remedy}")

    began, before = time.monotonic(), 0.0
    with group.on_all(begin) as check:
        total_bytes = sum(group.gather(check.total_bytes))
        log = functools.partial(print, flush=True) if group.is_main and total_bytes >= LARGE_BYTES else lambda _: None
        log(f"{directory}: reading {total_bytes / 1e9:.1f} GB, to be held to the manifest's hashes")
        progress = Progress("verify", total_bytes if group.is_main else 0)
        unfinished = 1.0
        while unfinished:
            numbers = [not check.wait(POLL_SECONDS), stop_requests.wanted(), check.done_bytes]
            unfinished, stops, done_bytes = group.sum_numbers(numbers)
            if stops:
                return next(reason for reason in group.gather(stop_requests.reason) if reason)
            if done_bytes > before:
                heartbeat()
            progress.add(int(done_bytes - before))
            before = done_bytes
    if check.record_fault is not None:
        warn("train", f"{check.record_fault}; so the next start reads the data again")
    group.on_all(refuse_faults)
    log(f"{directory}: its {total_bytes / 1e9:.1f} GB are those of the manifest ({time.monotonic() - began:.0f} s)")
    return None
