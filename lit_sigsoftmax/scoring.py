"""What a model says of each token of a text."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lit_sigsoftmax.data import Segments, Vocabulary
from lit_sigsoftmax.functional import IGNORE_INDEX

__all__ = ["score_table"]


def score_table(predictions: Iterable[Tensor], segments: Segments, vocabulary: Vocabulary) -> str:
    """Return a table of tokens and their log-probabilities, in the order of the text.

    Args:
        predictions: Log-probability of each target, (streams, time) for each segment, in nats.
        segments: The segments that were scored.
        vocabulary: Which id is which token.

    Returns:
        Tab-separated lines with a head, one for each token.
    """
    targets = torch.cat([target for _, target in segments], dim=1)
    log_probs = torch.cat(list(predictions), dim=1)
    counted = targets != IGNORE_INDEX  # streams follow each other in the text, so row by row is its order
    tokens, values = vocabulary.decode(targets[counted].tolist()), log_probs[counted].tolist()
    return "token\tlog_prob\n" + "".join(f"{t}\t{v:.6f}\n" for t, v in zip(tokens, values, strict=True))
