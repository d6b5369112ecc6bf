"""Tests import the script from the repository root. Those marked slow or gpu run only when asked for, with
`-m slow` or `-m gpu`."""

import os
import signal
import sys
from pathlib import Path

import pytest

# Before torch is imported: the models are small, more threads only slow them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",  # of a cluster
             "HF_HUB_OFFLINE", "HF_ENDPOINT", "PYTHONIOENCODING"):
    os.environ.pop(name, None)
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs that ignore it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


import torch
from tools import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of small shards, for the files that need no others."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def fresh_compiler():
    """Compilers know nothing of earlier tests, and what a test sets them to ends with it."""
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = limits
    torch._dynamo.reset()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than some 20 seconds; runs only with -m slow")
    config.addinivalue_line("markers", "gpu: needs a GPU; runs only with -m gpu")


def pytest_collection_modifyitems(config, items):
    if config.getoption("markexpr"):
        return
    left_out = [item for item in items if item.get_closest_marker("slow") or item.get_closest_marker("gpu")]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
