"""A real Slurm of two nodes on this machine, on loopback, for as long as somebody holds it.

``Slurm`` starts a keeper (this file as a program), which starts munged, slurmctld and two slurmd in one folder with
ports of their own. The keeper adopts what its daemons leave behind (Linux's subreaper) and ends every descendant when
its standard input closes: also where the tests were interrupted or killed.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
NODES = ("n1", "n2")
PR_SET_CHILD_SUBREAPER = 36
# cred_expire: a requeued job waits so long (by default two minutes). GraceTime, KillWait: from SIGTERM to SIGKILL when
# preempted, and at a time limit or a cancellation. ReturnToService=2: a node that comes back is used at once.
CONF = """
ClusterName=drill
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=6
KillWait=5
OverTimeLimit=0
MinJobAge=3600
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=8
PartitionName=urgent Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why no Slurm can be started here; None where it can."""
    if not sys.platform.startswith("linux"):
        return "Slurm is tested on Linux"
    missing = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm and munge)"
    return None if os.geteuid() == 0 else "slurmd needs root to start jobs"


class Slurm:
    """A running cluster. Its clients find it by ``environment``.

    Raises:
        RuntimeError: it did not come up; the daemons' last words are in the message.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._keeper = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C of the tests is not meant for the daemons
        )
        self._await_answer()
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        self._await_nodes(*NODES)

    def call(self, *words: str) -> str:
        """What a client command printed.

        Raises:
            RuntimeError: it failed.
        """
        done = subprocess.run(words, env=os.environ | self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def job(self, job_id: int) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, NodeList, ..."""
        words = self.call("scontrol", "--oneliner", "show", "job", str(job_id)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def power_off(self, node: str) -> None:
        """Everything on the node ends at once, as by a pulled plug; Slurm finds out by itself."""
        self._ask(f"off {node}")

    def power_on(self, node: str) -> None:
        """The node comes back, empty."""
        self._ask(f"on {node}")
        self._await_nodes(node)

    def mount(self, folder: Path, size: str) -> None:
        """Put a file system of its own over an empty folder, until ``unmount`` or the end of the cluster."""
        self._ask(f"mount {folder} {size}")

    def unmount(self, folder: Path) -> None:
        """Take it away with all that is in it."""
        self._ask(f"unmount {folder}")

    def close(self) -> None:
        """End every daemon, job and task."""
        assert self._keeper.stdin is not None
        with suppress(OSError):
            self._keeper.stdin.close()
        self._keeper.wait(60)

    def _ask(self, line: str) -> None:
        assert self._keeper.stdin is not None
        self._keeper.stdin.write(f"{line}\n")
        self._keeper.stdin.flush()
        self._await_answer()

    def _await_answer(self) -> None:
        assert self._keeper.stdout is not None
        if self._keeper.stdout.readline() != "done\n":
            raise RuntimeError(f"Slurm's keeper ended\n{self._last_words()}")

    def _await_nodes(self, *nodes: str) -> None:
        until = time.monotonic() + 60
        while True:
            with suppress(RuntimeError):  # slurmctld may not answer yet
                states = self.call("sinfo", "--noheader", "--Node", "--nodes", ",".join(nodes), "--format=%T").split()
                if states and set(states) <= {"idle", "mixed", "allocated", "completing"}:
                    return
            if time.monotonic() > until:
                words = self._last_words()
                self.close()
                raise RuntimeError(f"Slurm's nodes did not come up\n{words}")
            time.sleep(0.05)

    def _last_words(self) -> str:
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{log.name}: {line}" for log in logs for line in log.read_text().splitlines()[-5:])


def _path() -> str:
    """Debian has the daemons in /usr/sbin, which a user's path may lack."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Keeper:
    """The daemons' parent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mounted: list[str] = []
        signal.signal(signal.SIGCHLD, lambda *_: reap())
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        (folder / "state").mkdir(parents=True)
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=free_ports(3)))
        at = {name: f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")}
        self.start("munged", "--foreground", "--force", *at.values(), f"--socket={folder}/munge.socket")
        while not (folder / "munge.socket").exists():
            time.sleep(0.01)
        self.start("slurmctld", "-D")
        for node in NODES:
            self.on(node)

    def start(self, *words: str, node: str = "") -> None:
        """Start a daemon that stays our child; ``node`` marks what it starts in turn."""
        environment = os.environ | {"PATH": _path(), "SLURM_CONF": f"{self.folder}/slurm.conf", "DRILL_NODE": node}
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.Popen(words, env=environment, **quiet)

    def on(self, node: str) -> None:
        self.start("slurmd", "-D", "-N", node, node=node)

    def off(self, node: str) -> None:
        self.end(lambda pid: f"DRILL_NODE={node}" in environ(pid) or f"SLURMD_NODENAME={node}" in environ(pid))

    def end(self, chosen: Callable[[int], bool]) -> None:
        """Kill the chosen descendants until none is left: a killed one may have started another meanwhile."""
        while pids := [pid for pid in descendants() if chosen(pid)]:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def serve(self) -> None:
        """Do as asked until nobody is there to ask."""
        print("done", flush=True)
        for line in sys.stdin:
            what, *arguments = line.split()
            {"on": self.on, "off": self.off, "mount": self.mount, "unmount": self.unmount}[what](*arguments)
            print("done", flush=True)

    def mount(self, folder: str, size: str) -> None:
        self.mounted.append(folder)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "drill", folder])
        assert Path(folder).is_mount()  # its exit code may have been reaped

    def unmount(self, folder: str) -> None:
        subprocess.run(["umount", "--lazy", folder])  # lazy: a process may still stand in it
        self.mounted.remove(folder)

    def close(self) -> None:
        """End every descendant and leave no mount."""
        self.end(lambda pid: True)
        for folder in list(self.mounted):
            self.unmount(folder)


def descendants() -> list[int]:
    """Our children, their children, and so on."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z" or int(parent) == os.getpid():
                parents.setdefault(int(parent), []).append(int(stat.parent.name))
    found, new = [], [os.getpid()]
    while new:
        new = [child for parent in new for child in parents.get(parent, [])]
        found += new
    return found


def environ(pid: int) -> list[str]:
    """The environment that a process was started with."""
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return []


def reap() -> None:
    """Let go of ended children; those that Slurm's daemons left behind are ours, too."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody uses now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


if __name__ == "__main__":
    keeper = Keeper(Path(sys.argv[1]))
    try:
        keeper.serve()
    finally:
        keeper.close()
