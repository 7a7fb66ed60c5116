"""Fixtures: every backend and instruction set; small models, and a process that runs commands on them under faults."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings
from selection import COMPILED, use

from ires_kernels.files import trust

if TYPE_CHECKING:
    from faults import Warm

# The same examples in every run; the environment a backend fixture sets may serve all examples of a test.
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")

# The key of the tests is none of the user's: every process that they start has this state directory.
_STATE = tempfile.mkdtemp(prefix="ires-tests-state-")
atexit.register(shutil.rmtree, _STATE, ignore_errors=True)
os.environ["XDG_STATE_HOME"] = _STATE
os.environ.pop("IRES_KEY", None)
os.environ.pop("COLUMNS", None)  # lines are as long as what they say, where no terminal or test asks for less
os.unsetenv("COLUMNS")  # which pytest has loaded readline for, whose C code tells children of 80
os.environ["HF_HUB_OFFLINE"] = "1"  # a path that leads nowhere may be a name on the Hub
trust.sign("tests", b"")  # made now, and not among the calls that a test counts

# What is started behind `&` by a shell without jobs, or by nohup, ignores these, and so would all that tests start. A
# handler is none of theirs; this one leaves it to what waits for the tests whether they end.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else lambda *_: None)

# Small tensors gain nothing from torch's threads, and lose much on a machine that is busy with something else. Tests of
# threads ask for them.
torch.set_num_threads(1)


@pytest.fixture(params=["reference", *COMPILED])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend there is, one test each."""
    use(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture(params=COMPILED)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend that is held against the reference."""
    use(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture
def many_gigabytes() -> Iterator[None]:
    """For tests that fill a GPU: afterwards the memory goes back to it, because another process may want it."""
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """An empty folder that other users can pass through, as those of pytest are not."""
    folder = Path(tempfile.mkdtemp(prefix="ires-tests-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """The command line in children of one process, under the library of faults."""
    from faults import Warm, compiler

    if compiler() is None:
        pytest.skip("faults.c needs a C compiler")
    process = Warm()
    yield process
    process.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models of scenarios.py."""
    from scenarios import make_models

    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, in memory where there is room for that: for tests that start hundreds of times."""
    memory = "/dev/shm"
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 1 << 28:
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(dir=memory))
    yield folder
    shutil.rmtree(folder)
