"""A small transformer that predicts the next byte.

Written by hand: a hundred lines are no reason to depend on transformers, whose models draw their
first weights from the global random state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DEVIATION = 0.02  # of initial weights


def build_gpt(
    *,
    vocabulary: int,
    context: int,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    tied: bool = False,
    seed: int = 0,
) -> nn.Module:
    r"""Return a decoder-only transformer with normalisation before each branch.

    Token and learned position embeddings, then `layers` blocks
    :math:`x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x))`,
    :math:`x \leftarrow x + \mathrm{mlp}(\mathrm{norm}(x))` (four times as wide inside, GELU), a
    last normalisation, a linear head without bias. No dropout. Weights start from a normal
    distribution of deviation .02, those that end a branch from
    :math:`.02/\sqrt{2\,\mathrm{layers}}`; biases from zero.

    Args:
        vocabulary: Number of tokens, at least 2.
        context: Longest input, at least 1.
        width: Size of the residual stream, a multiple of `heads`.
        layers: Number of blocks, at least 1.
        heads: Attention heads per block, at least 1.
        tied: Whether the head's weight is that of the token embedding.
        seed: Fixes the initial weights; two calls with one seed return equal models. No global
            random number is drawn.

    Returns:
        The model in training mode, on the CPU, in float32: tokens [B, T] to logits [B, vocabulary,
        T], the classes in the dimension where `torch.nn.CrossEntropyLoss` wants them.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> model = build_gpt(vocabulary=256, context=16, width=32, layers=2)
        >>> model(torch.zeros(3, 16, dtype=torch.int64)).shape
        torch.Size([3, 256, 16])
        >>> sum(p.numel() for p in model.parameters())
        42368

    References:
        Radford, Wu, Child, Luan, Amodei and Sutskever, 2019, "Language Models are Unsupervised
        Multitask Learners", section 2.3. Theirs has dropout and biases in every layer; our head may
        be untied, as PowerGrad's control rescales it alone.
    """
    smallest = {
        "vocabulary": (vocabulary, 2),
        "context": (context, 1),
        "width": (width, 1),
        "layers": (layers, 1),
        "heads": (heads, 1),
    }
    for option, (value, least) in smallest.items():
        if value < least:
            raise ValueError(f"{option} must be at least {least}, got {value!r}")
    if width % heads:
        raise ValueError(f"width must be a multiple of heads ({heads}), got {width!r}")
    # Modules draw their default weights when they are made; the fork puts the global state back.
    with torch.random.fork_rng(devices=[]):
        model = GPT(vocabulary, context, width=width, layers=layers, heads=heads)
    _initialize(model, torch.Generator().manual_seed(seed))
    if tied:
        model.head.weight = model.tokens.weight
    return model


class GPT(nn.Module):
    """The transformer that `build_gpt` returns; `head` is its output layer."""

    def __init__(
        self, vocabulary: int, context: int, *, width: int, layers: int, heads: int
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, vocabulary, T] of what follows each of the tokens [B, T]."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        features = self.blocks(self.tokens(tokens) + self.positions(places))
        return self.head(self.norm(features)).transpose(1, 2)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and a two-layer network, each beside an identity shortcut and normalised first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, features: Tensor) -> Tensor:
        """Return features [B, T, width] of features [B, T, width]."""
        features = features + self.attention(self.norm1(features))
        inside = F.gelu(self.mlp_in(self.norm2(features)))
        return features + self.mlp_out(inside)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Each place looks at itself and what came before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project_in = nn.Linear(width, 3 * width)  # queries, keys and values
        self.project_out = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """Return features [B, T, width] of features [B, T, width]."""
        batch, length, width = features.shape
        split = self.project_in(features).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        joined = seen.transpose(1, 2).reshape(batch, length, width)
        return self.project_out(joined)  # type: ignore[no-any-return]


@torch.no_grad()
def _initialize(model: GPT, generator: torch.Generator) -> None:
    """Draw new weights from the generator."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=DEVIATION, generator=generator)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        for layer in (block.attention.project_out, block.mlp_out):
            layer.weight.div_(math.sqrt(2 * len(blocks)))
