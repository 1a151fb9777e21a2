"""Embedding: tokens and positions added and normalised, as in BERT."""

import sys

from _bench import main, torch_compile

PEERS = {"torch.compile": torch_compile}

if __name__ == "__main__":
    sys.exit(main("embedding", __doc__, PEERS))
