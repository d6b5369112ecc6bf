"""What test_hosts.py starts on its two hosts: hosts_worker.py TASK ARGUMENTS. Some run without torchrun."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # before there is a process group, as in worker.py

import train_gpt2


def strike(number: str, note: str) -> None:
    """Send this process a signal, once for all that share the file `note`, which then holds the time."""
    try:
        with open(note, "x") as file:
            file.write(str(time.time()))
    except FileExistsError:
        return
    os.kill(os.getpid(), getattr(signal, number))


def trouble(plan: str, note: str, *arguments: str) -> None:
    """Train; "RANK:STEP:SIGNAL" has one process send itself a signal before a step, once."""
    rank, step, number = plan.split(":")
    step_of = train_gpt2.train_step

    def struck_step(model, groups, batch, at, *more):
        if os.environ["RANK"] == rank and at == int(step):
            strike(number, note)
        return step_of(model, groups, batch, at, *more)

    train_gpt2.train_step = struck_step
    train_gpt2.main(list(arguments))


def agree(jobs: str) -> None:
    """A file of command lines, by the number of the process, each with the script it is to pass for. All are trained
    in one process group. What ends each of them is printed; the last one goes through `main`."""
    *several, (script, last) = json.loads(Path(jobs).read_text())[os.environ["RANK"]]
    processes = train_gpt2.start_processes(train_gpt2.parse_command_line(last))
    for train_gpt2.__file__, arguments in several:
        try:
            train_gpt2.train(train_gpt2.parse_command_line(arguments), processes)
        except train_gpt2.Refusal as refusal:
            print(f"process {processes.rank}: {refusal.code}", flush=True)
    train_gpt2.__file__, train_gpt2.start_processes = script, lambda config: processes
    train_gpt2.main(last)


def warm(plan: str, note: str, seconds: str, *arguments: str) -> None:
    """Train after a warm-up, as where the model is compiled. "RANK:SECONDS" has one process take that long in it,
    "RANK:SIGNAL" has it send itself a signal there, once. A checkpoint takes `seconds` to write."""
    rank, what = plan.split(":")
    loop, save = train_gpt2.training_loop, train_gpt2.save_model

    def warmed(model, groups, streams, processes, log, resumed):
        def batch_of(step: int):
            if processes.rank == int(rank) and step == 0:
                time.sleep(float(what)) if what[0].isdigit() else strike(what, note)
            return next(train_gpt2.step_batches(streams[0], model.config, processes, step))

        taken = train_gpt2.warm_up(model, groups, processes, batch_of, lambda step: None)
        torch.compiler.set_stance("default")
        log.line(f"warm after {taken:.2f} s")
        return loop(model, groups, streams, processes, log, resumed)

    def slowly(path, *more, **values) -> None:
        begin = time.monotonic()
        if path.name.startswith("checkpoint"):
            time.sleep(float(seconds))
        save(path, *more, **values)
        print(f"{path.name} written in {time.monotonic() - begin:.2f} s", flush=True)

    train_gpt2.training_loop, train_gpt2.save_model = warmed, slowly
    train_gpt2.main(list(arguments))


def meet(folder: str) -> None:
    """Wait for the other processes, so that a short --patience is not used up while they start."""
    Path(folder, f"here_{os.environ['RANK']}").touch()
    while len(list(Path(folder).glob("here_*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.02)


if __name__ == "__main__":
    if "GPT2_TEST_MEET" in os.environ:
        meet(os.environ["GPT2_TEST_MEET"])
    {"trouble": trouble, "agree": agree, "warm": warm}[sys.argv[1]](*sys.argv[2:])
