"""fastlm's attention as an attention implementation of Hugging Face transformers.

`register` uses the two public registries. The one of masks matters as much as the one of functions:
without an entry there a model passes no mask, and padding and causality are silently lost.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import nn

from fastlm.ops._check import fail, make_seed
from fastlm.ops.attention import attention
from fastlm.ops.attention_variants import attention_weights

NAME = "fastlm"
# Beyond SDPA these models need `softcap` or `s_aux` alone, which `attention_forward` takes.
_MORE_THAN_SDPA = ("gemma2", "gpt_oss", "t5gemma", "vaultgemma")


def register() -> None:
    """Makes `attn_implementation="fastlm"` known to transformers; more calls change nothing.

    Raises:
        RuntimeError: transformers is missing or older than 5.0, where models of many families
            build their masks in other ways.
    """
    try:
        import transformers
    except ImportError as error:
        got = "none; run: pip install 'fastlm[hf]'"
        raise fail("register", "transformers", "be installed", got, RuntimeError) from error
    if too_old(transformers.__version__):
        got = f"{transformers.__version__}; run: pip install -U transformers"
        raise fail("register", "transformers", "be version 5.0 or newer", got, RuntimeError)
    transformers.AttentionInterface.register(NAME, attention_forward)
    transformers.AttentionMaskInterface.register(NAME, attention_mask)


def too_old(version: str) -> bool:
    return int(version.partition(".")[0]) < 5


def attention_mask(*args, mask_function=None, **kwargs) -> torch.Tensor | None:
    """The boolean mask, True = attend, (batch, 1, seqlen_q, seqlen_k), for transformers' arguments.

    None where every query may attend to every key, and where `is_causal` says it all.
    """
    from transformers import masking_utils

    if mask_function is masking_utils.bidirectional_mask_function:
        mask_function = _every_key  # padding then stays (batch, 1, 1, seqlen_k) in memory
    if mask_function is not None:
        kwargs["mask_function"] = mask_function
    return masking_utils.sdpa_mask(*args, **kwargs)


def _every_key(batch, head, query, key):
    return key >= 0


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    output_attentions: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`fastlm.attention` behind transformers' interface.

    Args:
        query, key, value: (batch, nheads, seqlen, headdim), key and value with nheads_k heads.
        attention_mask: boolean, True = attend, or floating, added to the scores.
        is_causal: the module's attribute where None. As in transformers it only counts without a
            mask and for more than one query, and starts at the first key.
        position_bias: added to the scores; differentiable.
        softcap: of the scores (Gemma 2).
        s_aux: (nheads,), the sinks (gpt-oss).
        output_attentions: also return the probabilities, after dropout.

    Returns:
        (batch, seqlen_q, nheads, headdim), and the probabilities or None.
    """
    for name in ("cache", "head_mask"):
        if kwargs.get(name) is not None:
            got = f"{type(kwargs[name]).__name__}; use attn_implementation='sdpa'"
            raise fail("attn_implementation='fastlm'", name, "be None", got, NotImplementedError)
    batch = max(x.shape[0] for x in (query, key, value))
    q, k, v = (x.expand(batch, -1, -1, -1).transpose(1, 2) for x in (query, key, value))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = is_causal and attention_mask is None and query.shape[2] > 1
    mask, bias = None, position_bias
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
        if attention_mask.dtype == torch.bool:
            mask = attention_mask
        else:
            bias = attention_mask if bias is None else bias + attention_mask
    options = {
        "causal": "top_left" if causal else False,
        "softmax_scale": scaling,
        "mask": mask,
        "bias": bias,
        "softcap": softcap,
        "sinks": s_aux,
        "dropout_p": dropout,
        "seed": make_seed(None, dropout, query.device),
    }
    if not output_attentions:
        return attention(q, k, v, **options), None
    out, lse = attention(q, k, v, return_lse=True, **options)
    return out, attention_weights(q, k, lse, **options)


def pretrained_models(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost Hugging Face models in a model, with their names."""
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel

    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module not in inside:
            inside.update(module.modules())
            yield name, module


def attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of a Hugging Face model that look up its attention implementation.

    A model without any has its own attention; then those are returned, to be reported.
    """
    named = [(n, m) for n, m in model.named_modules() if "Attention" in type(m).__name__]
    using = [(n, m) for n, m in named if hasattr(vars(m).get("config"), "_attn_implementation")]
    own = [(n, m) for n, m in named if any(isinstance(c, nn.Linear) for c in m.children())]
    return using or [(n, m) for n, m in own if not isinstance(m, nn.MultiheadAttention)]


def uses_fastlm(module: nn.Module) -> bool:
    """Whether an attention module's config names fastlm."""
    return getattr(vars(module).get("config"), "_attn_implementation", None) == NAME


def refusal(model: nn.Module) -> str | None:
    """Why a Hugging Face model cannot take fastlm's attention; None if it can."""
    import transformers

    if too_old(transformers.__version__):
        return f"transformers is older than 5.0: {transformers.__version__}"
    if not any("config" in vars(module) for _, module in attention_modules(model)):
        return f"{type(model).__name__} does not use transformers' AttentionInterface"
    for part in _parts(model):
        name = type(part).__name__
        if not part._can_set_attn_implementation():
            return f"{name} does not use transformers' AttentionInterface"
        if not part._supports_sdpa and part.config.model_type not in _MORE_THAN_SDPA:
            return f"{name} needs more of attention than SDPA's arguments"
    if any(_scale_is_kept_back(module) for _, module in attention_modules(model)):
        return "this transformers ignores GPT-2's scale_attn flags outside of eager attention"
    return None


def _scale_is_kept_back(module: nn.Module) -> bool:
    """GPT-2 before https://github.com/huggingface/transformers/pull/44397."""
    plain = getattr(module, "scale_attn_weights", True) and not getattr(
        module, "scale_attn_by_inverse_layer_idx", False
    )
    return not plain and not hasattr(module, "scaling")


def set_attention(model: nn.Module) -> None:
    """Switches a Hugging Face model to fastlm's attention and notes what it had."""
    register()
    for part in _parts(model):
        vars(part)["_fastlm_attention"] = part.config._attn_implementation
    model.set_attn_implementation(NAME)


def restore_attention(model: nn.Module) -> None:
    """Undoes `set_attention` in every part that still has fastlm's; an outer model goes first."""
    noted = [part for part in model.modules() if "_fastlm_attention" in vars(part)]
    before = [(part, vars(part).pop("_fastlm_attention")) for part in noted]
    before = [(part, name) for part, name in before if part.config._attn_implementation == NAME]
    for part, name in before:
        part.set_attn_implementation(name)


def _parts(model: nn.Module) -> list[nn.Module]:
    from transformers import PreTrainedModel

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]
