"""A worker ends if its launcher dies before the process group exists, instead of waiting for half an hour."""

import os
import subprocess
import sys

from tests.helpers.runs import ROOT
from train.processes import parent_watch

WORKER = """
import time
from train.processes import parent_watch
parent_watch.remember()
print("started", flush=True)
with parent_watch.exit_with_launcher():
    time.sleep(100)
"""
# This launcher dies as soon as its worker has started.
LAUNCHER = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
worker.stdout.readline()
"""


def test_a_worker_ends_with_a_launcher_that_dies_before_there_is_a_process_group() -> None:
    env = os.environ | {"TORCHELASTIC_RUN_ID": "some"}
    command = [sys.executable, "-c", LAUNCHER, WORKER]
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, check=True, timeout=90, cwd=ROOT)
    assert done.stderr == "train: the launcher died; leaving\n"  # The pipe ended, so the worker, which had it, is gone.


def test_without_torchrun_there_is_no_launcher_to_miss() -> None:
    parent_watch.remember()
    assert not parent_watch.is_gone()
