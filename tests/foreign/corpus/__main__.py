"""Somebody's program: python -m corpus DEVICE [KERNEL …]. Runs kernels of the corpus, each by its first config."""

import sys

from corpus import CALLS

if __name__ == "__main__":
    device, *names = sys.argv[1:]
    for name in names or CALLS:
        CALLS[name](device)
