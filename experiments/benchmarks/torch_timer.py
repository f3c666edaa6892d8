"""A Timer in eager PyTorch, laid out as thuml/Large-Time-Series-Model lays it out: the peer of the
speed benchmarks.

Separate q, k, v projections, kernel-1 convolutions with their transposes as the feed-forward,
einsum attention with dropout on the weights, post-norm. Written for the comparison; nothing else
uses it, and only it imports torch.
"""

import math

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, d_model: int, heads: int, dropout: float):
        super().__init__()
        self.query_projection = nn.Linear(d_model, d_model)
        self.key_projection = nn.Linear(d_model, d_model)
        self.value_projection = nn.Linear(d_model, d_model)
        self.out_projection = nn.Linear(d_model, d_model)
        self.heads, self.dropout = heads, nn.Dropout(dropout)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = (
            p(x).view(b, n, self.heads, -1)
            for p in (self.query_projection, self.key_projection, self.value_projection)
        )
        scores = torch.einsum("blhe,bshe->bhls", q, k)
        future = torch.triu(torch.ones(n, n, dtype=torch.bool, device=x.device), diagonal=1)
        weights = self.dropout(
            torch.softmax(
                scores.masked_fill(future, -math.inf) / math.sqrt(d // self.heads), dim=-1
            )
        )
        return self.out_projection(torch.einsum("bhls,bshd->blhd", weights, v).reshape(b, n, d))


class Block(nn.Module):
    def __init__(self, d_model: int, d_ff: int, heads: int, dropout: float):
        super().__init__()
        self.attention = Attention(d_model, heads, dropout)
        self.conv1, self.conv2 = nn.Conv1d(d_model, d_ff, 1), nn.Conv1d(d_ff, d_model, 1)
        self.norm1, self.norm2, self.dropout = (
            nn.LayerNorm(d_model),
            nn.LayerNorm(d_model),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        y = x = self.norm1(x + self.dropout(self.attention(x)))
        y = self.dropout(nn.functional.gelu(self.conv1(y.transpose(-1, 1))))
        return self.norm2(x + self.dropout(self.conv2(y).transpose(-1, 1)))


class TorchTimer(nn.Module):
    """[B, T] -> next-patch predictions [B, T], T whole patches."""

    def __init__(
        self, patch_len: int, d_model: int, d_ff: int, layers: int, heads: int, dropout: float = 0.1
    ):
        super().__init__()
        self.patch_len = patch_len
        self.embedding = nn.Linear(patch_len, d_model, bias=False)
        angle = torch.arange(5000).float()[:, None] * torch.exp(
            torch.arange(0, d_model, 2).float() * -(math.log(10000.0) / d_model)
        )
        self.register_buffer(
            "table", torch.stack([angle.sin(), angle.cos()], -1).reshape(5000, d_model)
        )
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(d_model=d_model, d_ff=d_ff, heads=heads, dropout=dropout) for _ in range(layers)
        )
        self.norm, self.proj = nn.LayerNorm(d_model), nn.Linear(d_model, patch_len)

    def forward(self, x):
        mean = x.mean(-1, keepdim=True).detach()
        x = x - mean
        std = torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5).detach()
        patches = (x / std).unfold(-1, self.patch_len, self.patch_len)
        h = self.dropout(self.embedding(patches) + self.table[None, : patches.shape[1]])
        for block in self.blocks:
            h = block(h)
        return self.proj(self.norm(h)).flatten(1) * std + mean
