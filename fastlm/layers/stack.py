"""Stacks of encoder and decoder layers, and the encoder-decoder Transformer."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from fastlm.backends import Impl
from fastlm.layers.block import TransformerDecoderLayer, TransformerEncoderLayer
from fastlm.layers.ffn import Activation
from fastlm.layers.norm import LayerNorm
from fastlm.ops._check import fail


class TransformerEncoder(nn.Module):
    """`torch.nn.TransformerEncoder`: `num_layers` copies of a layer, then an optional norm.

    Args:
        encoder_layer: a `TransformerEncoderLayer`, or a module with its forward signature.
        num_layers: number of copies.
        norm: applied to the last layer's output.
        enable_nested_tensor, mask_check: accepted for torch.nn's signature. Padding is never
            converted to nested tensors, so evaluation and training compute the same at every
            position, padded ones included (torch.nn's evaluation may write zeros there).
    """

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ):
        super().__init__()
        self.layers = _copies("TransformerEncoder", encoder_layer, num_layers)
        self.num_layers = num_layers
        self.norm = norm
        self.enable_nested_tensor = enable_nested_tensor
        self.mask_check = mask_check

    def forward(
        self,
        src: torch.Tensor,
        mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
    ) -> torch.Tensor:
        """Arguments as in `TransformerEncoderLayer`.

        `is_causal=None` uses `mask` as it is: finding out whether it is the causal one, as torch.nn
        does, would wait for the device. Pass True to skip reading the mask.
        """
        x = src
        for layer in self.layers:
            x = layer(
                x,
                src_mask=mask,
                is_causal=bool(is_causal),
                src_key_padding_mask=src_key_padding_mask,
            )
        return x if self.norm is None else self.norm(x)


class TransformerDecoder(nn.Module):
    """`torch.nn.TransformerDecoder`: `num_layers` copies of a layer, then an optional norm.

    Args:
        decoder_layer: a `TransformerDecoderLayer`, or a module with its forward signature.
        num_layers: number of copies.
        norm: applied to the last layer's output.
    """

    def __init__(self, decoder_layer: nn.Module, num_layers: int, norm: nn.Module | None = None):
        super().__init__()
        self.layers = _copies("TransformerDecoder", decoder_layer, num_layers)
        self.num_layers = num_layers
        self.norm = norm

    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        """Arguments as in `TransformerDecoderLayer`; `tgt_is_causal=None` is no hint."""
        x = tgt
        for layer in self.layers:
            x = layer(
                x,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=bool(tgt_is_causal),
                memory_is_causal=memory_is_causal,
            )
        return x if self.norm is None else self.norm(x)


class Transformer(nn.Module):
    """`torch.nn.Transformer`: an encoder and a decoder.

    Args:
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout,
            activation, custom_encoder, custom_decoder, layer_norm_eps, batch_first, norm_first,
            bias, device, dtype: as in `torch.nn.Transformer`.
        impl: the backend of every operator; None chooses for each.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        custom_encoder: nn.Module | None = None,
        custom_decoder: nn.Module | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        impl: Impl | None = None,
    ):
        super().__init__()
        place = {"device": device, "dtype": dtype, "impl": impl}
        layer = (d_model, nhead, dim_feedforward, dropout, activation)
        layer += (layer_norm_eps, batch_first, norm_first, bias)
        if custom_encoder is None:
            encoder_layer = TransformerEncoderLayer(*layer, **place)
            norm = LayerNorm(d_model, layer_norm_eps, bias=bias, **place)
            custom_encoder = TransformerEncoder(encoder_layer, num_encoder_layers, norm)
        self.encoder = custom_encoder
        if custom_decoder is None:
            decoder_layer = TransformerDecoderLayer(*layer, **place)
            norm = LayerNorm(d_model, layer_norm_eps, bias=bias, **place)
            custom_decoder = TransformerDecoder(decoder_layer, num_decoder_layers, norm)
        self.decoder = custom_decoder
        self.reset_parameters()
        self.d_model = d_model
        self.nhead = nhead
        self.batch_first = batch_first

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices, each layer's own: copies of a layer start alike without it."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        src: torch.Tensor,
        tgt: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        """Arguments as in the layers; None for `src_is_causal` or `tgt_is_causal` is no hint."""
        self._check(src, tgt)
        memory = self.encoder(
            src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal
        )
        return self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )

    def _check(self, src: torch.Tensor, tgt: torch.Tensor) -> None:
        for name, x in (("src", src), ("tgt", tgt)):
            if x.shape[-1] != self.d_model:
                raise fail("Transformer", name, f"have width {self.d_model}", x.shape[-1])
        batch = 0 if self.batch_first else 1
        if src.dim() == 3 and src.shape[batch] != tgt.shape[batch]:
            want = f"have src's batch size {src.shape[batch]}"
            raise fail("Transformer", "tgt", want, tgt.shape[batch])

    @staticmethod
    def generate_square_subsequent_mask(
        sz: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The additive causal mask, (sz, sz): -inf above the diagonal, 0 elsewhere."""
        return torch.full((sz, sz), float("-inf"), dtype=dtype, device=device).triu(1)


def _copies(op: str, layer: nn.Module, num_layers: int) -> nn.ModuleList:
    if not isinstance(num_layers, int) or num_layers < 1:
        raise fail(op, "num_layers", "be a positive integer", num_layers)
    return nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))
