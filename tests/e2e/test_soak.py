"""A run struck by real faults is bit for bit the uninterrupted one, also when it alternates between DDP and FSDP2."""

from pathlib import Path

import pytest

from tests.helpers.aftermath import STEPS
from tests.helpers.faults import SHARDED, Episode, Fault, Strike
from tests.helpers.soak import Soak

# For each start of torchrun: the fault, and the state and reason in status.json afterwards.
SAMPLE = (
    (Fault("step", (Strike("kill rank", 1),), visit=16), "failed", None),
    (Fault("writing", (Strike("kill ranks"),), visit=2, holder=1), "running", None),
    (Fault("step", (Strike("kill launcher"),), visit=8, holder=1), "stopped", "launcher died"),
    (Fault("update", (Strike("SIGTERM launcher"),), visit=16), "stopped", "SIGTERM"),
)
IN_PLACE = Episode((Fault("committed", (Strike("kill rank", 0),), visit=2),), in_place=True)


@pytest.mark.long(reason="five starts of torchrun; test_exact.py kills forked processes in `make test`")
@pytest.mark.timeout(900)
def test_a_run_with_five_faults_is_bitwise_the_uninterrupted_one(tiny_data: Path, tmp_path: Path) -> None:
    soak = Soak(tmp_path, tiny_data)
    for attempt, (fault, state, reason) in enumerate(SAMPLE, start=1):
        ended = soak.do(Episode((fault,), flags=SHARDED if attempt % 2 else ()))
        assert ended is not None
        assert (ended["state"], ended["attempt"]) == (state, attempt), fault
        assert reason is None or ended["reason"] == reason, fault
    ended = soak.do(IN_PLACE)
    assert ended == {"state": "done", "step": STEPS, "reason": None, "attempt": len(SAMPLE) + 2}
    assert (soak.num_faults, soak.num_finished) == (5, 1)


# What is damaged before each start, the strike in it, and the state afterwards.
AT_REST = (
    ((), "kill ranks", "running"),
    (("damaged file", "damaged file"), "SIGTERM launcher", "stopped"),
    (("wrong data",), "SIGTERM launcher", "refused"),
    (("damaged checkpoint", "damaged file"), "clock step", "done"),
)


@pytest.mark.long(reason="four starts of torchrun; test_damaged_files.py starts one process in `make test`")
@pytest.mark.timeout(900)
def test_a_run_damaged_at_rest_is_bitwise_the_undamaged_one_and_changed_data_is_refused(
    tiny_data: Path, tmp_path: Path
) -> None:
    soak = Soak(tmp_path, tiny_data)
    for seed, (kinds, strike, state) in enumerate(AT_REST):
        at_rest = tuple((kind, seed + 10 * number) for number, kind in enumerate(kinds))
        soak.do(Episode((Fault("step", (Strike(strike),), visit=12),), at_rest))
        assert soak.ends[state] == 1, soak.ends
    assert (soak.num_faults, soak.num_finished, len(soak.persons)) == (8, 1, 1)


@pytest.mark.slow
@pytest.mark.timeout(2 * 60 * 60)
def test_runs_with_a_hundred_random_faults_are_bitwise_the_uninterrupted_one(tiny_data: Path, tmp_path: Path) -> None:
    soak = Soak(tmp_path, tiny_data)
    soak.soak(num_faults=100)
    print(*soak.report(), sep="\n")
    assert soak.num_faults >= 100 and soak.num_finished >= 5
