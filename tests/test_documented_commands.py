"""Commands that the documentation writes name what there is."""

import re
import shlex
from pathlib import Path

import pytest

from tilebook.cli import main
from tilebook.cli.tuning import _problems
from tilebook.errors import UsageError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
INDENTED = re.compile(r"^    (tilebook [^#\n]+)", re.MULTILINE)


def written():
    """Each line of a page's that is a command and no pattern for one, with its page."""
    for page in PAGES:
        for line in INDENTED.findall(page.read_text()):
            for command in re.split(r"[;&|]+ ", line):
                if command.startswith("tilebook ") and not re.search("[…<]", command):
                    yield page.name, shlex.split(command)[1:]


COMMANDS = list(written())


def test_there_are_some():
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_a_command_of_the_documentation_is_one(page, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("verdicts.jsonl", "FILE.jsonl"):
        Path(file).touch()
    name, *rest = words
    command = main.get_command(None, name)
    assert command is not None
    while rest and hasattr(command, "commands") and rest[0] in command.commands:
        command, rest = command.commands[rest[0]], rest[1:]
    if not hasattr(command, "commands"):
        given = command.make_context(name, list(rest)).params
        if name == "tune" and (given["suites"] or given["shapes"]):
            chosen = given["families"], given["suites"], given["shapes"], given["dtype"], given["direction"]
            assert _problems(*chosen)


def test_an_op_is_tuned_by_its_name_and_others_of_its_family_are_not():
    ((op, _),) = _problems(["attention_bwd"], [], ["B8,H16,S2048,D128"], "bf16", "both")
    assert op.name == "attention_bwd"
    found = _problems(["attention_fwd", "pooling"], ["quick", "tokenizers"], [], "bf16", "both")
    assert {op.name for op, _ in found} == {"attention_fwd", "max_pool2d_bwd"}
    with pytest.raises(UsageError, match="no kernel family or op 'attention_up'"):
        _problems(["attention_up"], [], ["B8,H16,S2048,D128"], "bf16", "both")
