"""A real Slurm on this machine as a fixture.

Needs root and Debian's Slurm (``apt-get install slurm-wlm munge``). The daemons are separate from
the machine's services: they run in a temporary folder, on separate ports.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gates import LIMIT_S

Shell = Callable[..., str]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
CONFIG = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=2000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Shell]:
    """Yield ``slurm("scontrol", ...)``: output of a command on a one-node cluster, this machine."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid():
        pytest.skip(f"Slurm cannot be started here: not root, or without {', '.join(missing)}")
    place = tmp_path / "slurm"
    for name in ("state", "spool", "munge"):
        (place / name).mkdir(parents=True)
    (place / "munge").chmod(0o700)
    (place / "munge/key").write_bytes(os.urandom(1024))
    (place / "munge/key").chmod(0o400)
    host = socket.gethostname().split(".")[0]
    text = CONFIG.format(host=host, place=place, ports=(free_port(), free_port()))
    (place / "slurm.conf").write_text(text)
    environment = os.environ | {"SLURM_CONF": str(place / "slurm.conf")}
    files = {"key-file": "munge/key", "socket": "munge.socket", "seed-file": "munge/seed"}
    files |= {"pid-file": "munge/pid", "log-file": "munge/log"}
    munged = [
        "munged",
        "--foreground",
        "--force",
        *(f"--{k}={place / v}" for k, v in files.items()),
    ]
    said = open(place / "daemons.log", "w")  # noqa: SIM115
    daemons = [
        subprocess.Popen(words, env=environment, stdout=said, stderr=said)
        for words in (munged, ["slurmctld", "-D"], ["slurmd", "-D"])
    ]

    def command(*words: str) -> str:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr + (place / "daemons.log").read_text()
        return done.stdout

    try:
        until = time.monotonic() + 60.0
        while time.monotonic() < until:
            done = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True)
            if done.stdout.strip() == b"idle":
                break
            time.sleep(0.5)
        yield command
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        said.close()


def job(slurm: Shell, number: int, wanted: str) -> None:
    """Wait until a job reaches a state."""
    until = time.monotonic() + 2 * LIMIT_S
    while f"JobState={wanted} " not in (told := slurm("scontrol", "show", "job", str(number))):
        assert time.monotonic() < until, told
        assert not re.search("JobState=(FAILED|CANCELLED)", told), told
        time.sleep(0.5)
