"""Two machines do what one does: the same numbers, the same command on both, and an end that says why. The machines
are network namespaces where those may be made (Linux, root, the `ip` command), else two torchruns on loopback."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tools import (
    RECIPE,
    ROOT,
    SMALL,
    losses,
    run_folders,
    run_here,
    torchrun,
    weights,
    write_corpus,
    write_shard,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds its processes in /proc")
WORKER = Path(__file__).with_name("hosts_worker.py")
# Eight steps through all stages of the hundred-second recipe, as in test_processes.py. Relative paths: each host has a
# folder of its own.
PATHS = {"train_files": "data/text_train_*.bin", "val_files": "data/text_val_*.bin", "out": "logs"}
EXACT = {**RECIPE, **PATHS, "dtype": "float64", "steps": 8, "tied_until": 0.5, "val_every": 3, "repeat": "true"}
FEW = {**SMALL, **PATHS, "val_tokens": 500}  # eight steps of a small model, for what ends before its end


class Host(NamedTuple):
    """One of the two machines."""

    mark: str  # in the environment of all its processes, by which they are found
    enter: tuple[str, ...]  # what a command begins with to run there
    address: str
    interface: str

    def processes(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"GPT2_TEST_HOST={self.mark}\0".encode() in path.read_bytes():
                    found.append(int(path.parent.name))
        return found

    def kill(self) -> None:
        """The power goes off: every process of it ends at once."""
        for number in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def unplug(self) -> None:
        """The cable is pulled: what this host sends and what is sent to it vanishes. Namespaces only."""
        subprocess.run([*self.enter, "ip", "link", "set", self.interface, "down"], check=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def two_hosts(namespaces: bool = True) -> Iterator[tuple[Host, Host]]:
    names = [f"gpt2-{os.getpid()}-{letter}" for letter in "ab"]
    try:
        try:
            if not namespaces:
                raise OSError
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "link0", "netns", names[0], "type", "veth", "peer", "name", "link0", "netns", names[1])
            for number, name in enumerate(names, 1):
                ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "link0")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", "link0", "up")
            hosts = [Host(name, ("ip", "netns", "exec", name), f"10.77.0.{number}", "link0")
                     for number, name in enumerate(names, 1)]
        except (OSError, subprocess.CalledProcessError):
            hosts = [Host(name, (), f"127.0.0.{number}", "lo") for number, name in enumerate(names, 1)]
        yield tuple(hosts)
    finally:
        for name in names:
            Host(name, (), "", "").kill()
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "delete", name)


@pytest.fixture
def hosts():
    with two_hosts() as pair:
        yield pair


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Job:
    """torchrun on both hosts with the same command, each in a folder of its own that holds the shards as data/."""

    def __init__(self, hosts, folder: Path, each: int, script, *arguments, restarts: int = 0, second=None):
        """each: processes of a host. second: arguments of the second host, where they are not the same."""
        self.hosts, self.port, self.each, self.restarts = hosts, free_port(), each, restarts
        self.folders = [folder / "host_a", folder / "host_b"]
        self.agents, self.ended = [None, None], [None, None]
        for number, words in enumerate((arguments, arguments if second is None else second)):
            if not self.folders[number].exists():
                write_corpus(self.folders[number] / "data")
            self.begin(number, script, *words)

    def begin(self, number: int, script, *arguments) -> None:
        host = self.hosts[number]
        command = [*host.enter, sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                   f"--nproc_per_node={self.each}", "--rdzv-backend=c10d", "--rdzv-id=job",
                   f"--rdzv-endpoint={self.hosts[0].address}:{self.port}", f"--rdzv-conf=is_host={int(number == 0)}",
                   f"--local-addr={host.address}", f"--max-restarts={self.restarts}", script, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GPT2_TEST_HOST": host.mark,
                       "GLOO_SOCKET_IFNAME": host.interface}
        with open(self.folders[number] / "output.txt", "a") as output:
            self.agents[number] = subprocess.Popen([*map(str, command)], env=environment, cwd=self.folders[number],
                                                   stdout=output, stderr=output, start_new_session=True)
        self.ended[number] = None

    def wait(self, seconds: float = 90, which=(0, 1)) -> list[int]:
        """Until these have ended. Returns their statuses; `ended` has the times."""
        limit = time.time() + seconds
        while any(self.ended[number] is None for number in which):
            for number in which:
                if self.ended[number] is None and self.agents[number].poll() is not None:
                    self.ended[number] = time.time()
            if time.time() > limit:
                raise AssertionError(f"still running after {seconds} s; they wrote:\n" + "\n".join(self.output()))
            time.sleep(0.02)
        return [self.agents[number].returncode for number in which]

    def output(self) -> list[str]:
        return [(folder / "output.txt").read_text() for folder in self.folders]

    def run(self) -> Path:
        """The one run folder. Process 0 is on the first host, the second has written nothing."""
        assert not (self.folders[1] / "logs").exists()
        run, = run_folders(self.folders[0] / "logs")
        return run


def options(settings: dict, **changes) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in {**settings, **changes}.items()]


class Alone:
    """Processes without torchrun, on this machine: what it would put into their environment is given by hand."""

    def __init__(self, folder: Path, world: int, *arguments):
        if not (folder / "data").exists():
            write_corpus(folder / "data")
        self.mark, port = f"gpt2-{os.getpid()}-alone", free_port()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GPT2_TEST_HOST": self.mark,
                       "GPT2_TEST_MEET": str(folder), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}
        self.files = [folder / f"output_{rank}.txt" for rank in range(world)]
        self.processes = []
        for rank, path in enumerate(self.files):
            with open(path, "w") as output:
                self.processes.append(subprocess.Popen(
                    [sys.executable, *map(str, (WORKER, *arguments))], cwd=folder, stdout=output, stderr=output,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, start_new_session=True))

    def wait(self, rank: int, seconds: float = 60) -> tuple[int, float, str]:
        """Status, time of its end, and what it wrote. All others are killed if it does not end in time."""
        try:
            status = self.processes[rank].wait(seconds)
        except subprocess.TimeoutExpired:
            Host(self.mark, (), "", "").kill()
            raise AssertionError(f"still running after {seconds} s; it wrote:\n"
                                 f"{self.files[rank].read_text()}") from None
        return status, time.time(), self.files[rank].read_text()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def alone():
    started = []

    def start(*arguments) -> Alone:
        started.append(Alone(*arguments))
        return started[-1]
    yield start
    for processes in started:
        processes.end()


def unbroken(folder: Path, settings: dict) -> Path:
    """The run of one process, uninterrupted."""
    corpus = write_corpus(folder / "one" / "data")
    return run_here(corpus, base={**settings, "train_files": corpus / "text_train_*.bin",
                                  "val_files": corpus / "text_val_*.bin", "out": folder / "one" / "logs"},
                    out=folder / "one" / "logs")


def assert_same_run(run: Path, expected: Path, exactly: bool = False) -> None:
    """Every loss and every parameter: to the last bit, or within 1e-9."""
    tolerance = 0 if exactly else 1e-9
    for kind in ("train_loss", "val_loss"):
        assert losses(run, kind) == pytest.approx(losses(expected, kind), rel=tolerance, abs=0)
    ours, theirs = weights(run), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=tolerance, atol=tolerance * tensor.abs().max().item(),
                                   msg=name)


def lines_with(text: str, *parts: str) -> list[str]:
    return [line for line in text.splitlines() if all(part in line for part in parts)]


def test_two_hosts_do_what_one_process_does_though_a_worker_is_killed(hosts, tmp_path):
    """torchrun starts all anew, they go on from the checkpoint that only the first host has."""
    job = Job(hosts, tmp_path, 2, WORKER, "trouble", "3:5:SIGKILL", tmp_path / "note",
              *options(EXACT, save_every=2, resume="auto"), restarts=1)
    assert job.wait() == [0, 0], "\n".join(job.output())
    first, second = job.output()
    assert len(lines_with(first, "resumed after step 4")) == 1 and first.count("final val_loss") == 1
    assert "val_loss" not in second
    assert_same_run(job.run(), unbroken(tmp_path, EXACT))


def test_processes_that_disagree_are_refused_on_one_line(hosts, tmp_path):
    """By both hosts alike; what only one of them can see, that one says, and the other that it has gone."""
    script = Path(shutil.copy(ROOT / "train_gpt2.py", tmp_path / "other.py"))
    script.write_text(script.read_text() + "# another version\n")
    for host in ("host_a", "host_b"):
        write_corpus(tmp_path / host / "data")
        for kind in ("content", "count", "missing"):
            shards = write_corpus(tmp_path / host / kind)
            path = shards / "text_train_000001.bin"
            tokens = torch.arange(4000).numpy() % 250
            if kind != "missing" and host == "host_b":
                tokens[7:] += 1
            if kind == "count" and host == "host_b":
                tokens = tokens[:-1]
            write_shard(path, tokens, 257, 256)
    for path in (tmp_path / "host_b" / "missing").glob("text_val_*.bin"):
        path.unlink()
    same, real = options(FEW), str(ROOT / "train_gpt2.py")
    others = [options(FEW, train_files=f"{kind}/text_train_*.bin", val_files=f"{kind}/text_val_*.bin")
              for kind in ("content", "count", "missing")]
    jobs = {0: [(real, same), (real, same), *((real, other) for other in others)],
            1: [(real, options(FEW, seed=7)), (str(script), same), *((real, other) for other in others)]}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    job = Job(hosts, tmp_path, 1, WORKER, "agree", tmp_path / "jobs.json")
    assert job.wait() == [1, 1]
    for rank, text in enumerate(job.output()):
        found = [line.removeprefix(f"process {rank}: ") for line in lines_with(text, f"process {rank}: ")]
        assert len(found) == 4, text
        for line, parts in zip(found, (("seed", "7", "0"), ("script",), ("text_train_000001.bin", "4000"),
                                       ("text_train_000001.bin", "4000", "3999")), strict=True):
            assert all(part in line for part in ("process 1", "process 0", *parts)), line
    first, second = job.output()
    assert len(lines_with(second, "missing/text_val_*.bin")) == 1
    assert len(lines_with(first, "connection", "lost")) == 1
    assert not any((folder / "logs").exists() for folder in job.folders)


def test_without_torchrun_the_others_say_that_one_was_killed(alone, tmp_path):
    """Process 0 is killed, which holds the store that the processes found each other by."""
    processes = alone(tmp_path, 2, "trouble", "0:3:SIGKILL", tmp_path / "note", *options(FEW))
    status, ended, text = processes.wait(1)
    assert status == 1 and "Traceback" not in text
    assert len(lines_with(text, "connection", "lost")) == 1
    seconds = ended - float((tmp_path / "note").read_text())
    assert seconds < 10
    print(f"from its death to the other's end {seconds:.1f} s")


def test_without_torchrun_a_frozen_process_is_waited_for_as_long_as_patience_says(alone, tmp_path):
    processes = alone(tmp_path, 2, "trouble", "1:3:SIGSTOP", tmp_path / "note", *options(FEW, patience=3))
    status, ended, text = processes.wait(0, 30)
    assert status == 1 and "Traceback" not in text
    assert len(lines_with(text, "connection", "--patience")) == 1
    seconds = ended - float((tmp_path / "note").read_text())
    assert 2.5 < seconds < 13
    run, = run_folders(tmp_path / "logs")
    last = (run / "log.txt").read_text().splitlines()[-1]
    assert last.startswith("ended:") and "--patience" in last and "--save-every" in last


def test_slow_warm_ups_and_slow_disks_are_waited_for_beyond_patience(alone, tmp_path):
    processes = alone(tmp_path, 2, "warm", "1:3.5", tmp_path / "note", 3, *options(FEW, patience=2, save_every=4))
    for rank in (1, 0):
        status, _, text = processes.wait(rank)
        assert status == 0, text
    assert float(lines_with(text, "warm after")[0].split()[-2]) > 3.4
    assert float(lines_with(text, "checkpoint_0000004.pt written")[0].split()[-2]) >= 3
    run, = run_folders(tmp_path / "logs")
    assert (run / "model.pt").exists()


def test_a_process_that_dies_in_the_warm_up_takes_the_others_down(alone, tmp_path):
    processes = alone(tmp_path, 2, "warm", "1:SIGKILL", tmp_path / "note", 0, *options(FEW))
    status, ended, text = processes.wait(0, 30)
    assert status == 1 and len(lines_with(text, "connection", "lost")) == 1
    assert "Traceback" not in text and "warm after" not in text
    assert ended - float((tmp_path / "note").read_text()) < 10


@pytest.mark.slow
@pytest.mark.parametrize("namespaces", [True, False], ids=["namespaces", "loopback"])
def test_two_hosts_equal_one_with_as_many_processes_to_the_last_bit(tmp_path, namespaces):
    with two_hosts(namespaces) as hosts:
        job = Job(hosts, tmp_path, 2, ROOT / "train_gpt2.py", *options(EXACT))
        assert job.wait() == [0, 0], "\n".join(job.output())
    corpus = write_corpus(tmp_path / "four" / "data").parent
    done = torchrun(4, ROOT / "train_gpt2.py", *options(EXACT), cwd=corpus)
    assert done.returncode == 0, done.stderr
    four, = run_folders(corpus / "logs")
    assert_same_run(job.run(), four, exactly=True)
    assert_same_run(job.run(), unbroken(tmp_path, EXACT))


@pytest.mark.slow
@pytest.mark.parametrize("plan, patience, limit", [("3:5:SIGKILL", 300, 35), ("0:5:SIGKILL", 300, 35),
                                                   ("3:5:SIGSTOP", 5, 45)])
def test_how_soon_a_job_of_two_hosts_ends(hosts, tmp_path, plan, patience, limit):
    """After a worker was killed, or frozen: torchrun gives that one 30 seconds to end before it kills it."""
    job = Job(hosts, tmp_path, 2, WORKER, "trouble", plan, tmp_path / "note", *options(EXACT, patience=patience))
    statuses = job.wait(120)
    seconds = [ended - float((tmp_path / "note").read_text()) for ended in job.ended]
    print(f"{plan} with --patience {patience}: both ended after {seconds[0]:.1f} and {seconds[1]:.1f} s")
    assert statuses == [1, 1] and max(seconds) < limit
    assert lines_with("\n".join(job.output()), "connection", "--patience")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "unplug"])
def test_a_host_that_goes_away_ends_the_other_and_the_same_command_goes_on(tmp_path, how):
    """Its power fails, or its cable is pulled, which sends no word: then the other waits as long as --patience says."""
    with two_hosts() as hosts:
        if how == "unplug" and not hosts[0].enter:
            pytest.skip("needs network namespaces")
        words = (WORKER, "trouble", "3:5:SIGSTOP", tmp_path / "note",
                 *options(EXACT, patience=8, save_every=2, resume="auto"))
        job = Job(hosts, tmp_path, 2, *words, restarts=0)
        limit = time.time() + 60
        while not (tmp_path / "note").exists():
            assert time.time() < limit
            time.sleep(0.02)
        hosts[1].unplug() if how == "unplug" else hosts[1].kill()
        begin = time.time()
        status, = job.wait(90, which=[0])
        print(f"{how}: the other host ended after {job.ended[0] - begin:.1f} s")
        assert status == 1 and job.ended[0] - begin < 8 + 35
        assert lines_with(job.output()[0], "connection", "lost")
        hosts[1].kill()
        job.wait(10)
    with two_hosts() as hosts:
        again = Job(hosts, tmp_path, 2, *words)
        assert again.wait() == [0, 0], "\n".join(again.output())
    assert len(lines_with(again.output()[0], "resumed after step 4")) == 1
    assert_same_run(again.run(), unbroken(tmp_path, EXACT))


@pytest.mark.slow
def test_an_option_that_only_the_second_host_has_is_refused_under_torchrun(hosts, tmp_path):
    job = Job(hosts, tmp_path, 1, ROOT / "train_gpt2.py", *options(FEW), second=options(FEW, seed=7))
    begin = time.time()
    assert job.wait() == [1, 1]
    print(f"refused on both hosts after {max(job.ended) - begin:.1f} s")
    assert len(lines_with(job.output()[0], "setting seed is 7 in process 1", "0", "process 0")) == 1
