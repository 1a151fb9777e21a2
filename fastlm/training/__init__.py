"""One small training loop that shows the layers at work: byte-level causal language modelling.

`data` reads and splits text, `bigram` is the yardstick, `trainer` steps and evaluates,
`checkpoint` saves and restores exactly, `curve` keeps the losses.
"""
