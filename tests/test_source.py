"""A kernel's digest changes with what it computes, and with nothing else."""

import importlib
import sys
import textwrap

import pytest

from tilebook.source import digest

KNOWN = "9b7fa0d80384a38690400e1322cc0cbb398185c74a17c27e9cc5ff7ec1585f88"


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """The toy module with a text replaced in it, imported afresh."""
    monkeypatch.syspath_prepend(str(tmp_path))
    with open(f"{__file__.rsplit('/', 1)[0]}/toy_source.py") as source:
        text = source.read()

    def load(old="", new=""):
        assert old in text
        sys.modules.pop("toy_source", None)
        importlib.invalidate_caches()
        (tmp_path / "toy_source.py").write_text(text.replace(old, new) if old else text)
        module = importlib.import_module("toy_source")
        importlib.reload(module)
        return module

    yield load
    sys.modules.pop("toy_source", None)


def test_digest_is_the_same_in_every_version_of_python(edited):
    assert digest(edited().entry) == KNOWN


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Not part of the digest.", "Something else."),
        ("  # nor is this", ""),
        ("def entry(x, y):", "\n\ndef entry(\n    x,\n    y,\n):"),
        ('"""Functions whose', '"""Some functions whose'),
    ],
    ids=["docstring", "comment", "layout", "module"],
)
def test_words_and_layout_do_not_count(edited, old, new):
    assert digest(edited(old, new).entry) == KNOWN


@pytest.mark.parametrize(
    ("old", "new"),
    [("FACTOR = 3", "FACTOR = 4"), ("x * FACTOR", "x + FACTOR"), ("-1.5e3", "-1.5e4"), ("total[1:2]", "total[1:3]")],
    ids=["constant", "helper", "literal", "slice"],
)
def test_whatever_it_computes_with_counts(edited, old, new):
    assert digest(edited(old, new).entry) != KNOWN


def _two_packages(directory, monkeypatch):
    """Packages `alpha` and `alphabet`: a function of the first reaches one of each, by name and through a module."""
    files = {
        "alpha/__init__.py": "",
        "alpha/deep/__init__.py": "",
        "alpha/deep/entry.py": """
            from typing import NamedTuple

            from alpha import helpers
            from alpha.other import doubled
            from alphabet import foreign


            class Sizes(NamedTuple):
                rows: int
                columns: int


            def entry(x):
                return helpers.halved(doubled(foreign(Sizes(x, x).rows)))
        """,
        "alpha/other.py": "def doubled(x):\n    return x * 2\n",
        "alpha/helpers.py": "def halved(x):\n    return x / 2\n",
        "alphabet/__init__.py": "def foreign(x):\n    return x + 1\n",
    }
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # edits within a second would leave it as it was

    def load(name="", old="", new=""):
        if name:
            text = (directory / name).read_text()
            assert old in text
            (directory / name).write_text(text.replace(old, new))
        for module in [each for each in sys.modules if each.split(".")[0] in ("alpha", "alphabet")]:
            del sys.modules[module]
        importlib.invalidate_caches()
        return digest(importlib.import_module("alpha.deep.entry").entry)

    return load


@pytest.mark.parametrize(
    ("name", "old", "new", "counts"),
    [
        ("alpha/other.py", "x * 2", "x * 3", True),
        ("alpha/helpers.py", "x / 2", "x / 3", True),
        ("alpha/deep/entry.py", "rows: int\n    columns: int", "columns: int\n    rows: int", True),
        ("alphabet/__init__.py", "x + 1", "x + 2", False),
    ],
    ids=["another folder", "through a module", "fields of a named tuple", "a package whose name begins alike"],
)
def test_the_whole_package_counts_and_no_other(tmp_path, monkeypatch, name, old, new, counts):
    load = _two_packages(tmp_path, monkeypatch)
    before = load()
    assert (load(name, old, new) != before) == counts
