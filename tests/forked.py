"""Scripts run in processes forked from one that has imported what they import: they begin at once, not in 5 seconds.

A script is run from its first line and imports every module of ours itself. Only a new interpreter and its import of
other people's modules is spared.

    python tests/forked.py SCRIPT ... --help        # each script with these flags: {script: [exit status, printed]}
"""

import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PRELOADED = ("numpy", "tiktoken", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "tyro")


def preload() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # a collection would copy it all into each process, by writing its marks there


def run_forked(script: str, *args: str, env: dict[str, str], **options: Any) -> "subprocess.Popen[str]":
    """subprocess.Popen of `python -u SCRIPT ARGS`, but that the child never comes to be another program."""

    def be_the_script() -> None:
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the pipe, too, by which Popen waits for the exec
        gc.enable()  # Popen has switched it off
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(env)
        sys.argv, sys.path[0] = [script, *args], str(Path(script).resolve().parent)
        process = multiprocessing.Process(target=runpy.run_path, args=(script,), kwargs={"run_name": "__main__"})
        os._exit(process._bootstrap())  # type: ignore[attr-defined]  # prints what is raised; Python's exit status

    return subprocess.Popen([script, *args], preexec_fn=be_the_script, **options)


def main(args: Sequence[str]) -> None:
    preload()
    scripts, flags = [a for a in args if not a.startswith("-")], [a for a in args if a.startswith("-")]
    running = {
        script: run_forked(
            script,
            *flags,
            env=dict(os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for script in scripts
    }
    found = {}
    for script, process in running.items():
        printed, _ = process.communicate()
        found[script] = (process.returncode, printed)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
