"""What a running program has observed is kept and travels as any verdict, marked, and gives way to measurements."""

import io
import json
from dataclasses import replace

import pytest
from registry_samples import predicted, verdict

from tilebook.registry import Registry, export, load
from tilebook.registry.exchange import import_rule
from tilebook.registry.filereader import reader
from tilebook.registry.layers import standing
from tilebook.registry.overview import overviews
from tilebook.registry.searched import observed
from tilebook.registry.served import of
from tilebook.registry.store import local_rule
from tilebook.report.rows import row, table

MEASURED = verdict()
SEEN = replace(verdict(), origin="observed", mode="eager", notes={"observed": {"rounds": 16, "spent_ms": 20.5}})
PREDICTED = predicted()


@pytest.fixture
def registry(tmp_path):
    with Registry.open(tmp_path / "registry.db", write=True) as opened:
        yield opened


def test_it_is_read_as_it_was_written_and_marked(registry):
    registry.merge((), [SEEN])
    assert registry.verdicts() == [SEEN]
    with reader(registry.target) as file:
        (shown,) = overviews(file)
    assert observed(shown)
    assert not observed(MEASURED)


def test_it_travels_and_is_marked_and_not_trusted_where_it_comes(registry, tmp_path):
    registry.merge((), [SEEN])
    text = io.StringIO()
    export(registry, text)
    with Registry.open(tmp_path / "other.db", write=True) as other:
        load(other, io.StringIO(text.getvalue()), allowed=None)
        (found,) = other.verdicts()
    assert (found.origin, found.trusted, observed(found)) == ("imported", False, True)
    assert replace(found, origin="observed", trusted=True) == SEEN


def test_it_replaces_no_measurement_and_every_measurement_replaces_it(registry):
    registry.merge((), [MEASURED])
    registry.merge((), [SEEN])
    assert registry.verdicts() == [MEASURED]
    assert local_rule(SEEN, MEASURED).replace
    assert local_rule(SEEN, SEEN).replace
    assert not local_rule(MEASURED, SEEN).replace
    assert local_rule(replace(MEASURED, trusted=False), SEEN).replace
    assert local_rule(PREDICTED, SEEN).replace
    assert not local_rule(SEEN, PREDICTED).replace


def test_of_two_that_meet_in_a_merge_the_measurement_stands():
    assert import_rule(SEEN, replace(MEASURED, origin="imported")).replace
    assert not import_rule(MEASURED, SEEN).replace
    assert import_rule(PREDICTED, SEEN).replace
    assert not import_rule(SEEN, replace(MEASURED, origin="imported", trusted=False)).replace
    assert "observed" in import_rule(MEASURED, SEEN).why


def test_no_layer_hides_a_measurement_by_what_was_observed():
    ranks = [standing(of(each, "user")) for each in (replace(MEASURED, trusted=False), PREDICTED, SEEN, MEASURED)]
    assert ranks == sorted(set(ranks))


def test_people_are_told():
    text = io.StringIO()
    shown = row(SEEN, "user")
    assert json.dumps(shown["observed"]) == "true"
    table([shown], text)
    assert "observed" in text.getvalue()
    assert "1.230" in text.getvalue()
    (line,) = [each for each in text.getvalue().splitlines() if "1.230" in each]
    assert line.split()[-2:] == ["–", "1.230"], "it is over PyTorch's own call, and over no default"
    assert text.getvalue().count("default") == 1, "in the head alone"
    text = io.StringIO()
    table([shown], text, brief=True)
    (line,) = [each for each in text.getvalue().splitlines() if "1.230" in each]
    assert line.split()[4:6] == ["–", "1.230"]
