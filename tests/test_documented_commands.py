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


def helped(group=main, above=()):
    """Each line of a help's examples, with the name of the command that has it."""
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        for line in re.findall(r"^  (tilebook .+?)(?: [|<] .*)?$", command.epilog, re.MULTILINE):
            yield " ".join((*above, name, "--help")), shlex.split(line)[1:]
        if hasattr(command, "commands"):
            yield from helped(command, (*above, name))


COMMANDS = [*written(), *helped()]


def test_there_are_some():
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_a_command_of_the_documentation_is_one(page, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("verdicts.jsonl", "FILE.jsonl", "spaces.json"):
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
        if name == "sweep":
            assert _problems([given["what"]], given["suites"], given["shapes"], given["dtype"], given["direction"])


def test_the_readme_counts_the_verdicts_that_ship():
    files = (ROOT / "tilebook" / "shipped").glob("*/*.jsonl")
    there = sum(len(each.read_text().splitlines()) - 1 for each in files)
    told = re.findall(r"(\d+) verdicts that ship", (ROOT / "README.md").read_text())
    assert set(map(int, told)) == {there}


def test_a_suite_that_a_family_lacks_is_not_among_those_that_are_named():
    with pytest.raises(UsageError, match=r"no suite 'quick' of rms_norm; there are [^q]+: name one with --suite"):
        _problems(["rms_norm"], [], [], "bf16", "both")
    with pytest.raises(UsageError, match=r"no suite 'seed' \(did you mean seeds\?\); there are biases, "):
        _problems([], ["seed"], [], "bf16", "both")


def test_an_op_is_tuned_by_its_name_and_others_of_its_family_are_not():
    ((op, _),) = _problems(["attention_bwd"], [], ["B8,H16,S2048,D128"], "bf16", "both")
    assert op.name == "attention_bwd"
    found = _problems(["attention_fwd", "pooling"], ["quick", "tokenizers"], [], "bf16", "both")
    assert {op.name for op, _ in found} == {"attention_fwd", "max_pool2d_bwd"}
    with pytest.raises(UsageError, match="no kernel family or op 'attention_up'"):
        _problems(["attention_up"], [], ["B8,H16,S2048,D128"], "bf16", "both")
