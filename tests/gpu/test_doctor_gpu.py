"""The doctor on a GPU: our kernels give the known answers."""

import pytest

from tilebook.report.doctor import findings

pytestmark = pytest.mark.gpu


def test_known_answers_are_right():
    found = [each for each in findings() if each.about.startswith("known answer")]
    assert len(found) > 4
    assert {each.level for each in found} == {"ok"}, found
