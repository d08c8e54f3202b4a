"""Several processes of one run: who they are, and that they speak with one voice."""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading

import pytest
import torch

from sd_hyena import processes
from sd_hyena.cli import main
from sd_hyena.cli.device import choose_device
from sd_hyena.errors import SdHyenaError, UsageError
from sd_hyena.processes import ALONE, Group, Place, here, lost

TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables; what ``here`` sets besides is undone."""
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def setting(**values):
        os.environ.update({name: str(value) for name, value in values.items()})

    return setting


@pytest.fixture
def become(environment, monkeypatch):
    """``become(rank)``: this process is that one of two, with a store such as torchrun's agent keeps."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment(MASTER_ADDR="localhost", MASTER_PORT=store.port, TORCHELASTIC_USE_AGENT_STORE=True)
    processes._opened.cache_clear()

    def setting(rank):
        environment(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank)
        processes._said.clear()

    yield setting
    processes._opened.cache_clear()


@pytest.mark.parametrize(
    "command",
    ["train -m nosuch", "generate -m demo --nosuch", "info pyproject.toml", "targets -m demo", "train -m demo -t IN91"],
)
@pytest.mark.parametrize("first", [0, 1])
def test_what_all_find_is_said_once(become, capsys, command, first):
    for rank in (first, 1 - first):
        become(rank)
        with contextlib.suppress(SystemExit):
            assert main(command.split()) in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1


def test_what_one_finds_is_said(become, capsys):
    for rank in (0, 1):
        become(rank)
        for _ in range(2):  # as often as it happens
            assert main(["generate", "-m", f"nothing-{rank}", "-p", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 4


def test_commands_that_are_for_one_process_refuse_several(become, capsys):
    become(0)
    assert main(["info", "demo"]) == 2
    assert "runs in one process, not in 2" in capsys.readouterr().err


def test_items_of_all_come_to_the_main_process(become, monkeypatch):
    become(0)
    monkeypatch.setattr(processes, "POLL", 0.001)
    monkeypatch.setattr(processes, "_groups", itertools.repeat(7))
    found = {}

    def share(rank):
        group = Group(Place(rank, 3))
        start = group.agree(lambda: [rank, "main"])
        found[rank] = start, list(group.gather([rank, item] for item in range(rank)))

    threads = [threading.Thread(target=share, args=(rank,)) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert {start == [0, "main"] for start, _ in found.values()} == {True}
    assert sorted(found[0][1]) == [[1, 0], [2, 0], [2, 1]]
    assert found[1][1] == found[2][1] == []


@pytest.mark.reliability(12)
def test_the_main_process_does_not_begin_before_the_others_have_come(environment, monkeypatch):
    """It might end before a late one has found its store, and that one would wait for it to come."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=port)
    monkeypatch.setattr(processes, "MEETING", 20.0)
    processes._opened.cache_clear()
    begun = []
    main_process = threading.Thread(target=lambda: begun.append(processes._store()))
    main_process.start()
    late = torch.distributed.TCPStore("localhost", port, is_master=False, wait_for_workers=False)
    main_process.join(0.3)
    assert not begun
    torch.distributed.PrefixStore("sd-hyena/0", late).add("joined", 1)
    main_process.join(20)
    assert begun
    processes._opened.cache_clear()


LAST = """
import os, sys
from sd_hyena import processes
rank = int(os.environ["RANK"])
processes.POLL = 0.05 if rank == 0 else 1.0  # the other looks seldom
processes._store()
group = processes.Group(processes.here())
assert group.agree(lambda: [1, 2], last=True) == [1, 2]
os._exit(0)  # and its store with it
"""


def test_the_main_process_does_not_end_before_the_others_have_heard_its_last_word():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [
        subprocess.Popen([sys.executable, "-c", LAST], env=os.environ | shared | {"RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(60) for process in both] == [0, 0]


@pytest.mark.reliability(12)
def test_who_does_not_come_is_not_waited_for_without_end(environment, monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        environment(MASTER_PORT=free.getsockname()[1])
    environment(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="localhost")
    monkeypatch.setattr(processes, "MEETING", 0.2)
    processes._opened.cache_clear()
    with pytest.raises(SdHyenaError, match="1 of 2 processes have come within"):
        processes._store()
    processes._opened.cache_clear()


def test_torch_does_not_warn_past_the_log():
    """It reads this when it is imported, which the command line does later."""
    code = "import os, sys, sd_hyena.cli; print('torch' in sys.modules, os.environ['TORCH_CPP_LOG_LEVEL'])"
    env = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "ERROR"]


def test_each_item_is_one_process_s():
    for count in (1, 2, 5):
        taken = [number for rank in range(count) for number in range(11) if Place(rank, count).has(number)]
        assert sorted(taken) == list(range(11))


def test_tasks_of_srun_are_processes_of_a_run(environment):
    environment(**SLURM)
    assert here() == Place(3, 6, 1)
    assert os.environ["MASTER_ADDR"] == "gpu07"
    assert int(os.environ["MASTER_PORT"]) == 61440 + (4711 + 2 * 997) % 4096


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("a[3,7-9]", "a3"), ("a[03-12]-ib,b[1-2]", "a03-ib"), ("cn-1-[2-3]", "cn-1-2")],
)
def test_the_first_of_slurm_s_nodes(nodes, first):
    assert processes._from_slurm(SLURM | {"SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_a_batch_script_itself_is_no_task_nor_is_a_lone_one(environment):
    environment(SLURM_JOB_ID=1, SLURM_NTASKS=4, SLURM_PROCID=0, SLURM_LOCALID=0)
    assert here() == ALONE
    environment(SLURM_STEP_NUM_TASKS=1)
    assert here() == ALONE
    environment(**SLURM, RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, MASTER_ADDR="n1", MASTER_PORT=29500)  # torchrun, by srun
    assert here() == Place(1, 2, 1)


@pytest.mark.parametrize(
    "values",
    [
        {"RANK": 2, "WORLD_SIZE": 2},
        {"RANK": -1, "WORLD_SIZE": 2},
        {"RANK": "one", "WORLD_SIZE": 2},
        {"RANK": 0, "WORLD_SIZE": 2},
        {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "n1", "MASTER_PORT": "x"},
        {"SLURM_STEP_NUM_TASKS": "many"},
        {"SLURM_STEP_NUM_TASKS": 2},
    ],
)
def test_an_environment_without_sense_is_one_line(environment, capsys, values):
    environment(**values)
    with pytest.raises(UsageError):
        here()
    assert main(["info", "demo"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_error_of_a_process_that_ended_is_told_from_others(become):
    become(0)
    gone = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    assert lost(gone)
    assert lost(torch.distributed.DistNetworkError("anything"))
    assert not lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    os.environ["WORLD_SIZE"] = "1"
    assert not lost(gone)


def test_each_process_has_its_own_gpu(become, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    become(1)
    assert choose_device("auto") == choose_device("cuda") == "cuda:1"
    assert choose_device("cuda:0") == "cuda:0"
    os.environ |= {"WORLD_SIZE": "1", "RANK": "0"}
    assert choose_device("auto") == "cuda"
