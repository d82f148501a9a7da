"""Two hosts with addresses of their own, made of network namespaces, train together as the operator would start them.

The environment is what Kubeflow's training operator gives a PyTorchJob (1.9: ``PET_*``, ``MASTER_ADDR``), once
with a master and a worker, once elastic (c10d). Both end with the very weights of two processes on one host.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.launch import Start, assert_equal, environment, finish, launch, weights, write
from training.config import RunConfig


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[tuple[str, str]]]:
    """(namespace, address) of two hosts joined by a cable."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` (iproute2)")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    names = [f"mien-{os.getpid()}-{i}" for i in (1, 2)]
    cable = [f"mien{os.getpid() % 100_000}{side}" for side in "ab"]
    addresses = [f"10.231.{os.getpid() % 250}.{i}" for i in (1, 2)]
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
            for name, end, address in zip(names, cable, addresses, strict=True):
                _ip("link", "set", end, "netns", name)
                inside = ("netns", "exec", name, "ip")
                _ip(*inside, "link", "set", end, "name", "eth0")
                _ip(*inside, "address", "add", f"{address}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    _ip(*inside, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine makes no network namespaces: {error.stderr.decode().strip()}")
        yield list(zip(names, addresses, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=30)
        subprocess.run(["ip", "link", "delete", cable[0]], check=False, capture_output=True, timeout=30)


def _fixed(rank: int, master: str) -> dict[str, str]:
    """A PyTorchJob with one master and one worker."""
    return {
        "MASTER_ADDR": master, "MASTER_PORT": "23456", "PET_MASTER_ADDR": master, "PET_MASTER_PORT": "23456",
        "WORLD_SIZE": "2", "RANK": str(rank), "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(rank),
        "PET_NNODES": "2",
    }  # fmt: skip


def _elastic(rank: int, master: str) -> dict[str, str]:
    """An elastic PyTorchJob. Pods find out who hosts the rendezvous by name; namespaces have none, so they are told."""
    return {
        "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": f"{master}:23456", "PET_RDZV_ID": "mien",
        "PET_NNODES": "2:2", "PET_NPROC_PER_NODE": "1", "PET_MAX_RESTARTS": "0",
        "PET_RDZV_CONF": f"is_host={int(rank == 0)}",
    }  # fmt: skip


def test_two_hosts_end_with_the_weights_of_one(
    bare: RunConfig, tmp_path: Path, hosts: list[tuple[str, str]], module_background: Start
) -> None:
    base = bare.model_copy(update={"batch": 4, "total_images": 12, "checkpoint_every": 8, "runs": str(tmp_path)})
    one = base.model_copy(update={"name": "one-host"})
    reference = launch(module_background, 2, ["--config", write(one, tmp_path / "one.json")], log=tmp_path / "one.log")
    finish(reference, tmp_path / "one.log")
    for kind, given in (("fixed", _fixed), ("elastic", _elastic)):
        config = base.model_copy(update={"name": kind})
        path = write(config, tmp_path / f"{kind}.json")
        pods = []
        for rank, (namespace, address) in enumerate(hosts):
            env = environment(**given(rank, hosts[0][1]), GLOO_SOCKET_IFNAME="eth0", PET_LOCAL_ADDR=address)
            command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "training.launch"]
            log = tmp_path / f"{kind}-{rank}.log"
            pods.append((module_background([*command, "-m", "training", "--config", path], log=log, env=env), log))
        for process, log in pods:
            finish(process, log)
        assert_equal(weights(one), weights(config))
