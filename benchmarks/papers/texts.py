"""Texts of two kinds, as numbers: reviews of films from a folder, or what installed packages say of themselves."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch

VOCABULARY = 30522
_WORDS = re.compile(r"[a-z0-9']+|[^\w\s]")
_QUOTED = re.compile(r'"""(.*?)"""', re.DOTALL)
_LEAST = 8
"""Words of a text that counts."""

Split = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Texts:
    """ids (N, tokens), 0 where a text is over, and labels 0 or 1; to learn from, and to be asked about."""

    name: str
    train: Split
    test: Split


def numbers(text: str, tokens: int, vocabulary: int) -> list[int]:
    """Each word's hash, behind a first token that the classifier reads."""
    found = [3 + crc32(word.encode()) % (vocabulary - 3) for word in _WORDS.findall(text.lower())[: tokens - 1]]
    return [1, *found, *[0] * (tokens - 1 - len(found))]


def _split(kinds: tuple[Iterable[str], Iterable[str]], tokens: int, vocabulary: int, most: int) -> Split:
    """As many of one kind as of the other, in an order that a seed has drawn."""
    lists = [list(each) for each in kinds]
    count = min(most // 2, *map(len, lists))
    drawn = [[each[n * len(each) // count] for n in range(count)] for each in lists]
    ids = torch.tensor([numbers(text, tokens, vocabulary) for each in drawn for text in each])
    order = torch.randperm(2 * count, generator=torch.Generator().manual_seed(0))
    return ids[order], torch.arange(2).repeat_interleave(count)[order]


def imdb(folder: Path, tokens: int, vocabulary: int, most: int) -> Texts:
    """Maas et al. 2011: train and test, in each of them pos and neg."""

    def read(part: str) -> Split:
        kinds = [[file.read_text() for file in sorted((folder / part / kind).glob("*.txt"))] for kind in ("neg", "pos")]
        return _split((kinds[0], kinds[1]), tokens, vocabulary, most)

    return Texts("IMDb", read("train"), read("test"))


def packages(tokens: int, vocabulary: int, most: int, joined: bool = False) -> Texts:
    """Quoted texts of Python's standard library and of PyTorch, no file's on both sides of the split.

    joined: a file's texts follow each other in one until that is as long as can be read.
    """
    folders = Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent

    def quoted(folder: Path, asked: bool) -> Iterator[str]:
        for file in sorted(folder.rglob("*.py")):
            name = str(file.relative_to(folder))
            if "site-packages" not in name and (crc32(name.encode()) % 4 == 0) == asked:
                long = ""
                for text in _QUOTED.findall(file.read_text(errors="replace")):
                    long = f"{long} {text}" if joined else text
                    if len(long.split()) >= (tokens if joined else _LEAST):
                        yield long
                        long = ""
                if joined and len(long.split()) >= _LEAST:
                    yield long

    train, test = (
        _split((quoted(folders[0], asked), quoted(folders[1], asked)), tokens, vocabulary, most)
        for asked in (False, True)
    )
    return Texts("texts of Python's library or of PyTorch", train, test)


def tiny(tokens: int, vocabulary: int) -> Texts:
    pair = _split(tuple([f"{word} {n} " * 5 for n in range(16)] for word in ("good", "bad")), tokens, vocabulary, 32)
    return Texts("made up", pair, pair)
