"""Environment variables, valid degrees, and a mesh of one."""

import re
import socket

import pytest
import torch
import torch.distributed as dist

from allometry.configs.errors import UserError
from allometry.configs.execution import ParallelConfig
from allometry.parallel.mesh import open_mesh
from allometry.parallel.rendezvous import Launch, read_launch

AXES = ("pp", "hdp", "tp", "ep", "edp")
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
}


def test_launch_by_torchrun() -> None:
    assert read_launch(TORCHRUN) == Launch(5, 8, 1, "node-0:29500")


def test_launch_without_launcher_and_of_one_rank() -> None:
    assert read_launch({"PATH": "/bin"}) == Launch(0, 1, 0, None)
    assert read_launch({"RANK": "0", "WORLD_SIZE": "1"}) == Launch(0, 1, 0, None)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"WORLD_SIZE": None}, "has RANK but not WORLD_SIZE; start the run with torchrun"),
        ({"RANK": None}, "has WORLD_SIZE but not RANK; start the run with torchrun"),
        ({"RANK": "first"}, "RANK='first' in the environment is not a number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1' in the environment is not a number"),
        ({"RANK": "8"}, "RANK=8 in the environment must be below WORLD_SIZE=8"),
        ({"MASTER_PORT": None}, "WORLD_SIZE=8 in the environment needs MASTER_PORT"),
    ],
)
def test_half_a_launch_is_refused(change: dict[str, str | None], sentence: str) -> None:
    environment = {k: v for k, v in (TORCHRUN | change).items() if v is not None}
    with pytest.raises(UserError, match=re.escape(sentence)):
        read_launch(environment)


def test_a_process_alone_has_a_mesh_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert not dist.is_initialized()
    with open_mesh(ParallelConfig(), torch.device("cpu")) as mesh:
        assert (mesh.rank, mesh.world_size, mesh.is_main) == (0, 1, True)
        assert [(mesh.axis(a).rank, mesh.axis(a).size) for a in AXES] == [(0, 1)] * 5
        assert mesh.zero_mesh.size() == mesh.expert_zero_mesh.size() == 1
        assert float(mesh.all_reduce_sum(torch.ones(()), "hdp")) == 1.0
        assert mesh.broadcast_object("word") == "word"
        assert mesh.gather_objects("word") == ["word"]
        mesh.barrier("nothing")
        for group in (mesh.hdp.group, mesh.host_group, mesh.checkpoint_group):
            assert dist.get_world_size(group) == 1
            dist.all_reduce(torch.ones(()), group=group)
    assert not dist.is_initialized()


def test_a_mesh_can_be_opened_again() -> None:
    for _ in range(2):
        with open_mesh(ParallelConfig(), torch.device("cpu")) as mesh:
            assert dist.is_initialized()
            assert (mesh.rank, mesh.world_size) == (0, 1)
        assert not dist.is_initialized()


def test_a_failed_run_leaves_no_group_behind() -> None:
    with pytest.raises(ZeroDivisionError), open_mesh(ParallelConfig(), torch.device("cpu")):
        raise ZeroDivisionError
    assert not dist.is_initialized()


def test_a_gpu_that_is_not_there() -> None:
    there = torch.cuda.device_count()
    with pytest.raises(UserError, match=f"wants GPU {there}, but this machine shows {there}"):
        open_mesh(ParallelConfig(), torch.device("cuda", there))
    assert not dist.is_initialized()


def test_ranks_that_do_not_meet_get_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    for name, value in (address | {"RANK": "1", "WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        open_mesh(ParallelConfig(timeout_s=1), torch.device("cpu"))
    where = f"127.0.0.1:{address['MASTER_PORT']}"
    assert str(caught.value).startswith(
        f"rank 1 did not meet the other ranks of WORLD_SIZE=2 at {where} within "
        "1 s; check that all were started"
    )
