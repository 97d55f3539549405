"""What the tests share. Nothing here or in a test writes to the checkout's mlruns/ or to the user's cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"
os.environ.pop("MLFLOW_TRACKING_URI", None)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which Lightning does where it is installed
torch.set_num_threads(1)  # the tests' tensors are small


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["LIT_SIGSOFTMAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with ptb/ and wikitext-2/: LIT_SIGSOFTMAX_DATA, or shared/data beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("LIT_SIGSOFTMAX_DATA", beside))
    if not (root / "ptb" / "ptb.train.txt").is_file():
        pytest.skip("the real corpora are not here: set LIT_SIGSOFTMAX_DATA to a folder with ptb/ and wikitext-2/")
    return root


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs: a new one takes seconds to make, a copy of this one none."""
    from lit_sigsoftmax.tracking import open_client

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_client(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def workplace(empty_store: Path, tmp_path_factory: pytest.TempPathFactory):
    """Makes ``with workplace() as store:``, a working directory with an empty store, also for wider scopes.

    The store's address is absolute: MLflow keeps a database open under its name, whatever the working directory is.
    """
    from contextlib import contextmanager

    from cli_helpers import Store
    from fork_helpers import start_server

    start_server()  # in the background: what needs a store often forks from it

    @contextmanager
    def make():
        folder = tmp_path_factory.mktemp("workplace")
        (folder / "mlruns").mkdir()
        shutil.copy(empty_store, folder / "mlruns" / "mlflow.db")
        store = Store(folder)
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.chdir(folder)
            monkeypatch.syspath_prepend(folder)
            monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
            yield store

    return make


@pytest.fixture
def store(workplace):
    """A working directory with an empty store, which is the default one."""
    with workplace() as store:
        yield store


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of activations that forgets what a test registers."""
    from lit_sigsoftmax import activations

    for name in ("_REGISTRY", "_DERIVATIVES"):
        monkeypatch.setattr(activations, name, dict(getattr(activations, name)))
