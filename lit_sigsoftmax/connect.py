"""Opens the tracking store for a command that has nothing to do without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_sigsoftmax.store import TrackingError, impatient, open_client, reason, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["connect"]


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
