"""Cases in which every two values of different options meet, without their whole product."""

from __future__ import annotations

import itertools
import random


def pairwise(**options) -> list[dict]:
    """A deterministic list of cases, each with one value of every option, covering all pairs.

    Args:
        options: the values of each option, in a sequence.
    """
    generator = random.Random(0)
    names = list(options)
    missing = {
        frozenset({(a, i), (b, j)})
        for a, b in itertools.combinations(names, 2)
        for i in range(len(options[a]))
        for j in range(len(options[b]))
    }
    cases = []
    while missing:
        # One missing pair in every candidate, so that each case brings something.
        seed = dict(min(missing, key=sorted))
        candidates = [
            {n: seed.get(n, generator.randrange(len(options[n]))) for n in names} for _ in range(40)
        ]
        covered = [_pairs(candidate) & missing for candidate in candidates]
        best = max(range(len(candidates)), key=lambda i: len(covered[i]))
        missing -= covered[best]
        cases.append({name: options[name][i] for name, i in candidates[best].items()})
    return cases


def _pairs(case: dict) -> set[frozenset]:
    return {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}
