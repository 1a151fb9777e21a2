"""The optimiser step and the evaluation of a byte-level `DecoderLM`."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import nn

from fastlm.errors import UserError
from fastlm.models import DecoderLM, TransformerConfig
from fastlm.training.bigram import VOCABULARY
from fastlm.training.checkpoint import Checkpoint
from fastlm.training.data import Corpus, Windows
from fastlm.training.settings import Settings


@dataclass(frozen=True)
class Step:
    """What a step measured; tensors, so that a GPU is not waited for."""

    loss: torch.Tensor  # nats per byte, before the step
    grad_norm: torch.Tensor  # before clipping
    lr: float


class Trainer:
    """Trains one model; `checkpoint` and `restore` carry all that the next step depends on."""

    def __init__(self, settings: Settings, corpus: Corpus, data: list[str], device: torch.device):
        self.settings, self.corpus, self.data, self.device = settings, corpus, data, device
        torch.manual_seed(settings.seed)
        self.model = build_model(settings).to(device)
        self.optimizer = build_optimizer(self.model, settings)
        self.windows = Windows(corpus.train, settings.context, settings.seed)
        self.step_count = 0

    def step(self) -> Step:
        """One optimiser step over `accumulate` batches; their mean loss is what is minimised."""
        settings = self.settings
        lr = settings.lr_at(self.step_count)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        total = torch.zeros((), device=self.device)
        for _ in range(settings.accumulate):
            ids, targets = self.windows.next(settings.batch_size)
            with autocast(settings, self.device):
                loss = language_model_loss(self.model, ids.to(self.device), targets.to(self.device))
            # All batches have the same number of targets: the mean of their means is the mean.
            (loss / settings.accumulate).backward()
            total += loss.detach().float() / settings.accumulate
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        return Step(total, grad_norm, lr)

    def checkpoint(self) -> Checkpoint:
        """The run as it is between two steps."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return Checkpoint(
            settings=self.settings,
            step=self.step_count,
            position=self.windows.position,
            data=self.data,
            fingerprint=self.corpus.fingerprint,
            model=model_state(self.model),
            optimizer=_optimizer_state(self.model, self.optimizer),
            rng=rng,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint: the next steps are those of the run that saved it.

        Raises:
            UserError: the text or the tensors do not fit.
        """
        if checkpoint.fingerprint != self.corpus.fingerprint:
            raise UserError("the text has changed since the checkpoint was saved")
        load_model_state(self.model, checkpoint)
        _load_optimizer_state(self.model, self.optimizer, checkpoint.optimizer)
        self.windows.position = checkpoint.position
        self.step_count = checkpoint.step
        try:
            torch.set_rng_state(checkpoint.rng["cpu"])
            if self.device.type == "cuda" and "cuda" in checkpoint.rng:
                torch.cuda.set_rng_state(checkpoint.rng["cuda"], self.device)
        except (KeyError, RuntimeError, TypeError) as error:
            raise UserError(f"the checkpoint's generator state does not fit: {error}") from error


def build_model(settings: Settings) -> DecoderLM:
    """The model of a run: bytes in, bytes out."""
    return DecoderLM(
        TransformerConfig(
            vocab_size=VOCABULARY,
            embed_dim=settings.dim,
            num_heads=settings.heads,
            num_layers=settings.layers,
            max_seqlen=settings.context,
            dropout=settings.dropout,
        )
    )


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays matrices alone: biases, norms' scales and shifts keep their size."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


def language_model_loss(model: nn.Module, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of `targets` (batch, context), the bytes after `ids`."""
    return model(ids, labels=targets)


@torch.no_grad()
def evaluate(
    model: nn.Module, ids: torch.Tensor, targets: torch.Tensor, settings: Settings, batch: int = 32
) -> float:
    """Bits per byte over windows (n, context), without dropout; draws no random number."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    for chunk in range(0, len(ids), batch):
        some_ids, some_targets = ids[chunk : chunk + batch], targets[chunk : chunk + batch]
        with autocast(settings, device):
            loss = language_model_loss(model, some_ids.to(device), some_targets.to(device))
        total += loss.item() * some_targets.numel()
    model.train(was_training)
    return total / targets.numel() / math.log(2)


def autocast(settings: Settings, device: torch.device) -> contextlib.AbstractContextManager:
    if settings.autocast == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state_dict without the second name of tied tensors, which safetensors does not store."""
    state, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach()
    return state


def load_model_state(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Loads the parameters of a checkpoint.

    Raises:
        UserError: names or shapes do not fit.
    """
    wanted = model_state(model)
    if set(wanted) != set(checkpoint.model):
        differ = sorted(set(wanted) ^ set(checkpoint.model))
        raise UserError(f"the checkpoint's parameters do not fit: {', '.join(differ[:3])}")
    for name, tensor in wanted.items():
        _copy(tensor, checkpoint.model[name], name)


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _load_optimizer_state(model, optimizer, state: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        try:
            step = state[f"step.{name}"]
            moments = {key: state[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
        except KeyError as error:
            raise UserError(f"the checkpoint's optimizer state lacks {error}") from error
        restored = {"step": step.to(parameter.device)}
        for key, moment in moments.items():
            restored[key] = torch.zeros_like(parameter)
            _copy(restored[key], moment, f"{key}.{name}")
        optimizer.state[parameter] = restored


@torch.no_grad()
def _copy(target: torch.Tensor, source: torch.Tensor, name: str) -> None:
    if target.shape != source.shape or target.dtype != source.dtype:
        raise UserError(
            f"the checkpoint's {name} does not fit: {source.dtype} {tuple(source.shape)},"
            f" not {target.dtype} {tuple(target.shape)}"
        )
    target.copy_(source)
