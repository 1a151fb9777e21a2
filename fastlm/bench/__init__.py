"""Benchmarks of the operators, each provider checked against the oracle before it is timed.

`cases` says what is measured, `check` applies the oracle, `timing` takes times, `machine` names the
device and its ceilings, `results` holds rows, CSV and tables, `run` puts them together. The scripts
in the repository's `benchmarks/` add other libraries to the providers.
"""
