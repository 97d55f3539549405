"""Backbones: token ids to hidden vectors.

A backbone is any ``nn.Module`` with ``forward(tokens, state=None) -> (hidden, next_state)``: ``tokens`` is an integer
tensor (batch, time), ``hidden`` is (batch, time, hidden_size), and the state is any nest of tensors, or None for a
model that carries none. ``hidden[:, t]`` depends on ``tokens[:, : t + 1]`` and the state alone. Its attributes
``vocab_size``, ``hidden_size`` and ``embedding`` (vocab_size, hidden_size) are what an output layer needs to fit it.
"""

from lit_sigsoftmax.backbones.recurrent import RecurrentBackbone
from lit_sigsoftmax.backbones.transformer import TransformerBackbone

__all__ = ["RecurrentBackbone", "TransformerBackbone"]
