"""Opens the tracking store for a command that has nothing to do without it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from lit_sigsoftmax.store import TrackingError, impatient, open_client, reason, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["connect", "connect_again"]

_INTERVAL = 5.0  # seconds between two attempts while the store is away


def connect(tracking_uri: str) -> MlflowClient:
    """Open a tracking store and see, within seconds, that it answers.

    Args:
        tracking_uri: The store.

    Raises:
        TrackingError: It does not answer, or cannot be used.
    """
    try:
        with impatient():
            client = open_client(tracking_uri)
            client.search_experiments(max_results=1)  # opening a server sends nothing yet
            return client
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(
            f"cannot use the tracking store {without_password(tracking_uri)} ({reason(error)}): start it, or name "
            "another with --tracking_uri or MLFLOW_TRACKING_URI"
        ) from error


def connect_again(tracking_uri: str) -> MlflowClient:
    """Open a tracking store that has been there before; where it is away, say so once and wait until it is back.

    Args:
        tracking_uri: The store.

    Raises:
        TrackingError: It cannot be used, as where it may not be read.
    """
    told = False
    while True:
        try:
            return connect(tracking_uri)
        except TrackingError as error:
            if error.__cause__ is None:  # it is there, and cannot be used: waiting mends nothing
                raise
            if not told:
                print(f"waiting: {error}", file=sys.stderr, flush=True)
            told = True
            time.sleep(_INTERVAL)
