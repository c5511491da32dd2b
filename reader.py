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

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)            # (N, heads, T, head_dim)
                   for y in self.qkv(self.norm(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)     # (N, T, width)
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


class Reader(nn.Module):
    """Parameters: beta (num_tokens, width + 1), embed, blocks (attention and MLP in turn), head.

    token_scale is lambda; 0 replaces the scaling by a layer norm over tokens and features together, without affine.
    """

    def __init__(self, num_tokens: int, width: int, classes: int, depth: int = 10, head_dim: int = 64, mlp_ratio: int = 1,
                 token_scale: float = 500.0):
        super().__init__()
        if width % head_dim:
            raise ValueError(f"a head size of {head_dim} does not divide the width of {width}")
        self.token_scale = token_scale
        self.beta = nn.Parameter(torch.zeros(num_tokens, width + 1))
        self.embed = nn.Linear(width + 1, width)
        self.head = nn.Linear(width, classes)
        # Last, so that a deeper reader starts from the same parameters plus more.
        self.blocks = nn.ModuleList(block for _ in range(depth)
                                    for block in (Attention(width, head_dim), MLP(width, mlp_ratio)))

    def forward(self, tokens: Tensor, flow: bool = False):
        """logits (N, classes) of tokens (N, num_tokens, width + 1).

        flow=True: also the token flow, the state (N, num_tokens, width) after the input map and after every sub-block
        (1 + 2 * depth of them).
        """
        x = tokens + self.beta                                     # (N, T, width + 1)
        x = self.token_scale * x if self.token_scale else F.layer_norm(x, x.shape[1:])
        x = self.embed(x)                                          # (N, T, width)
        states = [x] if flow else None
        for block in self.blocks:
            x = x + block(x)
            if flow:
                states.append(x)
        logits = self.head(x.mean(dim=1))
        return (logits, states) if flow else logits
