"""Rank and world size from the variables of torchrun, srun and submitit; tests/cluster has the real launchers."""

import pytest

from common.errors import InputError
from train.processes.ranks import (
    FIRST_PORT,
    LOOPBACK,
    NUM_PORTS,
    RankInfo,
    find_rank,
    first_host,
    port_of,
    slurm_job,
    take_rank,
    tasks_per_node,
)

TORCHRUN = {
    **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
    **{"MASTER_ADDR": "n1", "MASTER_PORT": "12345", "TORCHELASTIC_RUN_ID": "7"},
}
SRUN = {
    **{"SLURM_JOB_ID": "70", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "5"},
    **{"SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "3,2(x2)"},
    **{"SLURM_STEP_NODELIST": "n[03-05]", "SLURM_NTASKS": "7"},
}
BOTH = SRUN | {"RANK": "0", "WORLD_SIZE": "1"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "70", "SLURM_NTASKS": "8"} | dict.fromkeys(
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0"
)
ONE_HOST = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "RANK": "1"}
SUBMITIT = {
    **{"SUBMITIT_LOCAL_JOB_ID": "4711", "SUBMITIT_LOCAL_NTASKS": "3", "SUBMITIT_LOCAL_GLOBALID": "2"},
    **{"SUBMITIT_LOCAL_LOCALID": "2"},
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, RankInfo()),
        (TORCHRUN, RankInfo(5, 8, 1, 4, "n1", 12345)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, RankInfo(1, 2, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n1"}, RankInfo(1, 2, 1, 2, "n1")),
        (TORCHRUN | ONE_HOST, RankInfo(1, 8, 1, 8, LOOPBACK, 12345)),
        (SRUN, RankInfo(5, 7, 0, 2, "n03", 12912)),
        (SRUN | {"MASTER_ADDR": "n9", "MASTER_PORT": "1"}, RankInfo(5, 7, 0, 2, "n9", 1)),
        (
            SRUN | {"SLURM_STEP_TASKS_PER_NODE": "7", "SLURM_NODEID": "0", "SLURM_LOCALID": "5", "MASTER_ADDR": "n9"},
            RankInfo(5, 7, 5, 7, LOOPBACK, 12912),
        ),
        (BATCH_SCRIPT, RankInfo()),
        (BATCH_SCRIPT | TORCHRUN, RankInfo(5, 8, 1, 4, "n1", 12345)),
        (SRUN | TORCHRUN, RankInfo(5, 8, 1, 4, "n1", 12345)),
        (SUBMITIT, RankInfo(2, 3, 2, 3, LOOPBACK, port_of(4711, 0))),
        (SUBMITIT | {"SUBMITIT_LOCAL_NTASKS": "1", "SUBMITIT_LOCAL_GLOBALID": "0"}, RankInfo()),
    ],
)
def test_every_launcher_is_understood(environ: dict[str, str], expected: RankInfo) -> None:
    assert find_rank(environ) == expected
    changed = dict(environ)
    assert take_rank(changed) == expected
    assert find_rank(changed) == expected, "also a second time"
    assert ("RANK" in changed) == (expected.world > 1 or "RANK" in environ)


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        (BOTH, "srun started rank 5 of 7, but RANK=0 and WORLD_SIZE=1 are set; unset RANK, WORLD_SIZE and LOCAL_RANK"),
        (
            {"RANK": "3", "WORLD_SIZE": "2"},
            "RANK='3': WORLD_SIZE=2 allows 0 to 1; start with torchrun or srun, or unset ",
        ),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE='9': more than WORLD_SIZE=8; "),
        (
            {"WORLD_SIZE": "8"},
            "RANK is not set, though a launcher's other variables are; start with torchrun or srun, ",
        ),
        ({"RANK": "3"}, "WORLD_SIZE is not set, though a launcher's other variables are; "),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x': not a whole number; "),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT='65536': ports are 1 to 65535; "),
        (
            SRUN | {"SLURM_STEP_NODELIST": ""},
            "SLURM_STEP_NODELIST='' names no host; start with srun, or set MASTER_ADDR",
        ),
        (SRUN | {"SLURM_NODEID": "3"}, "SLURM_NODEID='3': SLURM_STEP_TASKS_PER_NODE has 3 nodes; "),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS='8': SLURM_STEP_TASKS_PER_NODE has 7; "),
        (
            SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,x"},
            "SLURM_STEP_TASKS_PER_NODE='3,x': not in Slurm's form, like 4(x2)",
        ),
    ],
)
def test_contradictions_are_refused(environ: dict[str, str], line: str) -> None:
    with pytest.raises(InputError) as caught:
        find_rank(environ)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize("environ", [TORCHRUN, TORCHRUN | ONE_HOST, SRUN, SUBMITIT])
def test_garbage_in_a_variable_is_one_line_that_names_it(environ: dict[str, str]) -> None:
    """Every variable of every launcher, absent too: a sound rank is returned, or the line names what was given."""
    values = [
        None,
        "",
        " ",
        "-1",
        "+1",
        "1.0",
        "1e3",
        "0x1",
        "1_0",
        "\u0663",
        "\u00b2",
        "9" * 5000,
        "999",
        "a\nb",
        "\udcff",
    ]
    values += ["[", "]", "[]", ",", "n[", "1(x", "1(x0)", "2(x999999)"]
    for name in environ:
        for value in values:
            damaged = {key: text for key, text in (environ | {name: value}).items() if text is not None}
            try:
                found = find_rank(damaged)
            except InputError as error:
                assert "\n" not in str(error) and (name in str(error) or "SLURM_STEP_NUM_TASKS" in str(error)), error
                continue
            assert 0 <= found.rank < found.world and 0 <= found.local_rank < found.local_world <= found.world
            assert found.host and 0 < found.port < 65536


def test_a_plan_may_be_for_several_processes() -> None:
    assert find_rank({"WORLD_SIZE": "8"}, is_plan=True) == RankInfo(0, 8, 0, 8)
    assert find_rank(TORCHRUN, is_plan=True) == find_rank(TORCHRUN)


def test_slurms_notations_are_read() -> None:
    hosts = {"n1": "n1", "n1,m2": "n1", "n[07-12,20]": "n07", "r[1-2]n[07-12],login": "r1n07", "a-b[3]x,c": "a-b3x"}
    assert {nodes: first_host(nodes) for nodes in hosts} == hosts
    assert tasks_per_node("4") == [4] and tasks_per_node("2(x3),1,3(x2)") == [2, 2, 2, 1, 3, 3]
    for nodes in ("", ",n1", "[", "[]", "]"):
        with pytest.raises(InputError, match="names no host"):
            first_host(nodes)
    assert slurm_job({}) is None and slurm_job({"SLURM_JOB_ID": ""}) is None
    assert slurm_job({"SLURM_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}) == "9"
    assert slurm_job({"SLURM_JOB_ID": "9"}) == "9"
    assert slurm_job({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}) == "9_3"


def test_ports_of_neighbouring_jobs_and_restarts_differ_and_stay_below_the_kernels() -> None:
    ports = [port_of(job, start) for job in range(2_000_000, 2_000_100) for start in range(10)]
    assert len(set(ports)) == len(ports) and min(ports) >= FIRST_PORT and max(ports) < FIRST_PORT + NUM_PORTS <= 32768
