"""Imported by the server from which training processes are forked, so that no process does it again."""

from collections.abc import Mapping, MutableMapping, MutableSequence, Sequence, Set

# ruff: noqa: F401
import alembic.command
import mlflow.store.tracking.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_workspace_store
import sqlalchemy.dialects.sqlite
import torch

import lit_sigsoftmax.recipes.synthetic
import lit_sigsoftmax.system_metrics
import lit_sigsoftmax.training

for kind in (Mapping, MutableMapping, MutableSequence, Sequence, Set):
    isinstance(torch.zeros(()), kind)  # asks every class of the kind once
