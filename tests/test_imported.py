"""What is done once somebody else's module has been imported; and how transformers gets to know `"tilebook"` by it."""

import importlib
import importlib.util
import inspect
import subprocess
import sys
import zipfile
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from tilebook import imported
from tilebook.imported import after_import

ROOT = Path(__file__).parents[1]

INTERFACE = """
def sdpa_mask(*args, **kwargs):
    return None
class {name}:
    known = _global_mapping = {{"sdpa": sdpa_mask}}
    @classmethod
    def register(cls, key, value):
        cls.known[key] = value
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that can be imported, and is not yet."""
    (tmp_path / "somebodys.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "somebodys"
    sys.modules.pop("somebodys", None)
    sys.meta_path[:] = [each for each in sys.meta_path if getattr(each, "name", "") != "somebodys"]


def test_each_is_called_once_at_the_end_of_the_first_import(module):
    seen = []

    def look():
        seen.append(sys.modules[module].value)

    for _ in range(2):
        after_import(module, look)
    after_import(module, lambda: seen.append("another"))
    assert module not in sys.modules
    assert seen == []
    found = importlib.import_module(module)
    assert seen == [1, "another"]
    assert inspect.getsource(found) == "value = 1\n"
    assert "exec_module" not in vars(found.__loader__)
    assert not any(isinstance(each, imported._Finder) and each.name == module for each in sys.meta_path)
    importlib.reload(found)
    assert seen == [1, "another"]


def test_it_is_called_at_once_where_the_module_is_there(module):
    importlib.import_module(module)
    seen = []
    after_import(module, lambda: seen.append("now"))
    assert seen == ["now"]


def test_it_is_called_after_an_import_that_is_under_way(tmp_path, monkeypatch):
    """As where a module imports PyTorch, which loads what asks for that module."""
    (tmp_path / "halfway.py").write_text(
        "from tilebook.imported import after_import\nimport seen_by\n"
        "after_import('halfway', lambda: seen_by.values.append(__import__('halfway').value))\nvalue = 1\n"
    )
    (tmp_path / "seen_by.py").write_text("values = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        importlib.import_module("halfway")
        assert sys.modules["seen_by"].values == [1]
        assert type(sys.modules["halfway"].__spec__) is ModuleSpec
    finally:
        for name in ("halfway", "seen_by"):
            sys.modules.pop(name, None)


def test_a_loader_may_be_that_of_other_modules_too(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "both.zip", "w") as archive:
        archive.writestr("zipped/__init__.py", "")
        archive.writestr("zipped/wanted.py", "value = 1\n")
        archive.writestr("zipped/other.py", "")
    monkeypatch.syspath_prepend(str(tmp_path / "both.zip"))
    seen = []
    try:
        after_import("zipped.wanted", lambda: seen.append("wanted"))
        importlib.util.find_spec("zipped.wanted")  # somebody looks whether it is there
        importlib.import_module("zipped.other")
        assert seen == []
        importlib.import_module("zipped.wanted")
        assert seen == ["wanted"]
    finally:
        for name in [name for name in sys.modules if name.startswith("zipped")]:
            del sys.modules[name]
        sys.meta_path[:] = [each for each in sys.meta_path if getattr(each, "name", "") != "zipped.wanted"]


def test_what_goes_wrong_in_it_is_a_warning(module):
    after_import(module, lambda: 1 / 0)
    with pytest.warns(RuntimeWarning, match="somebodys: ZeroDivisionError"):
        assert importlib.import_module(module).value == 1


def test_modules_that_are_not_there_or_fail_raise_what_they_would(module, tmp_path):
    seen = []
    after_import("nobodys", lambda: seen.append("called"))
    with pytest.raises(ModuleNotFoundError, match="nobodys"):
        importlib.import_module("nobodys")
    (tmp_path / f"{module}.py").write_text("raise KeyError('broken')\n")
    after_import(module, lambda: seen.append("called"))
    with pytest.raises(KeyError, match="broken"):
        importlib.import_module(module)
    (tmp_path / f"{module}.py").write_text("value = 22\n")
    importlib.invalidate_caches()
    assert seen == []
    assert importlib.import_module(module).value == 22
    assert seen == ["called"]


FORKED = """
import os, sys, warnings
import tilebook, torch
warnings.simplefilter("ignore")
for at in range(len(PROGRAMS)):
    if os.fork():
        os.wait()
        continue
    assert "transformers" not in sys.modules
    sys.path.insert(0, PROGRAMS[at][0])
    try:
        exec(PROGRAMS[at][1])
        from transformers.modeling_utils import AttentionInterface as a
        from transformers.masking_utils import AttentionMaskInterface as m, sdpa_mask
        print("tilebook" in a.known and "tilebook" in m.known, m.known["sdpa"] is not sdpa_mask, flush=True)
    except ImportError as error:
        print(error, flush=True)
    os._exit(0)
"""


def test_transformers_gets_to_know_our_attention_or_is_refused_by_name(tmp_path):
    """And whether notes are taken of its own masks."""
    both = "import transformers.masking_utils, transformers.modeling_utils"
    cases = [
        ("5.17.0", "tilebook.enable(); import transformers.modeling_utils", "True True"),
        ("5.17.0", f"{both}; tilebook.enable()", "True True"),
        ("5.17.0", f"tilebook.enable(); tilebook.disable(); {both}", "True False"),
        ("5.24.0.dev0", "tilebook.register_transformers()", "True False"),
        ("5.17.0", "import transformers.modeling_utils", "False False"),
        ("5.16.3", "tilebook.enable(); import transformers.modeling_utils", "False False"),
        (
            "4.57.1",
            "tilebook.register_transformers()",
            "'tilebook' attention needs transformers 5.17 or newer, not 4.57.1",
        ),
    ]
    for version, *_ in cases:
        package = tmp_path / version / "transformers"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
        for name, interface in (("modeling_utils", "AttentionInterface"), ("masking_utils", "AttentionMaskInterface")):
            (package / f"{name}.py").write_text(INTERFACE.format(name=interface))
    programs = [(str(tmp_path / version), program) for version, program, _ in cases]
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"PROGRAMS = {programs!r}{FORKED}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.stdout.splitlines() == [expected for *_, expected in cases], done.stderr
