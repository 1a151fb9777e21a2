"""Benchmarks of the operators, each provider checked against the oracle before it is timed.

`cases` says what is measured, `check` applies the oracle, `timing` takes times, `machine` names the
device and its ceilings, `results` holds rows, CSV and tables, `run` puts them together. The scripts
in the repository's `benchmarks/` add other libraries to the providers.
"""

from fastlm.bench.cases import CASES, Case, Work
from fastlm.bench.results import Row, append_csv, plot, read_csv, table
from fastlm.bench.run import run_case, run_op

__all__ = [
    "CASES",
    "Case",
    "Row",
    "Work",
    "append_csv",
    "plot",
    "read_csv",
    "run_case",
    "run_op",
    "table",
]
