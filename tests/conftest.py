"""What the tests share. Nothing here or in a test writes to the checkout's mlruns/ or to the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"
os.environ.pop("MLFLOW_TRACKING_URI", None)
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
