"""Models of transformers that are compiled: tilebook breaks no graph of theirs and is no reason to compile anew."""

import pytest
from programs.hf_compiled import compiled
from programs.hf_models import CASES

import tilebook


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_graphs_are_as_many_as_without_tilebook(name, kind):
    pytest.importorskip("transformers")
    plain = compiled(name, kind, "cpu")
    with tilebook.enabled():
        assert compiled(name, kind, "cpu") == plain
