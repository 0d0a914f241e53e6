"""What `import tilebook` offers, to programs, editors and type checkers; and what it costs to import."""

import importlib
import pkgutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import tilebook
from tilebook import kernels

ROOT = Path(__file__).parents[1]


def program(text):
    """Runs a program in a process of its own; returns what it prints."""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_offers_what_its_families_export():
    families = [family.name for family in pkgutil.iter_modules(kernels.__path__)]
    modules = {
        f"kernels.{family}": importlib.import_module(f"tilebook.kernels.{family}").__all__ for family in families
    }
    modules["enabling"] = ["disable", "enable", "enabled", "register_kernels", "register_transformers", "status"]
    modules["dispatch.probing"] = ["probe"]
    modules["foreign.autotune"], modules["scripted"] = ["autotune"], ["tune"]
    modules["foreign.spaces"] = ["give_space"]
    modules["patching"] = ["patch", "patched"]
    exported = {name: module for module, names in modules.items() for name in names}
    assert exported == tilebook._MODULE
    assert sorted(exported) == tilebook.__all__
    for name, module in exported.items():
        assert getattr(tilebook, name) is getattr(importlib.import_module(f"tilebook.{module}"), name)
    assert set(exported) <= set(dir(tilebook))
    assert "nn" in dir(tilebook)
    assert not {"Any", "TYPE_CHECKING", "annotations", "importlib"} & set(dir(tilebook))


def test_a_name_that_is_not_offered_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'tilebook' has no attribute 'attnetion'"):
        tilebook.attnetion  # noqa: B018
    assert not hasattr(tilebook, "__wrapped__")


def test_importing_the_package_loads_nothing_but_itself():
    loaded = program(
        "import sys; before = set(sys.modules); import tilebook; print(*sorted(set(sys.modules) - before))"
    )
    heavy = {"torch", "triton", "sqlalchemy", "optuna", "numpy", "click", "rich", "alembic"}
    assert not heavy & {name.split(".")[0] for name in loaded.split()}
    assert [name for name in loaded.split() if name.startswith("tilebook")] == ["tilebook"]


@pytest.mark.usefixtures("forked")
def test_modules_are_there_when_they_are_asked_for():
    assert program("import tilebook; print(tilebook.nn.LayerNorm(4).eps)") == "1e-05"


@pytest.mark.usefixtures("forked")
def test_touching_one_family_imports_no_other():
    loaded = program(
        "import sys, tilebook; tilebook.rms_norm; print(*(m for m in sys.modules if m.startswith('tilebook.kernels.')))"
    )
    assert {name.split(".")[2] for name in loaded.split()} == {"norms"}


BROKEN = """
import importlib, warnings, tilebook
real = importlib.import_module

def failing(name):
    module = real(name)  # its ops are registered by the time it fails
    if name == "tilebook.kernels.decode.ops":
        raise ImportError("gluon has another interface here")
    return module

importlib.import_module = failing
"""


@pytest.mark.usefixtures("forked")
def test_a_family_that_cannot_be_imported_takes_no_other_down_and_the_list_of_ops_names_it():
    said = program(
        BROKEN
        + """
tilebook.rms_norm, tilebook.mlp
from tilebook import op
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    print(*op.ops())
print(*(each.message for each in seen))
try:
    op.get("attention_decode")
except op.UsageError as wrong:
    print(wrong)
"""
    )
    known, warned, refused = said.splitlines()
    assert {"rms_norm_fwd", "mlp_up_fwd", "attention_fwd", "attention_varlen_fwd"} <= set(known.split())
    assert "attention_decode" not in known.split()
    reason = "kernel family decode cannot be imported: ImportError: gluon has another interface here"
    assert reason in warned
    assert reason in refused


CONSUMER = """\
import torch
import tilebook
from tilebook import mlp, scaled_dot_product_attention

x = torch.zeros(2, 3, 64, 64)
row = torch.zeros(64)
lens = torch.zeros(2, dtype=torch.int32)
a: torch.Tensor = tilebook.attention(x, x, x, causal=True)
b: torch.Tensor = tilebook.attention_decode(x, x, x, seq_lens=lens)
c: torch.Tensor = tilebook.attention_varlen(x[0], x[0], x[0], lens, lens, max_seqlen_q=1, max_seqlen_k=1)
a, lse = tilebook.attention(x, x, x, causal="bottom_right", return_lse=True)
b, lse = tilebook.attention_decode(x, x, x, return_lse=True)
c, lse = tilebook.attention_varlen(x[0], x[0], x[0], lens, lens, max_seqlen_q=1, max_seqlen_k=1, return_lse=True)
y: torch.Tensor = tilebook.rms_norm(x, row)
z: torch.Tensor = mlp(x, x, None, x, None)
w: torch.Tensor = scaled_dot_product_attention(x, x, x, is_causal=True)
norm: torch.nn.LayerNorm = tilebook.nn.LayerNorm(64)
tilebook.attention(x, x, x, casual=True)  # wrong: no such option
tilebook.rms_norm(x, 1.0)  # wrong: a weight that is no tensor
both: torch.Tensor = tilebook.attention(x, x, x, return_lse=True)  # wrong: two tensors
number: int = tilebook.mlp(x, x, None, x, None)  # wrong: a tensor
tilebook.attnetion(x, x, x)  # wrong: no such function
"""


@pytest.mark.long
def test_a_type_checker_sees_the_functions_and_their_arguments(tmp_path, pytestconfig):
    pytest.importorskip("mypy")
    seen = pytestconfig.cache.mkdir("mypy")  # PyTorch's types, which take most of the time the first time
    assert resources.files(tilebook).joinpath("py.typed").is_file()
    (tmp_path / "consumer.py").write_text(CONSUMER, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent", "--no-pretty"]
    command += ["--cache-dir", str(seen), "consumer.py"]
    environment = {"MYPYPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    wrong = [number for number, line in enumerate(CONSUMER.splitlines(), 1) if "# wrong" in line]
    found = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert sorted({int(line.split(":")[1]) for line in found}) == wrong, done.stdout + done.stderr
