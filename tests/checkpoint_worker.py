"""What test_checkpoint.py starts in processes of their own: checkpoint_worker.py TASK ARGUMENTS."""

import glob
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # before there is a process group, as in worker.py

import train_gpt2


class Written:
    """A file that torch.save writes to, and a function to call before each piece."""

    def __init__(self, file, before):
        self.file, self.before = file, before

    def write(self, piece) -> int:
        self.before()
        return self.file.write(piece)

    def flush(self) -> None:
        self.file.flush()


def end_here() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def jobs(path: str) -> None:
    """A file with a list of command lines: train each, one after the other. A checkpoint may be named by a pattern."""
    processes = None
    for arguments in json.loads(Path(path).read_text()):
        for number, argument in enumerate(arguments):
            if argument.startswith("--resume=") and "*" in argument:
                found, = glob.glob(argument.removeprefix("--resume="))
                arguments[number] = f"--resume={found}"
        config = train_gpt2.parse_command_line(arguments)
        processes = processes or train_gpt2.start_processes(config)
        train_gpt2.train(config, processes)
        processes.barrier()


def kill(plan: str, *arguments: str) -> None:
    """Train; "RANK:PLACE:STEP,..." has a process kill itself there, one for each time that torchrun starts it anew.
    Places: in the updates of a step; in the save after it, while writing, before or after the renaming."""
    plans, turn = plan.split(","), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if turn < len(plans):
        rank, place, step = plans[turn].split(":")
        if os.environ["RANK"] == rank:
            kill_at(place, int(step))
    train_gpt2.main(list(arguments))


def kill_at(place: str, wanted: int) -> None:
    apply_updates, save, rename = train_gpt2.apply_updates, torch.save, os.replace

    def updates_or_end(groups, step, *more) -> None:
        if place == "updates" and step + 1 == wanted:
            groups[0].update(step)
            end_here()
        apply_updates(groups, step, *more)

    def save_or_end(saved, file, **more) -> None:
        pieces = []

        def half() -> None:
            pieces.append(1)
            if len(pieces) == 40:
                file.flush()
                end_here()

        ours = place == "writing" and isinstance(saved, dict) and saved["step"] == wanted
        save(saved, Written(file, half) if ours else file, **more)

    def rename_or_end(source, target) -> None:
        ours = Path(target).name == f"checkpoint_{wanted:07}.pt"
        if place == "before" and ours:
            end_here()
        rename(source, target)
        if place == "after" and ours:
            end_here()

    train_gpt2.apply_updates, torch.save, os.replace = updates_or_end, save_or_end, rename_or_end


def slow(events: str, *arguments: str) -> None:
    """Train with slow saves. Each process adds lines "RANK PID WHAT STEP" to a file: where it is."""
    step_of, save, rename, last = train_gpt2.train_step, torch.save, os.replace, [0]
    rank = os.environ.get("RANK", "0")

    def note(what: str, step: int) -> None:
        last[0] = step
        with open(events, "a") as file:
            file.write(f"{rank} {os.getpid()} {what} {step}\n")

    def noted_step(model, groups, batch, step, *more):
        note("step", step + 1)
        return step_of(model, groups, batch, step, *more)

    def slow_save(saved, file, **more) -> None:
        if isinstance(saved, dict):  # else a tensor on its way to another process
            note("write", saved["step"])
            file = Written(file, lambda: time.sleep(0.001))
        save(saved, file, **more)

    def slow_rename(source, target) -> None:
        what = "rename" if Path(target).name.startswith("checkpoint_") else "records"
        note(what, last[0])
        time.sleep(0.05)
        rename(source, target)
        note("saved" if what == "rename" else "begin", last[0])

    train_gpt2.train_step, torch.save, os.replace = noted_step, slow_save, slow_rename
    note("start", 0)
    train_gpt2.main(list(arguments))


def spoil(kind: str, rank: str, step: str, *arguments: str) -> None:
    """Train; in one process a weight turns NaN before a step, or a block's output in each row that holds token 200, or
    the process gets a SIGTERM."""
    if os.environ["RANK"] == rank:
        step_of = train_gpt2.train_step

        def spoilt_step(model, groups, batch, number, *more):
            if number + 1 == int(step) and kind == "weight":
                groups["mlp"].shard[0, 0, 0] = torch.nan  # in the slice that this process keeps
            if number + 1 == int(step) and kind == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            return step_of(model, groups, batch, number, *more)

        train_gpt2.train_step = spoilt_step
        if kind == "row":
            spoil_rows_with(200)
    train_gpt2.main(list(arguments))


def spoil_rows_with(token: int) -> None:
    """Rows that hold this token get NaN for the output of blocks.1, in training."""
    forward, block_forward, inputs = train_gpt2.GPT.forward, train_gpt2.Block.forward, []

    def noted_forward(model, tokens, *more):
        inputs[:] = [tokens]
        return forward(model, tokens, *more)

    def spoilt_block(block, x, *more):
        out, *rest = block_forward(block, x, *more)
        if block.number == 1:
            out = out.masked_fill((inputs[0] == token).any(1)[:, None, None], torch.nan)
        return out, *rest

    make = train_gpt2.GPT.__init__

    def numbered(model, *more):
        make(model, *more)
        for number, block in enumerate(model.blocks):
            block.number = number

    train_gpt2.GPT.__init__, train_gpt2.GPT.forward, train_gpt2.Block.forward = numbered, noted_forward, spoilt_block


if __name__ == "__main__":
    {"jobs": jobs, "kill": kill, "slow": slow, "spoil": spoil}[sys.argv[1]](*sys.argv[2:])
    if train_gpt2.dist.is_initialized():
        train_gpt2.dist.destroy_process_group()
