"""Two machines do what one does, and end when one of them is lost. They are network namespaces where those
may be made (Linux, root, the `ip` command), else two torchruns on loopback."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import worker
from tools import RECIPE, ROOT, command, losses, run_folders, run_here, torchrun, weights

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/environ").exists(),
                                                   reason="finds its processes in /proc")]
# All stages in eight steps, for four processes. Both hosts see one disk.
STAGES = {**RECIPE, "tokens_per_step": "512,1024,1536", "dtype": "float64", "steps": 8, "tied_until": 0.5,
          "val_every": 3, "val_tokens": 1000, "repeat": True}
FRESH = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # workers do not meet in the agents' store


class Host(NamedTuple):
    mark: str  # in the environment of all its processes, by which they are found
    enter: tuple[str, ...]  # what a command begins with to run there
    address: str
    interface: str

    def kill(self):
        """The power goes off: every process of it ends at once."""
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"GPT2_TEST_HOST={self.mark}\0".encode() in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)

    def unplug(self):
        """The cable is pulled: what it sends and what is sent to it vanishes. Namespaces only."""
        subprocess.run([*self.enter, "ip", "link", "set", self.interface, "down"], check=True)


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def two_hosts():
    names = [f"gpt2-{os.getpid()}-{letter}" for letter in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "link0", "netns", names[0], "type", "veth", "peer", "name", "link0",
               "netns", names[1])
            for number, name in enumerate(names, 1):
                ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "link0")
                for link in ("lo", "link0"):
                    ip("-n", name, "link", "set", link, "up")
            yield [Host(name, ("ip", "netns", "exec", name), f"10.77.0.{number}", "link0")
                   for number, name in enumerate(names, 1)]
        except (OSError, subprocess.CalledProcessError):
            yield [Host(name, (), f"127.0.0.{number}", "lo") for number, name in enumerate(names, 1)]
    finally:
        for name in names:
            Host(name, (), "", "").kill()
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "delete", name)


@pytest.fixture
def hosts():
    with two_hosts() as pair:
        yield pair


class Job:
    """torchrun on both hosts with the same command, two processes on each."""

    def __init__(self, hosts, folder, *words, restarts=0, environment=FRESH):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder, self.agents, self.ended = folder, [], {}
        for number, host in enumerate(hosts):
            line = [*host.enter, sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                    "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-id=job",
                    f"--rdzv-endpoint={hosts[0].address}:{port}", f"--rdzv-conf=is_host={int(number == 0)}",
                    f"--local-addr={host.address}", f"--max-restarts={restarts}", *words]
            values = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment,
                      "GPT2_TEST_HOST": host.mark, "GLOO_SOCKET_IFNAME": host.interface}
            with open(folder / f"output_{number}.txt", "w") as output:
                self.agents.append(subprocess.Popen([*map(str, line)], env=values, stdout=output,
                                                    stderr=output, start_new_session=True))

    def output(self, number=0):
        return (self.folder / f"output_{number}.txt").read_text()

    def wait(self, seconds=120, which=(0, 1)):
        """Until these have ended. Returns their statuses; `ended` has the times."""
        limit = time.time() + seconds
        while any(number not in self.ended for number in which):
            self.ended |= {number: time.time() for number in which
                           if number not in self.ended and self.agents[number].poll() is not None}
            assert time.time() < limit, "\n".join(self.output(number) for number in which)
            time.sleep(0.02)
        return [self.agents[number].returncode for number in which]

    def struck_at(self, seconds=90):
        """When the process that was to be struck was. It is on the second host."""
        limit = time.time() + seconds
        while "struck" not in self.output(1):
            assert time.time() < limit, self.output(1)
            time.sleep(0.02)
        return worker.struck_at(self.output(1))


def assert_same_run(out, expected, tolerance):
    run, = run_folders(out)
    for kind in ("train_loss", "val_loss"):
        assert losses(run, kind) == pytest.approx(losses(expected, kind), rel=tolerance, abs=0)
    ours, theirs = weights(run), weights(expected)
    for name, tensor in theirs.items():
        atol = tolerance * max(1e-3, tensor.abs().max().item())
        torch.testing.assert_close(ours[name], tensor, rtol=tolerance, atol=atol, msg=name)


def test_two_hosts_are_one_with_as_many_processes(hosts, corpus, tmp_path):
    """To the last bit."""
    job = Job(hosts, tmp_path, ROOT / "train_gpt2.py", *command(corpus, base=STAGES, out=tmp_path / "logs"))
    assert job.wait() == [0, 0], job.output()
    assert job.output().count("final val_loss") == 1 and "final val_loss" not in job.output(1)
    done = torchrun(4, ROOT / "train_gpt2.py", *command(corpus, base=STAGES, out=tmp_path / "four"))
    assert done.returncode == 0, done.stderr
    four, = run_folders(tmp_path / "four")
    assert_same_run(tmp_path / "logs", four, 0)


def test_torchrun_starts_all_anew_when_a_worker_is_killed(hosts, corpus, tmp_path):
    """With the store that DETAILS.md asks for; the one that torchrun shares may hold the addresses of the dead."""
    settings = {**STAGES, "save_every": 2, "resume": "auto", "out": tmp_path / "logs"}
    words = command(corpus, base=settings)
    job = Job(hosts, tmp_path, worker.__file__, "spoiled", "3:6:SIGKILL", *words, restarts=1,
              environment=FRESH)
    assert job.wait(200) == [0, 0], job.output() + job.output(1)
    assert job.output().count("resumed after step 4") == 1
    assert_same_run(tmp_path / "logs", run_here(corpus, base=STAGES, out=tmp_path / "one"), 1e-9)


@pytest.mark.parametrize("number, timeout, limit", [("SIGKILL", 300, 35), ("SIGSTOP", 5, 45)])
def test_a_worker_that_is_killed_or_frozen_ends_the_job(hosts, corpus, tmp_path, number, timeout, limit):
    """torchrun gives a frozen one 30 seconds before it kills it."""
    words = command(corpus, base=STAGES, out=tmp_path / "logs", timeout=timeout)
    job = Job(hosts, tmp_path, worker.__file__, "spoiled", f"3:5:{number}", *words)
    struck = job.struck_at()
    assert job.wait() == [1, 1] and "connection" in job.output()
    print(number, "ended both after", [round(ended - struck, 1) for ended in job.ended.values()])
    assert max(job.ended.values()) - struck < limit


@pytest.mark.parametrize("how", ["kill", "unplug"])
def test_a_host_that_goes_away_ends_the_other_and_the_same_command_goes_on(corpus, tmp_path, how):
    """A pulled cable sends no word: then the other waits as long as --timeout says."""
    words = command(corpus, base=STAGES, out=tmp_path / "logs", timeout=8, save_every=2, resume="auto")
    with two_hosts() as hosts:
        if how == "unplug" and not hosts[0].enter:
            pytest.skip("needs network namespaces")
        job = Job(hosts, tmp_path, worker.__file__, "spoiled", "3:6:SIGSTOP", *words)
        job.struck_at()
        getattr(hosts[1], how)()
        begin = time.time()
        assert job.wait(which=[0]) == [1] and job.ended[0] - begin < 8 + 35
        print(how, "ended the other host after", round(job.ended[0] - begin, 1))
        assert "connection" in job.output()
    with two_hosts() as hosts:
        again = Job(hosts, tmp_path, ROOT / "train_gpt2.py", *words)
        assert again.wait() == [0, 0], again.output()
    assert again.output().count("resumed after step 4") == 1
    assert_same_run(tmp_path / "logs", run_here(corpus, base=STAGES, out=tmp_path / "one"), 1e-9)
