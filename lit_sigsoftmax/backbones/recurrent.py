"""Recurrent backbones: a stack of LSTM or GRU layers with variational dropout.

References:
    Y. Gal and Z. Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", 2016.
    S. Merity, N. S. Keskar and R. Socher, "Regularizing and Optimizing LSTM Language Models", 2018 (AWD-LSTM).

Shapes: B batch, T time, C hidden_size, V vocab_size.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}

LayerState = Tensor | tuple[Tensor, Tensor]  # GRU: h; LSTM: (h, c); each (1, B, C)


def locked_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Drop features of ``x`` (B, T, C) with one mask per sequence, the same at every time step."""
    if not training or p == 0:
        return x
    return x * F.dropout(x.new_ones(x.size(0), 1, x.size(2)), p)  # (B, T, C) * (B, 1, C)


class RecurrentBackbone(nn.Module):
    """A stack of LSTM or GRU layers, with dropout masks that are held over time.

    All dropout rescales what it keeps by 1 / (1 - p) and is off in evaluation. Embeddings start from U(-0.1, 0.1), the
    recurrent layers from PyTorch's default, U(-1/sqrt(hidden_size), 1/sqrt(hidden_size)).

    Args:
        vocab_size: Number of token types.
        hidden_size: Size of the embeddings, of every layer and of the hidden vectors.
        num_layers: Number of recurrent layers.
        cell: Kind of recurrent layer: "lstm" or "gru".
        dropout: Probability of dropping a feature between layers and of the output.
        input_dropout: Probability of dropping a feature of the embedded tokens.
        embedding_dropout: Probability of dropping a token type: all its occurrences in the batch become zero vectors.

    Raises:
        ValueError: If a size is below 1, a probability is outside [0, 1), or ``cell`` is unknown.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 200,
        num_layers: int = 2,
        cell: Literal["lstm", "gru"] = "lstm",
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
    ) -> None:
        sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_layers": num_layers}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        dropouts = {"dropout": dropout, "input_dropout": input_dropout, "embedding_dropout": embedding_dropout}
        for name, p in dropouts.items():
            if not 0 <= p < 1:
                raise ValueError(f"{name} must be in [0, 1), got {p}")
        if cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
        super().__init__()
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.dropout = dropout
        self.input_dropout = input_dropout
        self.embedding_dropout = embedding_dropout
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        # One module a layer: PyTorch's stacked layers draw a new mask at every time step.
        self.layers = nn.ModuleList(CELLS[cell](hidden_size, hidden_size, batch_first=True) for _ in range(num_layers))

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed ``tokens`` (B, T) as (B, T, C), without the dropped token types."""
        x = self.embedding(tokens)  # (B, T, C)
        if not self.training or self.embedding_dropout == 0:
            return x
        kept = F.dropout(x.new_ones(self.vocab_size, 1), self.embedding_dropout)  # (V, 1): 0 or 1 / (1 - p)
        return x * kept[tokens]  # (B, T, C) * (B, T, 1)

    def forward(
        self, tokens: Tensor, state: tuple[LayerState, ...] | None = None
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        """Read ``tokens`` from where ``state`` left off.

        Args:
            tokens: Token ids (batch, time), int64.
            state: What the previous segment of the same sequences returned; None starts from zeros.

        Returns:
            The hidden vectors (batch, time, hidden_size), and the state after the last token: for each layer ``h``
            (GRU) or ``(h, c)`` (LSTM), each (1, batch, hidden_size), still attached to the graph.
        """
        x = locked_dropout(self.embed(tokens), self.input_dropout, self.training)  # (B, T, C)
        layer_states = (None,) * len(self.layers) if state is None else state
        next_state: list[LayerState] = []
        for layer, layer_state in zip(self.layers, layer_states, strict=True):
            x, layer_next_state = layer(x, layer_state)  # (B, T, C)
            x = locked_dropout(x, self.dropout, self.training)
            next_state.append(layer_next_state)
        return x, tuple(next_state)
