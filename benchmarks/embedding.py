"""Embedding: tokens, positions and types added and normalised, as in BERT, and as in GPT-2."""

import sys

from _bench import main, torch_compile

PEERS = {"torch.compile": torch_compile}

if __name__ == "__main__":
    sys.exit(main("embedding", __doc__, PEERS))
