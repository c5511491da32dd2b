"""The reader: a Transformer that classifies an image from the weights of its INR (Gielisse & van Gemert, CVPR 2025).

A token is one hidden neuron: its row of phi - theta, `width` incoming weights and then the bias. With beta a learned
offset for every entry and lambda the token scale,

    x = W_in (lambda (tokens + beta)) + b_in,   x <- x + attention(x),   x <- x + mlp(x),  ...   logits = head(mean over tokens)

Attention and MLP are pre-norm with LayerScale (Touvron et al., ICCV 2021). There is no positional embedding beside beta.

    reader = Reader(num_tokens=512, width=128, classes=10)
    logits = reader(tokens)                                        # tokens (N, 512, 129)
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Attention(nn.Module):
    """LayerScale * self-attention(LayerNorm(x)), x (N, T, width); the residual is added by the caller."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.layer_scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor, asking: int | None = None) -> Tensor:
        """asking: only the first so many rows ask, and theirs alone come back; all rows are asked."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)            # (N, heads, T, head_dim)
                   for y in self.qkv(self.norm(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q[:, :, :asking], k, v).transpose(1, 2).flatten(2)      # (N, T or asking, width)
        return self.layer_scale * self.out(y)


class MLP(nn.Module):
    """LayerScale * (linear, GELU, linear)(LayerNorm(x)), x (N, T, width); the residual is added by the caller."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, ratio * width)
        self.down = nn.Linear(ratio * width, width)
        self.layer_scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_scale * self.down(F.gelu(self.up(self.norm(x))))


class Branch(nn.Module):
    """Logits (N, classes) from features (N, d) of an image, beside the reader's own. Its last layer starts at zero, so that training
    starts from the reader alone."""

    def __init__(self, features: int, width: int, classes: int, scale: float):
        super().__init__()
        self.scale = scale
        self.up = nn.Linear(features, width)
        self.down = nn.Linear(width, classes)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(scaled(x, self.scale))))


def scaled(x: Tensor, scale: float) -> Tensor:
    """scale * x; with 0 a layer norm over all of an image's numbers together, without affine."""
    return scale * x if scale else F.layer_norm(x, x.shape[1:])


class Reader(nn.Module):
    """Parameters: beta (num_tokens, width + 1), embed, blocks (attention and MLP in turn), head; where asked for also queries
    (readout, width), gather (two blocks) and branch.

    token_scale is lambda; 0 as `scaled` says. readout: so many learned queries, each added to the mean over tokens, gather the tokens
    by class attention (Touvron et al., ICCV 2021): in two more blocks they alone ask, of themselves and of the tokens.
    branch: "bias", "column:N" or "colour", that column of the tokens or the image's mean colour, to the logits past the blocks.
    """

    def __init__(self, num_tokens: int, width: int, classes: int, depth: int = 10, head_dim: int = 64, mlp_ratio: int = 1,
                 token_scale: float = 500.0, readout: int = 0, branch: str | None = None, channels: int = 3):
        super().__init__()
        if width % head_dim:
            raise ValueError(f"a head size of {head_dim} does not divide the width of {width}")
        self.token_scale = token_scale
        self.beta = nn.Parameter(torch.zeros(num_tokens, width + 1))
        self.embed = nn.Linear(width + 1, width)
        self.head = nn.Linear(width, classes)

        def blocks(count):
            return nn.ModuleList(block for _ in range(count) for block in (Attention(width, head_dim), MLP(width, mlp_ratio)))

        # Last, so that a deeper reader, or one with more parts, starts from the same parameters plus more.
        self.blocks = blocks(depth)
        self.queries = nn.Parameter(0.02 * torch.randn(readout, width)) if readout else None
        self.gather = blocks(2 if readout else 0)
        self.branch = None
        if branch:
            self.column = {"bias": -1, "colour": None}[branch] if ":" not in branch else int(branch.split(":")[1])
            self.branch = Branch(channels if branch == "colour" else num_tokens, width, classes, 1.0 if branch == "colour" else token_scale)

    def forward(self, tokens: Tensor, flow: bool = False, colour: Tensor | None = None):
        """logits (N, classes) of tokens (N, num_tokens, width + 1) and, for a branch that takes it, the mean colour (N, channels);
        without it that branch says nothing.

        flow=True: also the token flow, the state (N, num_tokens, width) after the input map and after every sub-block
        (1 + 2 * depth of them), then the queries (N, readout, width) after each that gathers.
        """
        x = self.embed(scaled(tokens + self.beta, self.token_scale))               # (N, T, width)
        states = [x] if flow else None
        for block in self.blocks:
            x = x + block(x)
            if flow:
                states.append(x)
        logits, gathered = self.conclude(x, tokens, colour)
        return (logits, states + gathered) if flow else logits

    def conclude(self, x: Tensor, tokens: Tensor, colour: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """From the state x (N, T, width) after the blocks to the logits, and the queries after each sub-block that gathers."""
        asked, gathered = x, []
        if self.queries is not None:
            x = self.queries + asked.mean(dim=1, keepdim=True)                     # (N, readout, width)
        for block in self.gather:
            x = x + (block(torch.cat([x, asked], dim=1), x.shape[1]) if isinstance(block, Attention) else block(x))
            gathered.append(x)
        logits = self.head(x.mean(dim=1))
        if self.branch is not None:
            given = colour if self.column is None else tokens[..., self.column]    # (N, d)
            logits = logits if given is None else logits + self.branch(given)
        return logits, gathered
