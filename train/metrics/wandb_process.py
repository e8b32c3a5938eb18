"""The run on Weights & Biases, kept by a helper process, so that nothing W&B does can stop or delay training.

A thread would not do: wandb's exit hook waits for its service without end, a killed trainer's last rows would be lost,
and sys.exit and sys.excepthook would be wandb's. So the trainer never imports wandb. It hands JSON lines to the
helper's pipe, without ever waiting, until `close`, which waits `CLOSE_SECONDS` at most. Logging in, the network, W&B's
own service process, its exit hooks and signal handlers are all the helper's. The helper stands in a session of its
own, where no Ctrl-C reaches it, and prints into RUN/wandb/tracking.log. If the trainer is killed, the helper sees the
pipe close and ends the W&B run as failed.
"""

import html
import json
import os
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
INIT_SECONDS = 30.0  # to reach the server; then the run is recorded offline
UPLOAD_SECONDS = 20.0  # for what is still to upload at the end
CLOSE_SECONDS = 60.0  # most that `close` waits: the two above and a start of Python in between
EXIT_SECONDS = 5.0  # for a helper that has closed its end to be gone
MAX_UNSENT_BYTES = 16 * 2**20  # about 40,000 rows that the helper has not taken
LONGEST_TEXT = 10_000  # characters of one config value; W&B shows longer ones badly
AXES = ("step", "tokens", "seconds", "flops")
# A preempting launcher signals every process it finds; the trainer alone decides when the run ends.
HELD_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


LEFT: list["subprocess.Popen[bytes]"] = []  # helpers that end after their trainer, which Python is not to warn of


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
    say: Callable[[str], None],
) -> "Tracking | None":
    """Start the helper and return at once. Return None when disabled or when it cannot be started, which is said.

    `run_id` makes attempts one W&B run; keep it with the run. `say` is called by `row` and `close` only.
    """
    if mode == "disabled":
        return None
    if (other := os.environ.get("WANDB_MODE", mode)) != mode:
        say(f"warning: WANDB_MODE={other} has no effect: --track.wandb {mode} decides")
    init = {"id": run_id, "name": name, "project": project, "group": group, "tags": tags, "dir": str(run_dir.resolve())}
    init["config"] = _fitting(config | {"provenance": provenance})
    process = {"program": sys.argv[0], "trainer": os.getpid(), "init_seconds": INIT_SECONDS}
    start = {"mode": mode, "init": init, **process}
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; from train.metrics.wandb_process import serve; serve()"
    env = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_SERVICE")}
    try:
        (run_dir / "wandb").mkdir(parents=True, exist_ok=True)
        with (run_dir / "wandb" / LOG_FILE).open("a", encoding="utf-8") as log:
            helper = subprocess.Popen(
                [sys.executable, "-c", code],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
    except OSError as error:
        say(f"warning: no W&B tracking: {error}")
        return None
    return Tracking(helper, start, say)


class Tracking:
    """The trainer's end. No method raises for what goes wrong with W&B: it is said once, and tracking is off."""

    def __init__(self, helper: "subprocess.Popen[bytes]", start: dict[str, Any], say: Callable[[str], None]) -> None:
        self._helper: subprocess.Popen[bytes] | None = helper
        assert helper.stdin is not None and helper.stdout is not None
        self._to, self._from = helper.stdin.fileno(), helper.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        self._unsent = bytearray()
        self._heard = b""
        self._say = say
        self._sync_line = sync_line(start)
        self._log_file = log_of(start)
        self._send(start)

    def row(self, row: dict[str, Any]) -> None:
        """Log a metrics row, or `{"step": ..., "samples": [{"prompt": ..., "text": ...}]}`. Never waits.

        Also says what the helper has reported since. A step that W&B already has is dropped there.
        """
        self._send({key: value for key, value in row.items() if value is not None})

    def close(self, *, exit_code: int) -> None:
        """End the W&B run with the trainer's exit code and say how it went, within CLOSE_SECONDS."""
        self._send({"exit_code": exit_code})
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._helper is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                self._off(f"it had not ended {CLOSE_SECONDS:.0f} s after the run")
                return
            ends = select.poll()
            ends.register(self._from, select.POLLIN)
            if self._unsent:
                ends.register(self._to, select.POLLOUT)
            ends.poll(left * 1e3)
            self._exchange(is_last=True)

    def leave(self) -> None:
        """The trainer has failed: the helper ends the W&B run as failed by itself, and nobody waits for it.

        Waiting would keep status.json at `running` and the error unsaid while a launcher's patience runs out.
        """
        self._send({"exit_code": 1})
        if self._helper is None:
            return
        self._say(f"W&B: ends the run by itself; what it has uploads with `{self._sync_line}`")
        LEFT.append(self._helper)
        self._forget()

    def _send(self, message: dict[str, Any]) -> None:
        if self._helper is None:
            return
        self._unsent += json.dumps(message).encode() + b"\n"
        self._exchange()
        if len(self._unsent) > MAX_UNSENT_BYTES:
            self._off(f"it has left {len(self._unsent) / 2**20:.0f} MiB of rows unread")

    def _exchange(self, *, is_last: bool = False) -> None:
        """Hand over what the pipe takes and say what the helper has to say; off once it is gone."""
        with suppress(BlockingIOError, BrokenPipeError):
            while self._unsent:
                del self._unsent[: os.write(self._to, self._unsent)]
        is_gone = False
        with suppress(BlockingIOError):
            while part := os.read(self._from, 2**16):
                self._heard += part
            is_gone = True
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            self._say(line.decode(errors="replace"))
        if not is_gone:
            return
        assert self._helper is not None
        try:
            status = self._helper.wait(timeout=EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        if status == FAILED or (status == 0 and is_last):
            self._release()  # it has said why
        else:
            self._off(f"its helper process ended with status {status}")

    def _off(self, why: str) -> None:
        self._say(
            f"warning: W&B tracking is off: {why}; see {self._log_file}. What it has uploads with `{self._sync_line}`"
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
    """The command that uploads every attempt of the run, in the order they were made, as one W&B run.

    wandb finds the attempts' directories itself, leaves out those it has synced, and sorts by start time where
    --id makes them one run. Attempts made online are left out unless asked for.
    """
    online = ["--include-online"] if start["mode"] == "online" else []
    program = Path(sys.executable).with_name("wandb")  # of this environment, which need not be activated
    return shlex.join([str(program), "sync", "--id", start["init"]["id"], *online, start["init"]["dir"] + "/wandb"])


def log_of(start: dict[str, Any]) -> Path:
    """Return the file that the helper and wandb print into."""
    return Path(start["init"]["dir"]) / "wandb" / LOG_FILE


def _fitting(value: Any) -> Any:
    """The same settings with texts that W&B cannot show, such as a long diff, replaced by a word on their length."""
    if isinstance(value, dict):
        return {key: _fitting(inner) for key, inner in value.items()}
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return f"({len(value)} characters, see the run directory)"
    return value


# The helper process, from here on.

FATAL = b"Fatal error while uploading data"
FAILED = 3  # the helper's exit status when it has said itself what went wrong


def serve() -> None:
    """Read the start and then rows from stdin until told the exit code; report to stdout, a line for each fact."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    # Copies, which W&B's service process does not inherit. What it and wandb print goes to the log.
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    lines = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def tell(text: str) -> None:
        try:
            print(" ".join(text.split()), file=reports, flush=True)
        except BrokenPipeError:  # the trainer is gone; the W&B run is still to be ended
            print(text, file=sys.stderr)

    messages = (json.loads(line) for line in lines if line.endswith(b"\n"))
    start = next(messages, None)
    if start is None:
        return
    try:
        _track(start, messages, tell)
    # A third party's code and service: whatever it raises must end as one line, with training untouched.
    except Exception as error:  # noqa: BLE001
        import traceback

        traceback.print_exc()
        what = str(error).strip().rstrip(".") or type(error).__name__
        tell(f"warning: W&B tracking is off: {what}. What it has uploads with `{sync_line(start)}`")
        os._exit(FAILED)  # past wandb's exit hooks, which would wait for its service


def _track(start: dict[str, Any], messages: Iterator[dict[str, Any]], tell: Callable[[str], None]) -> None:
    import wandb  # takes a second

    log_bytes = os.fstat(2).st_size  # of earlier attempts

    def open_run(mode: Literal["online", "offline"]) -> wandb.Run:
        settings = wandb.Settings(
            console="off",  # log.txt is the log
            program=start["program"],
            disable_git=True,  # provenance has commit and changes
            save_code=False,
            quiet=True,  # else it asks the server who is logged in, for 10 s where there is none
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
        tell(f"W&B: {error}; recording offline")
        wandb.teardown()  # its service still holds the id
        mode = "offline"
        run = open_run(mode)
    if mode == "online":
        tell(f"W&B: {run.url}")
    for axis in AXES:
        run.define_metric(axis, hidden=True)
    run.define_metric("*", step_metric="step")  # W&B renumbers its own steps where offline attempts overlap

    exit_code = 1  # unless the trainer lives to say otherwise
    for message in messages:
        if "exit_code" in message:
            exit_code = message["exit_code"]
            break
        if "samples" in message:
            message["samples"] = wandb.Html(_page(message["samples"]), inject=False)
        run.log(message, step=message["step"])
    run.finish(exit_code=exit_code)
    wandb.teardown()  # here, not in its exit hook, so that what goes wrong is said
    if mode == "online" and FATAL in log_of(start).read_bytes()[log_bytes:]:
        raise RuntimeError("the server refused data")  # wandb itself only prints it
    if mode == "offline":
        tell(f"W&B: upload every attempt as one run with `{sync_line(start | {'mode': mode})}` (after `wandb login`)")


def _page(samples: list[dict[str, str]]) -> str:
    """Samples as they are, line breaks kept, prompts in bold."""
    texts = (f"<b>{html.escape(sample['prompt'])}</b>{html.escape(sample['text'])}" for sample in samples)
    return "".join(f'<pre style="white-space: pre-wrap">{text}</pre><hr>' for text in texts)
