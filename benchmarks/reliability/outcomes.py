"""A plugin of pytest that tells, as they come, what becomes of the tests of a part: see `pytorchs_tests.py`.

Lines of a file, after each of which it is closed, as a test may end the process: `began TEST`, then `passed`, `failed`
or `skipped`, the test and why. OUTCOMES is the file; LEFT_OUT has, line by line, what is not run; ONLY what is.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    part, parts = map(int, os.environ["PART"].split("/"))
    mine = sorted(items, key=lambda item: item.nodeid)
    random.Random(0).shuffle(mine)  # what takes long is spread over all parts, and a part that is cut short is a sample
    mine = mine[part::parts]
    if "ONLY" in os.environ:
        wanted = set(Path(os.environ["ONLY"]).read_text().splitlines())
        mine = [item for item in mine if item.nodeid in wanted]
    done = set(Path(os.environ["LEFT_OUT"]).read_text().splitlines())
    mine = [item for item in mine if item.nodeid not in done]
    kept = set(mine)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = mine


def pytest_runtest_logstart(nodeid: str) -> None:
    _tell("began", nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        text = str(report.longrepr) if report.failed else ""
        raised = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
        _tell(report.outcome, report.nodeid, " | ".join(raised[:4])[:500])


def _tell(*words: str) -> None:
    with open(os.environ["OUTCOMES"], "a") as file:
        file.write("\t".join(words) + "\n")
