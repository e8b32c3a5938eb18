"""A run struck by real faults, in chosen places and at random moments, is bit for bit the run that never was; also
where it is started by turns with DDP and with FSDP2."""

from pathlib import Path

import pytest

from tests.helpers.aftermath import STEPS
from tests.helpers.faults import SHARDED, WORLD, Episode, Fault, Strike
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import status
from tests.helpers.soak import Soak, compare, train_whole
from train.config import parse
from train.presets import PRESETS

# One start of torchrun each: what strikes where, and status.json's state and reason afterwards.
SAMPLE = (
    (Fault("step", (Strike("kill rank", 1),), visit=16), "failed", None),
    (Fault("writing", (Strike("kill ranks"),), visit=2, holder=1), "running", None),
    (Fault("validation", (Strike("SIGUSR1 rank", 1),), visit=2, holder=1), "stopped", "SIGUSR1"),
    (Fault("step", (Strike("kill launcher"),), visit=8, holder=1), "stopped", "launcher died"),
    (Fault("commit", (Strike("STOP file"),)), "stopped", "STOP file"),
    (Fault("update", (Strike("SIGTERM launcher"),), visit=16), "stopped", "SIGTERM"),
    (Fault("load", (Strike("SIGUSR1 rank", 0), Strike("kill everything"))), "running", None),
)
IN_PLACE = Episode((Fault("committed", (Strike("kill rank", 0),), visit=2),), in_place=True)


@pytest.mark.long(reason="a start of torchrun; test_exact.py kills forked processes in `make test`")
@pytest.mark.timeout(600)
def test_a_kill_in_the_midst_of_a_save_and_the_run_is_bitwise_the_uninterrupted_one(
    tiny_data: Path, tmp_path: Path
) -> None:
    soak = Soak(tmp_path, tiny_data)
    fault = Fault("writing", (Strike("kill ranks"),), visit=2, holder=1)
    found = soak.do(Episode((fault,)))
    assert found is not None and (found["state"], found["attempt"]) == ("running", 1)
    run_on_ranks(WORLD, train_whole, parse(soak.flags(soak.run_dir), PRESETS))  # the same command without torchrun
    assert status(soak.run_dir) == {"state": "done", "step": STEPS, "reason": None, "attempt": 2}
    compare(soak.run_dir, soak.whole)


@pytest.mark.long(reason="nine starts of torchrun")
@pytest.mark.timeout(900)
def test_eight_faults_in_a_row_and_the_run_is_bitwise_the_uninterrupted_one(tiny_data: Path, tmp_path: Path) -> None:
    soak = Soak(tmp_path, tiny_data)
    for attempt, (fault, state, reason) in enumerate(SAMPLE, start=1):
        found = soak.do(Episode((fault,), flags=SHARDED if attempt % 2 else ()))
        assert found is not None
        assert (found["state"], found["attempt"]) == (state, attempt), fault
        assert reason is None or found["reason"] == reason, fault
    found = soak.do(IN_PLACE)
    assert found == {"state": "done", "step": STEPS, "reason": None, "attempt": len(SAMPLE) + 2}
    assert (soak.num_faults, soak.num_finished) == (8, 1)


@pytest.mark.slow
@pytest.mark.timeout(2 * 60 * 60)
def test_a_hundred_random_faults_and_every_run_is_bitwise_the_uninterrupted_one(
    tiny_data: Path, tmp_path: Path
) -> None:
    soak = Soak(tmp_path, tiny_data)
    soak.soak(num_faults=100)
    print(*soak.report(), sep="\n")
    assert soak.num_faults >= 100 and soak.num_finished >= 5
