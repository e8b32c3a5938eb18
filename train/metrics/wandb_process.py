"""Tracking on Weights & Biases by a helper process, so that nothing W&B does can stop or delay training.

The trainer never imports wandb. A thread would not do: wandb's exit hook waits for its service without limit, a killed
trainer's last rows would be lost, and wandb replaces sys.exit and sys.excepthook. The trainer writes JSON lines into
the helper's pipe and never waits, except in `close` for at most `CLOSE_SECONDS`. The helper does the rest: login,
network, W&B's own service process, exit hooks and signal handlers. It has a session of its own, where no Ctrl-C reaches
it, and prints into RUN/wandb/tracking.log. If the trainer is killed, the pipe closes and the helper ends the W&B run as
failed.
"""

import html
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from common.files import ROOT

LOG_FILE = "tracking.log"
ASIDE = "aside"  # beside the attempts of a run: those of runs that began in the same directory before it
ATTEMPT_NAME = re.compile(r"(?:offline-)?run-\d+_\d+-(?P<id>.+)")  # of the directory that wandb makes
INIT_SECONDS = 30.0  # to reach the server, before the run is recorded offline
UPLOAD_SECONDS = 20.0  # to upload the rest at the end
CLOSE_SECONDS = 60.0  # longest wait in `close`: the two above and a start of Python
EXIT_SECONDS = 5.0  # for a helper to exit after it has closed its pipe
MAX_UNSENT_BYTES = 16 * 2**20  # about 40,000 rows that the helper has not read
LONGEST_NAME = 128  # characters of a run's name or group that W&B's server takes
LONGEST_TEXT = 10_000  # characters of one config value; W&B shows longer ones badly
AXES = ("step", "tokens", "seconds", "flops")
# A preempting launcher signals every process it finds; the trainer alone decides when the run ends.
HELD_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


LEFT: list["subprocess.Popen[bytes]"] = []  # keeps helpers that outlive the trainer, or Python would warn of them


def open_tracking(
    *,
    mode: Literal["online", "offline", "disabled"],
    run_dir: Path,
    run_id: str,
    name: str,
    project: str,
    group: str | None,
    tags: tuple[str, ...],
    config: dict[str, Any],
    provenance: dict[str, Any],
    log: Callable[[str], None],
) -> "Tracking | None":
    """Start the helper and return at once; return None if tracking is disabled or the helper cannot start.

    `run_id` makes all attempts one W&B run; keep it with the run. What another run has recorded in this directory is
    moved aside: it died before its first checkpoint. `log` gets warnings, here and in later calls.
    """
    if mode == "disabled":
        return None
    if (other := os.environ.get("WANDB_MODE", mode)) != mode:
        log(f"warning: WANDB_MODE={other} has no effect: --track.wandb {mode} decides")
    init: dict[str, Any] = {"id": run_id, "project": project, "tags": tags, "dir": str(run_dir.resolve())}
    init |= {"name": name[:LONGEST_NAME], "group": None if group is None else group[:LONGEST_NAME]}
    init["config"] = _fitting(config | {"provenance": provenance})
    process = {"program": sys.argv[0], "trainer": os.getpid(), "init_seconds": INIT_SECONDS}
    start = {"mode": mode, "init": init, **process}
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; from train.metrics.wandb_process import serve; serve()"
    env = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_SERVICE")}
    try:
        (run_dir / "wandb").mkdir(parents=True, exist_ok=True)
        set_aside(run_dir / "wandb", run_id, log)
        with (run_dir / "wandb" / LOG_FILE).open("a", encoding="utf-8") as log_file:
            helper = subprocess.Popen(
                [sys.executable, "-c", code],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                start_new_session=True,
            )
    except OSError as error:
        log(f"warning: no W&B tracking: {error}")
        return None
    return Tracking(helper, start, log)


def set_aside(folder: Path, run_id: str, log: Callable[[str], None]) -> None:
    """Move the attempts of other runs into wandb/aside, where nothing uploads them together with this run's."""
    for path in folder.iterdir():
        match = ATTEMPT_NAME.fullmatch(path.name)
        if match and match["id"] != run_id:
            (folder / ASIDE).mkdir(exist_ok=True)
            path.rename(folder / ASIDE / path.name)
            log(f"W&B: {path} is of a run that began here before this one; moved to {folder / ASIDE}")


class Tracking:
    """The trainer's end of the pipe.

    No method raises an error of W&B: the first one is logged and switches tracking off.
    """

    def __init__(self, helper: "subprocess.Popen[bytes]", start: dict[str, Any], log: Callable[[str], None]) -> None:
        self._helper: subprocess.Popen[bytes] | None = helper
        assert helper.stdin is not None and helper.stdout is not None
        self._to_helper, self._from_helper = helper.stdin.fileno(), helper.stdout.fileno()
        os.set_blocking(self._to_helper, False)
        os.set_blocking(self._from_helper, False)
        self._unsent = bytearray()
        self._received = b""
        self._log = log
        self._start = start
        self._send(start)

    def row(self, row: dict[str, Any]) -> None:
        """Send a metrics row, or `{"step": ..., "samples": [{"prompt": ..., "text": ...}]}`. Never waits.

        Also log the helper's messages since the last call. W&B drops a step that it already has.
        """
        self._send({key: value for key, value in row.items() if value is not None})

    def close(self, *, exit_code: int) -> None:
        """End the W&B run with the trainer's exit code and log the result, within CLOSE_SECONDS."""
        self._send({"exit_code": exit_code})
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._helper is not None:
            remaining_seconds = deadline - time.monotonic()
            if remaining_seconds <= 0:
                self._switch_off(f"the helper had not ended {CLOSE_SECONDS:.0f} s after the run")
                return
            pipes = select.poll()
            pipes.register(self._from_helper, select.POLLIN)
            if self._unsent:
                pipes.register(self._to_helper, select.POLLOUT)
            pipes.poll(remaining_seconds * 1e3)
            self._exchange(is_last=True)

    def leave(self) -> None:
        """Let the helper end the W&B run as failed, without waiting for it; for a trainer that has failed.

        Waiting would delay status.json and the error message, while a launcher may be about to kill the process.
        """
        self._send({"exit_code": 1})
        if self._helper is None:
            return
        self._log(f"W&B: the helper ends the W&B run; upload what is recorded with `{sync_line(self._start)}`")
        LEFT.append(self._helper)
        self._forget()

    def _send(self, message: dict[str, Any]) -> None:
        if self._helper is None:
            return
        self._unsent += json.dumps(message).encode() + b"\n"
        self._exchange()
        if len(self._unsent) > MAX_UNSENT_BYTES:
            self._switch_off(f"the helper has left {len(self._unsent) / 2**20:.0f} MiB of rows unread")

    def _exchange(self, *, is_last: bool = False) -> None:
        """Write as much as the pipe takes, log the helper's messages, and switch off if it has exited."""
        with suppress(BlockingIOError, BrokenPipeError):
            while self._unsent:
                del self._unsent[: os.write(self._to_helper, self._unsent)]
        is_closed = False
        with suppress(BlockingIOError):
            while part := os.read(self._from_helper, 2**16):
                self._received += part
            is_closed = True
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            self._log(line.decode(errors="replace"))
        if not is_closed:
            return
        assert self._helper is not None
        try:
            status = self._helper.wait(timeout=EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        if status == FAILED or (status == 0 and is_last):
            self._release()  # the helper has reported why
        else:
            self._switch_off(f"its helper process ended with status {status}")

    def _switch_off(self, reason: str) -> None:
        self._log(
            f"warning: W&B tracking is off: {reason}; see {log_of(self._start)}. "
            f"Upload what is recorded with `{sync_line(self._start)}`"
        )
        self._release()

    def _release(self) -> None:
        assert self._helper is not None
        self._helper.kill()
        self._helper.wait()
        self._forget()

    def _forget(self) -> None:
        assert self._helper is not None
        for pipe in (self._helper.stdin, self._helper.stdout):
            assert pipe is not None
            pipe.close()
        self._helper = None
        self._unsent.clear()


def sync_line(start: dict[str, Any]) -> str:
    """Return the command that uploads every attempt of this run so far, in order of time, as one W&B run.

    wandb leaves out what it has synced, and with --id sorts the directories by start time. It leaves out attempts made
    online unless told to include them. Before wandb has made a directory, the line names the folder of them all.
    """
    online = ["--include-online"] if start["mode"] == "online" else []
    program = Path(sys.executable).with_name("wandb")  # by its path, since the environment need not be activated
    run_id, folder = start["init"]["id"], Path(start["init"]["dir"], "wandb")
    matches = [(path, ATTEMPT_NAME.fullmatch(path.name)) for path in sorted(folder.glob("*run-*"))]
    attempts = [str(path) for path, match in matches if match and match["id"] == run_id]
    return shlex.join([str(program), "sync", "--id", run_id, *online, *(attempts or [str(folder)])])


def log_of(start: dict[str, Any]) -> Path:
    """Return the file that the helper and wandb print into."""
    return Path(start["init"]["dir"]) / "wandb" / LOG_FILE


def _fitting(value: Any) -> Any:
    """Return the settings with texts too long for W&B, such as a diff, replaced by their length."""
    if isinstance(value, dict):
        return {key: _fitting(inner) for key, inner in value.items()}
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return f"({len(value)} characters, see the run directory)"
    return value


# The helper process, from here on.

FATAL = b"Fatal error while uploading data"
FAILED = 3  # the helper's exit status after it has reported the error


def serve() -> None:
    """Read the start message and rows from stdin up to the exit code; report to stdout in lines."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    # W&B's service process does not inherit these copies. Its output and wandb's go to the log file.
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    lines = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def report(text: str) -> None:
        try:
            print(" ".join(text.split()), file=reports, flush=True)
        except BrokenPipeError:  # the trainer is gone; the W&B run is still to be ended
            print(text, file=sys.stderr)

    messages = (json.loads(line) for line in lines if line.endswith(b"\n"))
    start = next(messages, None)
    if start is None:
        return
    try:
        _track(start, messages, report)
    # A third party's code and service: any error must end as one line and leave training alone.
    except Exception as error:  # noqa: BLE001
        import traceback

        traceback.print_exc()
        reason = str(error).strip().rstrip(".") or type(error).__name__
        report(f"warning: W&B tracking is off: {reason}. Upload what is recorded with `{sync_line(start)}`")
        os._exit(FAILED)  # past wandb's exit hooks, which would wait for its service


def _track(start: dict[str, Any], messages: Iterator[dict[str, Any]], report: Callable[[str], None]) -> None:
    """Keep the W&B run until the exit code comes or the pipe closes."""
    import wandb  # takes a second

    log_bytes = os.fstat(2).st_size  # of earlier attempts

    def open_run(mode: Literal["online", "offline"]) -> wandb.Run:
        settings = wandb.Settings(
            console="off",  # log.txt is the log
            program=start["program"],
            disable_git=True,  # provenance has commit and changes
            save_code=False,
            quiet=True,  # otherwise it asks the server for the login, 10 s without a server
            init_timeout=start["init_seconds"],
            finish_timeout=UPLOAD_SECONDS,
            finish_timeout_raises=True,
            x_stats_pid=start["trainer"],
            stop_fn=lambda: os.kill(start["trainer"], signal.SIGINT),  # the stop button of the run's page
        )
        return wandb.init(mode=mode, resume="allow", allow_val_change=True, settings=settings, **start["init"])

    mode: Literal["online", "offline"] = start["mode"]
    try:
        run = open_run(mode)
    except wandb.Error as error:  # no login, no network, no such project
        if mode == "offline":
            raise
        report(f"W&B: {error}; recording offline")
        wandb.teardown()  # its service still holds the id
        mode = "offline"
        run = open_run(mode)
    if mode == "online":
        report(f"W&B: {run.url}")
    for axis in AXES:
        run.define_metric(axis, hidden=True)
    run.define_metric("*", step_metric="step")  # W&B renumbers its own steps where offline attempts overlap

    exit_code = 1  # unless the trainer sends another
    for message in messages:
        if "exit_code" in message:
            exit_code = message["exit_code"]
            break
        if "samples" in message:
            message["samples"] = wandb.Html(_page(message["samples"]), inject=False)
        run.log(message, step=message["step"])
    run.finish(exit_code=exit_code)
    wandb.teardown()  # not in its exit hook, so that errors are reported
    if mode == "online" and FATAL in log_of(start).read_bytes()[log_bytes:]:
        raise RuntimeError("the server refused data")  # wandb itself only prints it
    if mode == "offline":
        report(f"W&B: upload every attempt as one run with `{sync_line(start | {'mode': mode})}` (after `wandb login`)")


def _page(samples: list[dict[str, str]]) -> str:
    """Return the samples as HTML, with line breaks kept and prompts in bold."""
    texts = (f"<b>{html.escape(sample['prompt'])}</b>{html.escape(sample['text'])}" for sample in samples)
    return "".join(f'<pre style="white-space: pre-wrap">{text}</pre><hr>' for text in texts)
