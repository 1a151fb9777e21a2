"""RMSNorms outside torch.nn: of Llama, Gemma, T5 and their descendants."""

from __future__ import annotations

from fastlm.swap.fused import RMSNorm
from fastlm.swap.rules import Plan, become, leave, matches, own_forward
from fastlm.swap.structure import rms_casting

NAMES = ("*RMSNorm", "*T5LayerNorm")
EPS = ("variance_epsilon", "eps")


def rms_norm(module, plans) -> Plan | None:
    """Any class of these names with one weight, if its numbers are those of one of our castings."""
    if not matches(module, NAMES):
        return None
    if [name for name, _ in module.named_parameters()] != ["weight"] or module.weight.dim() != 1:
        return leave("norm", "it has other parameters than one weight per column")
    if reason := own_forward(module):
        return leave("norm", reason)
    for name in EPS:
        eps = vars(module).get(name)
        if isinstance(eps, float) and (casting := rms_casting(module, eps)):
            facts = (("_fastlm_eps", name), ("_fastlm_casting", casting))
            return become("norm", module, RMSNorm, f"rms_norm ({casting})", facts)
    return leave("norm", "its numbers are those of no casting of fastlm.rms_norm")


RULES = (rms_norm,)
