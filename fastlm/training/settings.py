"""What a training run is: everything that its losses depend on, besides the text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from fastlm.errors import UserError

AUTOCAST = ("none", "bf16")


@dataclass(frozen=True)
class Settings:
    """Settings of a run; saved in its checkpoints. The defaults take about two minutes on 2 cores.

    One step draws `batch_size * accumulate` windows of `context` bytes. `warmup` steps raise the
    learning rate to `lr`; a cosine then lowers it to a tenth at `steps`.
    """

    dim: int = 128
    layers: int = 4
    heads: int = 2
    context: int = 128
    dropout: float = 0.0
    steps: int = 1200
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    autocast: str = "none"

    def __post_init__(self):
        for name in ("dim", "layers", "heads", "context", "steps", "batch_size", "accumulate"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _require("dim", self.dim, self.dim % self.heads == 0, f"a multiple of heads, {self.heads}")
        _require("warmup", self.warmup, self.warmup >= 0, "at least 0")
        _require("seed", self.seed, 0 <= self.seed < 2**32, "from 0 to 2**32 - 1")
        _require("dropout", self.dropout, 0.0 <= self.dropout < 1.0, "at least 0 and below 1")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            _require(name, value, 0.0 < value < math.inf, "above 0 and finite")
        decay = self.weight_decay
        _require("weight_decay", decay, 0.0 <= decay < math.inf, "at least 0 and finite")
        _require("autocast", self.autocast, self.autocast in AUTOCAST, "none or bf16")

    @classmethod
    def from_dict(cls, values: dict) -> Settings:
        """The inverse of `to_dict`; ValueError or TypeError for anything else."""
        known = {field.name: field.type for field in fields(cls)}
        if set(values) != set(known):
            raise ValueError(f"settings are {sorted(values)}, not {sorted(known)}")
        kinds = {"int": int, "float": float, "str": str}
        return cls(**{name: kinds[known[name]](value) for name, value in values.items()})

    def to_dict(self) -> dict:
        return asdict(self)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * done)))


def _require(name, value, holds, constraint) -> None:
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} must be {constraint}, got {value}")
