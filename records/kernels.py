"""Where the time of a training step goes on the device, by kind of kernel.

    python records/kernels.py --preset gpt2 --stage 2               # on a GPU
    python records/kernels.py --preset tiny                         # on a CPU: operators in place of kernels

Options are those of train_gpt2.py, --stage N (default 2, the last before the extension) and --trace FILE (for
ui.perfetto.dev). Rows come from --train-files where these exist, else they are made up. Four steps compile;
then torch.profiler sees two periods of Adam, of which the second counts: by then the host has run ahead, as in
training. Times are per step. Idle is the part between the first and the last kernel that is in none.
"""

import argparse
import os
import re
import sys
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import timing

import train_gpt2

COMPILING = 4  # steps before the profiler
MARKED = ((train_gpt2.ChunkedLoss, "apply", "loss"), (train_gpt2, "apply_updates", "optimizer"))
MARKS = ("steps that count", "loss", "optimizer")  # the profiler draws them on the device's own row, too
COPIES = "^Memcpy|^Memset|FillFunctor|copy_kernel|aten::(copy_|fill_|zero_)$"
KINDS = {  # the first that a name matches, case and all; products of the loss are products
    "attention": "flex_attention|scaled_dot_product|flash",
    "matrix products": "nvjet|gemm|cutlass|splitK|aten::(mm|bmm|addmm|baddbmm|_scaled_mm)$",
    "copies and fills": COPIES,
    "communication": "nccl",
    "tables": "add_rows|embedding|ndex|gather|scatter|[sS]ort|grad_weight|krn_|unique|scan_|cummax"}


def kind_of(name: str, marks: set[str]) -> str:
    """Of a kernel that runs inside these marks."""
    if "optimizer" in marks:
        return "optimizer"
    kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), None)
    if "loss" in marks and kind != "matrix products":
        return "loss"
    return kind or "norms and other pointwise"


def summary(events: list, steps: int) -> tuple[list[tuple[str, float, float, float]], float]:
    """(kind or kernel, ms per step, share, calls per step), and the idle share, of profiler events."""
    gpu = [event for event in events if event.device_type == DeviceType.CUDA]
    events = gpu or [event for event in events if event.device_type == DeviceType.CPU]
    spans = {mark: [e.time_range for e in events if e.name == mark] for mark in MARKS}
    counted, times, calls, busy, end = spans[MARKS[0]][0], Counter(), Counter(), 0.0, 0.0
    run = [e for e in events if e.name not in MARKS and counted.start <= e.time_range.start < counted.end]
    kernels = [e.time_range for e in run if not re.search(COPIES, e.name)]  # a prefetch may run before
    begin, last = min(t.start for t in kernels), max(t.end for t in kernels)
    for event in sorted(run, key=lambda e: e.time_range.start):
        at = event.time_range
        marks = {mark for mark in MARKS for span in spans[mark] if span.start <= at.start < span.end}
        own = at.elapsed_us() if gpu else event.self_cpu_time_total  # operators without those they call
        for name in (kind_of(event.name, marks), f"  {event.name[:70]}"):
            times[name] += own / 1000 / steps
            calls[name] += 1 / steps
        busy += max(0.0, min(at.end, last) - max(at.start, begin, end))
        end = max(end, at.end)
    whole = sum(time for name, time in times.items() if name[0] != " ")
    ranked = times.most_common()
    names = [pair[0] for pair in ranked if pair[0][0] != " "] + [pair[0] for pair in ranked if pair[0][0] == " "][:10]
    return [(name, times[name], times[name] / whole, calls[name]) for name in names], 1 - busy / (last - begin)


def recorded(config: train_gpt2.Config, stage: int, processes: train_gpt2.Processes) -> tuple[profile, int]:
    """The profile, and how many of its steps count. Raises UserError."""
    config, float8, compiled = train_gpt2.for_device(config, processes)
    config = train_gpt2.checked_kernels(config, processes, compiled, SimpleNamespace(line=print))
    stretch = next((part for part in timing.stretches(config) if stage in part.stages), None)
    if stretch is None:
        raise train_gpt2.UserError(f"--stage {stage} has no step in a run of --steps {config.steps}")
    period = config.adam_every
    steps = stretch.steps(COMPILING + 2 * period, period)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (processes.device.type == "cuda")]
    with tempfile.TemporaryDirectory() as folder:
        stream, prefixes, rows = timing.open_rows(config, folder)
        print(f"{rows}; --preset {config.preset}, stage {stretch.name}, {processes.device.type}, {config.dtype}")
        model = train_gpt2.GPT(config, stream.vocabulary, prefixes, float8, compiled).to(processes.device)
        groups = train_gpt2.optimizer_groups(model, processes)
        batches = timing.stretch_batches(stream, config, stretch.stages[0], len(steps), processes)

        def run(some: list[int]) -> None:
            for step in some:
                train_gpt2.train_step(model, groups, next(batches), step)

        with closing(batches), timing.watched(record_function, MARKED):
            run(steps[:COMPILING])
            processes.synchronize()
            with profile(activities=activities) as seen:
                run(steps[COMPILING:-period])
                with record_function(MARKS[0]):
                    run(steps[-period:])
                processes.synchronize()
    return seen, period


def main(arguments: list[str] | None = None) -> list:
    """The command line. Returns the rows."""
    parser = train_gpt2.Parser(usage="python records/kernels.py [OPTIONS] [OPTIONS of train_gpt2.py]",
                               description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                               allow_abbrev=False)
    parser.add_argument("--stage", type=int, default=2, metavar="N")
    parser.add_argument("--trace", metavar="FILE")
    options, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    config = train_gpt2.parse_command_line(rest)
    try:
        open(options.trace or os.devnull, "a").close()  # the profiler would fail without a word, and at the end
    except OSError as error:
        parser.error(f"--trace {options.trace} cannot be written: {error.strerror}")
    seen, counted = recorded(config, options.stage, train_gpt2.start_processes(config))
    rows, idle = summary(seen.events(), counted)
    print(timing.aligned([["kind, then the ten costliest", "ms/step", "share", "calls/step"], *(
        [name, f"{time:.3f}", f"{100 * share:.1f} %", f"{calls:g}"] for name, time, share, calls in rows)]))
    print(f"idle between the first and the last: {100 * idle:.1f} %")
    if options.trace:
        seen.export_chrome_trace(options.trace)
    return rows


if __name__ == "__main__":
    main()
