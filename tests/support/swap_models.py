"""Small modules that swap knows, or must leave alone, and inputs for them."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlm.testing import randn

DIM, HEADS, HIDDEN = 12, 2, 20
PAD = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])


class TinyIntermediate(nn.Module):
    def __init__(self, act=F.gelu):
        super().__init__()
        self.dense = nn.Linear(DIM, HIDDEN)
        self.act = act

    def forward(self, x):
        return self.act(self.dense(x))


class TinyOutput(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.dense = nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.drop = nn.Dropout(p)

    def forward(self, x, y):
        return self.norm(y + self.drop(self.dense(x)))


class TinyMLP(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.up, self.down = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)
        self.act, self.drop = nn.GELU(approximate="tanh"), nn.Dropout(p)

    def forward(self, x):
        return self.drop(self.down(self.drop(self.act(self.up(x)))))


class TinyGatedMLP(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.up, self.gate = (nn.Linear(DIM, HIDDEN, bias=bias) for _ in range(2))
        self.down, self.act = nn.Linear(HIDDEN, DIM, bias=bias), nn.SiLU()

    def forward(self, x):
        return self.down(self.up(x) * self.act(self.gate(x)))


class TinyDenseActDense(nn.Module):
    """As T5's, whose second layer may be kept in fp32."""

    def __init__(self):
        super().__init__()
        self.wi, self.wo, self.act = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM), nn.ReLU()

    def forward(self, x):
        x = self.act(self.wi(x))
        if x.dtype != self.wo.weight.dtype:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x)


class TinyRMSNorm(nn.Module):
    """Rounds as `casting` says."""

    def __init__(self, casting="llama", dim=DIM):
        super().__init__()
        self.weight, self.eps, self.casting = nn.Parameter(torch.ones(dim)), 1e-6, casting

    def forward(self, x):
        wide = x.float() if x.dtype != torch.float64 else x
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.casting == "llama":
            return self.weight * y.to(x.dtype)
        if self.casting == "t5":  # llama's, but for half inputs with fp32 weights
            return self.weight * y.to(self.weight.dtype)
        if self.casting == "gemma":
            return (y * (1.0 + self.weight.to(y.dtype))).to(x.dtype)
        if self.casting == "torch":
            return (y * self.weight.to(y.dtype)).to(x.dtype)
        return (y * self.weight.to(y.dtype) ** 2).to(x.dtype)


class Model(nn.Module):
    """A bit of everything."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False)
        self.intermediate = TinyIntermediate()
        self.shrink = nn.Linear(HIDDEN, DIM)
        self.output = TinyOutput()
        self.head = nn.Sequential(nn.RMSNorm(DIM), nn.Linear(DIM, 3))

    def forward(self, x, padding=None):
        x = self.encoder(x, src_key_padding_mask=padding)
        return self.head(self.output(self.shrink(self.intermediate(x)), x))


def encoder_layer(**options):
    options = {"dropout": 0.0, "batch_first": True, **options}
    return nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, **options)


def decoder_layer(**options):
    return nn.TransformerDecoderLayer(DIM, HEADS, HIDDEN, dropout=0.0, batch_first=True, **options)


def x_of(seqlen=5, dim=DIM, seed=0):
    return randn(3, seqlen, dim, seed=seed)


def raises(error, message):
    """pytest.raises of the whole message."""
    return pytest.raises(error, match=f"^{re.escape(message)}$")
