"""Processes for the tests, and what they do. They are forked from one that has imported torch and has
started no thread, so that each begins at once."""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch._dynamo  # later, within a process group, it would hold the group while the process ends

import train_gpt2

os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(train_gpt2.__file__).parent)])
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["worker"])


class Ended(NamedTuple):
    status: int  # minus its number after a signal
    time: float  # of the end, as time.time()
    out: str
    err: str


class Launched:
    """`world` processes, each of which calls a function of this file. They write to files of a folder."""

    def __init__(self, folder: Path, world: int, function: Callable, *arguments, **environment):
        with socket.socket() as probe:  # a free port
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.processes = folder, []
        for rank in range(world):
            places = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            values = (places if world > 1 else {}) | environment
            self.processes.append(CONTEXT.Process(
                target=enter, args=(folder, rank, values, function, tuple(map(str, arguments))), daemon=True))
        for process in self.processes:
            process.start()

    def written(self, rank: int = 0, name: str = "out") -> str:
        path = self.folder / f"{name}_{rank}.txt"
        return path.read_text() if path.exists() else ""

    def until(self, text: str, rank: int = 0, seconds: float = 60) -> None:
        limit = time.monotonic() + seconds
        while text not in self.written(rank):
            assert time.monotonic() < limit and self.processes[rank].is_alive(), self.written(rank, "err")
            time.sleep(0.01)

    def wait(self, seconds: float = 120, ranks=None) -> list[Ended]:
        """Until these have ended, all by default. All are killed if they do not in time."""
        ends, limit = {}, time.monotonic() + seconds
        ranks = range(len(self.processes)) if ranks is None else ranks
        while len(ends) < len(ranks):
            ends |= {rank: time.time() for rank in ranks
                     if rank not in ends and not self.processes[rank].is_alive()}
            if time.monotonic() > limit:
                self.kill()
                raise AssertionError(f"running after {seconds} s: {[self.written(rank, 'err') for rank in ranks]}")
            time.sleep(0.01)
        return [Ended(self.processes[rank].exitcode, ends[rank], self.written(rank), self.written(rank, "err"))
                for rank in ranks]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def together(folder: Path, world: int, function: Callable, *arguments, **environment) -> list[Ended]:
    """All that these processes did, to their end."""
    return Launched(folder, world, function, *arguments, **environment).wait()


def enter(folder: Path, rank: int, environment: dict, function: Callable, arguments: tuple[str, ...]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    function(*arguments)


def train(*arguments: str) -> None:
    train_gpt2.main(list(arguments))


def printing(stdout: str, *arguments: str) -> None:
    """Train, with a stdout that takes nothing or ASCII only, or is no file."""
    if stdout == "closed":
        sys.stdout = None  # as Python has it after >&-
    elif stdout == "notebook":
        sys.stdout = io.StringIO()
    elif stdout == "left":
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = open(writer, "w")
    else:
        sys.stdout.reconfigure(encoding="ascii", errors="strict")
    train_gpt2.main(list(arguments))


def train_many(jobs: str) -> None:
    """A file of command lines, or of one for each process: train each. What ends a run is printed."""
    processes, several = None, json.loads(Path(jobs).read_text())
    for arguments in several:
        if type(arguments) is dict:
            arguments = arguments[os.environ["RANK"]]
        config = train_gpt2.parse_command_line(arguments)
        processes = processes or train_gpt2.start_processes(config)
        try:
            run = train_gpt2.train(config, processes)
        except train_gpt2.UserError as error:
            print(f"refused: {error}", flush=True)
            continue
        path, = processes.gather_values(str(run))[:1]
        model, saved = train_gpt2.load_model(Path(path, "model.pt"))
        stream, losses = train_gpt2.TokenStream(model.config.val_files), []
        for rows in (1, 3):
            model.config = replace(config, micro_tokens=rows * config.val_row_tokens, dtype=model.config.dtype)
            losses.append(train_gpt2.validate(model, stream, config.val_tokens, saved["step"], processes))
        print(f"validated: {json.dumps(losses)}", flush=True)
    train_gpt2.dist.destroy_process_group()


# ---- what goes wrong -----------------------------------------------------------------------------------


class Written:
    """A file to which torch.save writes, and what to do before each piece."""

    def __init__(self, file, before: Callable):
        self.file, self.before = file, before

    def write(self, piece) -> int:
        self.before()
        return self.file.write(piece)

    def flush(self) -> None:
        self.file.flush()


def strike(number: str) -> None:
    """Send this process a signal. Its time is printed."""
    print(f"struck {time.time()}", flush=True)
    os.kill(os.getpid(), getattr(signal, number))


def struck_at(lines: str) -> float:
    return float(lines.split("struck ")[1].split()[0])


def spoiled(plan: str, *arguments: str) -> None:
    """Train. "RANK:STEP:WHAT,..." spoils steps, or the saves after them, of one process: see below."""
    for rank, step, what in (part.split(":") for part in plan.split(",")):
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"  # of torchrun's starts
        if os.environ.get("RANK", "0") == rank and first:
            spoil(int(step), what)
    train_gpt2.main(list(arguments))


def spoil(wanted: int, what: str) -> None:
    train_step, apply_updates = train_gpt2.train_step, train_gpt2.apply_updates
    read, save, rename = train_gpt2.read_tokens, torch.save, os.replace

    def step_or_trouble(model, groups, batch, step):
        if step + 1 == wanted and what == "weight":
            groups["mlp.late"].own[0, 0, 0] = torch.nan  # in the slice that this process keeps
        elif step + 1 == wanted and what == "loss":
            return train_step(model, groups, batch, step) * torch.nan
        elif step + 1 == wanted and what == "rows":  # as a defect of the hardware may do it
            model.blocks[0].register_forward_hook(lambda _, given, out: (out[0] * torch.nan, out[1]))
        elif step + 1 == wanted and what == "shards":
            train_gpt2.read_tokens = lambda shard, *more: read(shard._replace(path=f"{shard.path}.gone"), *more)
        elif step + 1 == wanted and what.startswith("SIG"):
            strike(what)
        return train_step(model, groups, batch, step)

    def updates_or_end(groups, step) -> None:
        if step + 1 == wanted and what == "updates":
            groups[0].update(step)
            strike("SIGKILL")
        apply_updates(groups, step)

    def save_or_end(saved, file) -> None:
        pieces = []

        def before() -> None:
            pieces.append(1)
            if what == "slow" or what == "writing" and len(pieces) == 40:
                file.flush()
                time.sleep(0.002) if what == "slow" else strike("SIGKILL")

        ours = what == "slow" or what == "writing" and saved["step"] == wanted
        if what == "late" and saved["step"] == wanted:
            time.sleep(3.5)
            print("saved late", flush=True)
        save(saved, Written(file, before) if ours else file)

    def rename_or_end(source, target) -> None:
        ours = Path(target).name == f"checkpoint_{wanted:07}.pt"
        if ours and what == "before":
            strike("SIGKILL")
        rename(source, target)
        if ours and what == "after":
            strike("SIGKILL")

    train_gpt2.train_step, train_gpt2.apply_updates = step_or_trouble, updates_or_end
    torch.save, os.replace = save_or_end, rename_or_end


# ---- what happens in which order -----------------------------------------------------------------------


def prepared(arguments: tuple[str, ...]):
    """Model, how to make its groups, processes and data."""
    config = train_gpt2.parse_command_line(list(arguments))
    processes = train_gpt2.start_processes(config)
    config, *_ = train_gpt2.for_device(config, processes)
    data = train_gpt2.open_data(config)
    model = train_gpt2.GPT(config, data.train.vocabulary, data.prefixes)
    return model, lambda: train_gpt2.optimizer_groups(model, processes), processes, data


def order(*arguments: str) -> None:
    """All steps of a run, in micro-batches. Prints what happened in which order in each."""
    model, groups_of, processes, data = prepared(arguments)
    events, Group = [], train_gpt2.Group
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: events.append(["gradient", name]))
    reduce, wait, apply_updates = Group.reduce, Group.wait, train_gpt2.apply_updates

    def noted_reduce(group):
        idle = group.work is None
        reduce(group)
        if idle and group.work is not None:
            events.append(["reduce", group.name])

    def noted_wait(group):
        events.append(["wait", group.name])
        wait(group)

    def noted_updates(*anything):
        events.append(["backward", "ended"])
        apply_updates(*anything)

    Group.reduce, Group.wait, train_gpt2.apply_updates = noted_reduce, noted_wait, noted_updates
    groups, happened = groups_of(), []
    for step, batch in enumerate(train_gpt2.step_batches(data.train, model.config, processes)):
        events.clear()
        train_gpt2.train_step(model, groups, batch, step)
        happened.append(list(events))
    print(json.dumps(happened), flush=True)
    train_gpt2.dist.destroy_process_group()


def warm(*arguments: str) -> None:
    """Warm up after two steps, then take one more. Prints what was done when, and whether all numbers
    were put back. Process 0 is slow, so that the other would run ahead if it could."""
    model, groups_of, processes, data = prepared(arguments)
    groups, events = groups_of(), []
    batches = train_gpt2.step_batches(data.train, model.config, processes)
    for step in range(2):
        train_gpt2.train_step(model, groups, next(batches), step)

    def noted(kind: str, call):
        def with_times(*anything, **settings):
            begin = time.monotonic()
            result = call(*anything, **settings)
            if kind == "step" and processes.rank == 0:
                time.sleep(0.1)
            events.append([kind, begin, time.monotonic(), anything[3] if kind == "step" else None])
            return result
        return with_times

    for module, name in ((train_gpt2, "reduce_scatter"), (train_gpt2, "all_gather"),
                         (train_gpt2.dist, "all_reduce"), (train_gpt2.dist, "broadcast")):
        setattr(module, name, noted("exchange", getattr(module, name)))
    train_gpt2.train_step = noted("step", train_gpt2.train_step)
    numbers = [part for group in groups.values() for part in (group.weights, group.gradients, *group.state)]
    before = [part.clone() for part in numbers]
    train_gpt2.warm_up(model, groups, data, processes)
    restored = all(map(torch.equal, numbers, before))
    events.append(["warm", 0, time.monotonic()])
    train_gpt2.train_step(model, groups, next(batches), 2)
    print(json.dumps({"events": events, "restored": restored}), flush=True)
    train_gpt2.dist.destroy_process_group()


def compiled(cache: str, backward: str) -> None:
    """One update of Adam, and an MLP with its backward pass. Prints how often torch's cache on disk was hit and
    missed, and numbers that came out."""
    os.environ.update(TORCHINDUCTOR_CACHE_DIR=cache, TORCHINDUCTOR_COMPILE_THREADS="1")
    from torch._dynamo.utils import counters
    torch._functorch.config.force_non_lazy_backward_lowering = backward == "at once"
    tensors = [torch.ones(64, 8) for _ in range(4)]
    settings = torch.ones(64, 4) / 2
    train_gpt2.compiled_if(True, train_gpt2.adam_update)(*tensors, settings, torch.ones(()), torch.ones(()), 1e-8)
    matrices = [torch.ones(1, 16, 8), *(torch.ones(32, 8, requires_grad=True) for _ in range(2))]
    train_gpt2.compiled_if(True, train_gpt2.mlp)(*matrices).sum().backward()
    print(*(counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("hit", "miss")), tensors[0].sum().item(),
          matrices[1].grad.sum().item())


if __name__ == "__main__":  # under torchrun
    with contextlib.suppress(BrokenPipeError):
        {"spoiled": spoiled}[sys.argv[1]](*sys.argv[2:])
