"""Where the processes of a job listen, and what a stranger who reaches torchrun's store can do."""

import base64
import pickle
import re
from pathlib import Path

import torch.distributed as dist

from model.checkpoint import list_checkpoints
from tests.cluster.slurm import Cluster, Job, environment_of, script
from tests.cluster.tiny import flags
from tests.helpers.runs import status

ENDLESS = ("--train.steps", "100000")
NETWORK = {"GLOO_SOCKET_IFNAME": "eth0"}  # what the nodes of the tests' cluster call their own network
SLURMD_PORT = 6818


def address_of(cluster: Cluster, node: str) -> str:
    """Return the address of a node's eth0."""
    shown = inside(cluster, node, "ip", "-o", "-4", "address", "show", "dev", "eth0")
    return shown.split(" inet ")[1].split("/")[0]


def inside(cluster: Cluster, node: str, *command: str) -> str:
    done = script(cluster.folder, "exec", str(1 + cluster.nodes.index(node)), *command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def listening(cluster: Cluster, node: str) -> set[tuple[str, int]]:
    """Return (address, port) of every socket that listens on the node, but those of Slurm."""
    sockets = set()
    for line in inside(cluster, node, "ss", "-ltnpH").splitlines():
        address, _, port = line.split()[3].rpartition(":")
        if not re.search(r'"(slurmd|slurmstepd|srun)', line):
            sockets.add((address, int(port)))
    return sockets


def rendezvous(job: Job) -> tuple[str, int]:
    (line,) = job.lines("rendezvous at ")
    address, port = line.partition("rendezvous at ")[2].split(";")[0].rsplit(":", 1)
    return address, int(port)


def wait_for_a_checkpoint(job: Job, run_dir: Path) -> None:
    job.wait_for(lambda: bool(list_checkpoints(run_dir)), "a checkpoint")


class Planted:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


def test_torchrun_meets_on_the_sites_network_and_unpickles_nothing_of_a_stranger(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    """torch cannot bind torchrun's store to one address; everything else listens on the named network alone."""
    found = []
    for number in range(2):
        run_dir, mark = tmp_path / f"run_{number}", tmp_path / f"mark_{number}"
        job = cluster.train(tmp_path / f"log_{number}", flags(tiny_data, run_dir, *ENDLESS), env=NETWORK)
        wait_for_a_checkpoint(job, run_dir)
        first, second = job.nodes()
        host, port = rendezvous(job)
        assert host == address_of(cluster, first)
        assert {address for address, _ in listening(cluster, second)} == {address_of(cluster, second)}
        everywhere = {(address, number) for address, number in listening(cluster, first) if address != host}
        assert everywhere == {("*", port)}, "torchrun's store"

        identity = environment_of(job.ranks()[0])["TORCHELASTIC_RUN_ID"]
        commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in job.processes()]
        assert any("torchrun" in command for command in commands)
        assert not any(identity in command for command in commands), "not for everybody who lists processes"
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        planted = base64.b64encode(pickle.dumps(Planted(mark))).decode()
        for key in (f"torch.rendezvous.{identity}", *store.list_keys()):
            store.set(key, planted)
        at = status(run_dir)["step"]
        job.wait_for(lambda at=at, run_dir=run_dir: status(run_dir)["step"] > at, "a later checkpoint")  # type: ignore[misc]
        (run_dir / "STOP").touch()
        assert job.wait() == "COMPLETED", job.text()
        assert not mark.exists()
        found.append((port, identity))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]
    assert all(re.fullmatch(r"\d+\.0\.[0-9a-f-]{36}", identity) for _, identity in found)


def test_without_torchrun_all_listen_on_the_sites_network_alone(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shape = ("--nodes", "2", "--gpus-per-node", "1", "--cpus-per-gpu", "2", "--time", "30")
    words = ("gpt2-small", *shape, "--", *flags(tiny_data, run_dir, *ENDLESS))
    done = cluster.run("python", "launch/submit.py", *words, env=NETWORK)
    assert done.returncode == 0, done.stderr
    number, log = re.findall(r"^job (\d+)\S* trains \S+; log (\S+)$", done.stdout, re.MULTILINE)[0]
    job = Job(cluster, int(number), Path(log))
    wait_for_a_checkpoint(job, run_dir)
    nodes = job.nodes()
    host, port = rendezvous(job)
    assert host == address_of(cluster, nodes[0]) and (host, port) in listening(cluster, nodes[0])
    for node in nodes:
        assert {address for address, _ in listening(cluster, node)} == {address_of(cluster, node)}
    (run_dir / "STOP").touch()
    assert job.wait() == "COMPLETED", job.text()


def test_a_network_that_a_node_does_not_have_is_named(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    job = cluster.train(tmp_path / "log", flags(tiny_data, tmp_path / "run"), env={"GLOO_SOCKET_IFNAME": "ib7,eth0"})
    assert job.wait() == "FAILED"
    assert len(job.lines("slurm: GLOO_SOCKET_IFNAME=ib7,eth0: ib7 has no address on ")) == 1, job.text()
