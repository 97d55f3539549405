"""A causal transformer backbone, whole, in one file.

The pre-norm decoder of GPT-2 with what has become customary since: rotary positions, RMSNorm, no biases.

References:
    A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2).
    J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", 2019.

Shapes: B batch, T time, C hidden_size, nh num_heads, hs = C / nh the size of a head.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotary_tables(time: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's rotation angles, each (T, hs / 2), float32."""
    # float32 whatever the model's precision: bfloat16 cannot even count past 256.
    pair = torch.arange(0, head_size, 2, dtype=torch.float32, device=device)
    frequency = 10_000.0 ** (-pair / head_size)  # (hs / 2): from 1 towards 1 / 10,000 radians a position
    angle = torch.arange(time, dtype=torch.float32, device=device)[:, None] * frequency  # (T, hs / 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each feature pair (i, i + hs / 2) of ``x`` (B, nh, T, hs) by its position's angle."""
    a, b = x.chunk(2, dim=-1)  # (B, nh, T, hs / 2) each
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and the positions before it."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.projection = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Map ``x`` (B, T, C) to (B, T, C), with queries and keys rotated by the tables ``rotation`` if given."""
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # (B, nh, T, hs) each
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, nh, T, hs)
        return self.projection(y.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    """The position-wise network: four times wider inside, GELU."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.expansion = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.projection = nn.Linear(4 * hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, T, C) to (B, T, C), each position by itself."""
        return self.projection(F.gelu(self.expansion(x)))


class Block(nn.Module):
    """Attention, then the MLP, each normalised before and added to the residual stream after."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden_size, eps=1e-5)
        self.attention = CausalSelfAttention(hidden_size, num_heads, dropout)
        self.mlp_norm = nn.RMSNorm(hidden_size, eps=1e-5)
        self.mlp = MLP(hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Map the residual stream ``x`` (B, T, C) to (B, T, C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class TransformerBackbone(nn.Module):
    """A causal transformer decoder. It carries no state: a segment is all it sees.

    All weight matrices start from N(0, 0.02^2), those that write to the residual stream from that divided by
    sqrt(2 * num_layers), as in GPT-2. The inner size of the MLPs is 4 * hidden_size.

    Args:
        vocab_size: Number of token types.
        hidden_size: Size of the embeddings, of the residual stream and of the hidden vectors.
        num_layers: Number of blocks (attention and MLP).
        num_heads: Number of attention heads; it must divide ``hidden_size``.
        positions: How order is told: "rotary" (queries and keys rotated by position) or "learned" (an embedding of
            each position).
        max_length: Longest segment, in tokens, with learned positions; rotary positions have no limit.
        dropout: Probability of dropping an element of the embedded input, an attention weight, or an element of what a
            block adds.

    Raises:
        ValueError: If a size is below 1, ``dropout`` is outside [0, 1), ``positions`` is unknown, ``num_heads`` does
            not divide ``hidden_size``, or the head size is odd with rotary positions.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        positions: Literal["rotary", "learned"] = "rotary",
        max_length: int = 1024,
        dropout: float = 0.1,
    ) -> None:
        sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_layers": num_layers}
        for name, size in {**sizes, "num_heads": num_heads, "max_length": max_length}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if positions not in ("rotary", "learned"):
            raise ValueError(f"positions must be rotary or learned, got {positions!r}")
        if hidden_size % num_heads:
            raise ValueError(f"num_heads must divide hidden_size, got {num_heads} heads for {hidden_size}")
        if positions == "rotary" and hidden_size // num_heads % 2:
            raise ValueError(f"rotary positions need an even hidden_size / num_heads, got {hidden_size} / {num_heads}")
        super().__init__()
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.max_length = max_length
        self.head_size = hidden_size // num_heads
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.position_embedding = nn.Embedding(max_length, hidden_size) if positions == "learned" else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, dropout) for _ in range(num_layers))
        # RMSNorm also because LayerNorm centres: its hidden vectors span one dimension less, which the rank would show.
        self.norm = nn.RMSNorm(hidden_size, eps=1e-5)
        self._initialize(num_layers)

    def _initialize(self, num_layers: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # the norms' gains stay at 1
                # 2 * num_layers terms add up in the residual stream: keep their sum's size independent of depth.
                is_residual = name.endswith("projection.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * num_layers) if is_residual else 0.02)

    def forward(self, tokens: Tensor, state: None = None) -> tuple[Tensor, None]:
        """Read ``tokens``, each position from the positions up to it.

        Args:
            tokens: Token ids (batch, time), int64.
            state: Always None; there for the interface that backbones share.

        Returns:
            The hidden vectors (batch, time, hidden_size), and None for the state.

        Raises:
            ValueError: If, with learned positions, ``tokens`` has more than ``max_length`` positions.
        """
        time = tokens.size(1)
        x = self.embedding(tokens)  # (B, T, C)
        rotation = None
        if self.position_embedding is None:
            rotation = rotary_tables(time, self.head_size, tokens.device)  # (T, hs / 2) each
        else:
            if time > self.max_length:
                raise ValueError(
                    f"a segment of {time} tokens is longer than max_length={self.max_length}: "
                    "raise max_length, shorten the segment, or use rotary positions"
                )
            x = x + self.position_embedding.weight[:time]  # (B, T, C) + (T, C)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotation)  # (B, T, C)
        return self.norm(x), None
