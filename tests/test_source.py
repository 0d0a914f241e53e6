"""A kernel's digest changes with what it computes, and with nothing else."""

import importlib
import sys

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
