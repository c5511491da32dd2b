"""The reader: a Transformer that classifies an image from the weights of its INR (Gielisse & van
Gemert, CVPR 2025).

A token is one hidden neuron: its row of phi - theta, `width` incoming weights and then the bias.
With beta a learned offset (the only positional embedding) and lambda the token scale,

    x = W_in (lambda (tokens + beta)) + b_in,    x <- x + attention(x),    x <- x + mlp(x),  ...
    logits = head(mean over tokens of x)

    logits = Reader(num_tokens=512, width=128, classes=10)(tokens)    # tokens (N, 512, 129)
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Attention(nn.Module):
    """LayerScale * self-attention(LayerNorm(x)), x (N, T, width)."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.layer_scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor, asking: int | None = None) -> Tensor:
        """x (N, T, width); asking: only so many first rows are queries, keys and values are all."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)    # (N, heads, T, head_dim)
                   for y in self.qkv(self.norm(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q[:, :, :asking], k, v)
        return self.layer_scale * self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """LayerScale * (linear, GELU, linear)(LayerNorm(x)), x (N, T, width)."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, ratio * width)
        self.down = nn.Linear(ratio * width, width)
        self.layer_scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_scale * self.down(F.gelu(self.up(self.norm(x))))


def make_blocks(depth: int, width: int, head_dim: int, mlp_ratio: int) -> nn.ModuleList:
    """Attention and MLP in turn, 2 * depth sub-blocks."""
    return nn.ModuleList(block for _ in range(depth)
                         for block in (Attention(width, head_dim), MLP(width, mlp_ratio)))


def scaled(x: Tensor, scale: float) -> Tensor:
    """scale * x; with 0 a layer norm over all numbers of an image, without affine."""
    return scale * x if scale else F.layer_norm(x, x.shape[1:])


class Reader(nn.Module):
    """Parameters: beta (num_tokens, features), embed, blocks, head. token_scale: as in `scaled`."""

    def __init__(self, num_tokens: int, width: int, classes: int, features: int | None = None,
                 depth=10, head_dim=64, mlp_ratio=1, token_scale=500.0):
        super().__init__()
        features = features or width + 1       # numbers a token
        self.arguments = (num_tokens, width, classes, features, depth, head_dim, mlp_ratio,
                          token_scale)         # to make another one like it
        self.token_scale = token_scale
        self.beta = nn.Parameter(torch.zeros(num_tokens, features))
        self.embed = nn.Linear(features, width)
        self.head = nn.Linear(width, classes)
        # Last, so that a deeper reader starts from the same parameters plus more.
        self.blocks = make_blocks(depth, width, head_dim, mlp_ratio)

    def input_map(self, tokens: Tensor) -> Tensor:
        """tokens (N, T, features) -> the residual stream's first state (N, T, width)."""
        return self.embed(scaled(tokens + self.beta, self.token_scale))

    def conclude(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The last state x (N, T, width) -> logits (N, classes)."""
        return self.head(x.mean(dim=1))

    def forward(self, tokens: Tensor, *more) -> Tensor:
        """tokens (N, T, features) -> logits (N, classes); more: what else `conclude` takes."""
        x = self.input_map(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.conclude(x, tokens, *more)

    def trace(self, tokens: Tensor):
        """logits, and [(stage, state (N, T, width)), ...] after the input map and every block."""
        x = self.input_map(tokens)
        states = [("input map", x)]
        for b, block in enumerate(self.blocks):
            x = x + block(x)
            states.append((f"{'MLP' if b % 2 else 'attention'} {b // 2 + 1}", x))
        return self.conclude(x, tokens), states


class Branch(nn.Module):
    """Features (N, d) -> logits (N, classes), zero at the start: the reader starts alone."""

    def __init__(self, features: int, width: int, classes: int, scale: float):
        super().__init__()
        self.scale = scale
        self.up = nn.Linear(features, width)
        self.down = nn.Linear(width, classes)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(scaled(x, self.scale))))


class RoutedReader(Reader):
    """A Reader with more at its end, for the interventions. readout: so many learned queries, added
    to the mean token, gather the tokens in two blocks of class attention (Touvron et al., ICCV
    2021), where they alone ask, of themselves and the tokens. branch: a small network adds logits,
    of the tokens' "bias" column or "column:N", or of the "colour", an image's mean (N, channels),
    which `forward` then takes too."""

    def __init__(self, num_tokens, width, classes, features=None, depth=10, head_dim=64,
                 mlp_ratio=1, token_scale=500.0, readout=0, branch=None, channels=3):
        super().__init__(num_tokens, width, classes, features, depth, head_dim, mlp_ratio,
                         token_scale)
        self.arguments += readout, branch, channels
        self.queries = nn.Parameter(0.02 * torch.randn(readout, width)) if readout else None
        self.gather = make_blocks(2 if readout else 0, width, head_dim, mlp_ratio)
        self.column, self.branch, self.takes_colour = None, None, branch == "colour"
        if self.takes_colour:
            self.branch = Branch(channels, width, classes, 1.0)
        elif branch:
            self.column = -1 if branch == "bias" else int(branch.removeprefix("column:"))
            self.branch = Branch(num_tokens, width, classes, token_scale)

    def gathered(self, x: Tensor) -> list[Tensor]:
        """The queries (N, readout, width) after each sub-block, of the tokens' last state x."""
        q, states = self.queries + x.mean(dim=1, keepdim=True), []
        for attention, mlp in zip(self.gather[::2], self.gather[1::2]):
            states.append(q := q + attention(torch.cat([q, x], dim=1), asking=q.shape[1]))
            states.append(q := q + mlp(q))
        return states

    def conclude(self, x: Tensor, tokens: Tensor, colour: Tensor | None = None) -> Tensor:
        logits = super().conclude(x if self.queries is None else self.gathered(x)[-1], tokens)
        features = colour if self.column is None else tokens[..., self.column]
        return logits if features is None else logits + self.branch(features)

    def trace(self, tokens: Tensor):
        """As `Reader.trace`, then the queries after each sub-block that gathers."""
        logits, states = super().trace(tokens)
        if self.queries is not None:
            states += zip(("gather 1", "queries 1", "gather 2", "queries 2"),
                          self.gathered(states[-1][1]))
        return logits, states
