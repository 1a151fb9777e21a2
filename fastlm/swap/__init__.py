"""fastlm in models that exist already: `swap` and its inverse, a check, and attention by name.

    report = swap(model)                      # in place; print(report)
    print(verify(model, inputs))              # errors of outputs and gradients
    unswap(model)                             # bitwise as before

    register()                                # AutoModel...(attn_implementation="fastlm")
    with activate_sdpa(): ...                 # every F.scaled_dot_product_attention

No attribute of another package is assigned, and no class of another package is changed.
"""

from fastlm.swap.huggingface import register
from fastlm.swap.parity import ParityReport, verify
from fastlm.swap.report import SwapReport
from fastlm.swap.sdpa import activate_sdpa
from fastlm.swap.swapping import swap, unswap

__all__ = [
    "ParityReport",
    "SwapReport",
    "activate_sdpa",
    "register",
    "swap",
    "unswap",
    "verify",
]
