"""Kernels without an autotuner: spaces from outside, recorded, tuned and served as if they had one; or refused."""

import json
import sys
import warnings

import others
import plain
import pytest
import torch
import triton
from click.testing import CliRunner
from recorded import recording, tune
from served import on_an_h200, stored, verdict
from triton.runtime.errors import OutOfResources

import tilebook
from tilebook.cli import main
from tilebook.errors import UsageError
from tilebook.foreign import record, serving
from tilebook.foreign.kernel import autotuner
from tilebook.foreign.spaces import give_spaces
from tilebook.registry import Registry

pytestmark = pytest.mark.usefixtures("forked_here")

WIDE = {"BLOCK": (16, 32, 64), "num_warps": (2, 4)}
X = torch.randn(100)


@pytest.fixture(autouse=True)
def plain_again():
    yield
    for kernel in (plain.shift_kernel, plain.rows_kernel):
        vars(kernel).pop("run", None)


def launches(monkeypatch, kernel=plain.shift_kernel):
    """The grid, BLOCK and num_warps of each launch from now on. Before a space is given."""
    seen, run = [], kernel.run

    def noted(*args, grid, warmup, **kwargs):
        meta = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        seen.append((tuple(grid(meta)) if callable(grid) else grid, meta["BLOCK"], meta.get("num_warps")))
        return run(*args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(type(kernel), "run", lambda self, *args, **kwargs: noted(*args, **kwargs))
    return seen


def noted(folder, calls):
    """What a program's record has of its kernels, by name."""
    with recording(folder) as made:
        calls()
    assert made.left_out == {}
    return {each.name: each for each in record.read(folder)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spaces")
    tilebook.give_space("plain:shift_kernel", {**WIDE, "UP": (False, True)}, key=["n"])
    tilebook.give_space(plain.rows_kernel, {"BLOCK": (16, 32, 64)}, grid="same")
    with recording(folder / "record") as made:
        assert torch.equal(plain.shift(X), X + 1)
        plain.rows(torch.randn(3, 80))
    assert made.left_out == {}
    return folder


def test_a_call_is_known_by_its_constants_and_by_what_the_program_chose_itself(folder):
    entries = {each.name: each for each in record.read(folder / "record")}
    assert [json.loads(key) for key in entries["shift_kernel"].problems] == [
        {"dtype": "fp32,fp32", "key": {"n": 100, "BLOCK": 16, "num_warps": 2, "UP": True}}
    ]
    (rows,) = entries["rows_kernel"].problems
    assert json.loads(rows)["key"] == {"BLOCK": 32}
    (call,) = entries["rows_kernel"].problems[rows].calls
    assert call.grids == ((3,), (3,), (3,))


@pytest.mark.long
def test_what_the_program_runs_is_the_baseline_and_the_word_on_what_is_right(folder):
    states = tune(folder / "record", folder / "registry.db")
    assert [state.error for state in states] == ["", ""]
    with Registry.open(folder / "registry.db") as registry:
        found = {each.op.partition(":")[2]: each for each in registry.verdicts()}
        refused = [t.config for t in registry.trials() if t.failure == "wrong_answer"]
    shift = found["shift_kernel"]
    assert (shift.config["BLOCK"], shift.config["UP"]) == (64, True)
    default = next(each for each in shift.finalists if each.default)
    assert default.config == {"BLOCK": 16, "num_warps": 2, "UP": True}
    assert len(refused) == 6  # most of the space
    assert not any(each["UP"] for each in refused)
    assert found["rows_kernel"].config == {"BLOCK": 64}


def test_it_is_compiled_for_a_gpu_that_is_not_here(folder, tmp_path):
    command = ["tune", "--recorded", folder / "record", "--gpu", "H100", "--registry", tmp_path / "registry.db"]
    command += ["--trials", 2, "--workers", 1, "--format", "json"]
    done = CliRunner().invoke(main, list(map(str, command)), catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert {row["status"] for row in json.loads(done.stdout)} == {"predicted"}


def served(registry, space, monkeypatch, block, **options):
    """The launches, once a verdict says that this block is best for `shift`."""
    on_an_h200(monkeypatch, registry)
    seen = launches(monkeypatch)
    tilebook.give_space(plain.shift_kernel, space, **options)
    tuner = autotuner(plain.shift_kernel)
    args = (X, torch.empty_like(X), 100, 1.0)
    key = tuner.key({"x": X, "y": X, "n": 100, "BLOCK": 16, "num_warps": 2})
    monkeypatch.setattr("served.key_of", lambda *call: key)
    winner = next(each for each in tuner.configs if each.kwargs["BLOCK"] == block)
    stored(registry, verdict(tuner, args, winner))
    return seen


def test_a_verdict_takes_the_place_of_what_the_program_passes(tmp_path, monkeypatch):
    seen = served(tmp_path / "registry.db", WIDE, monkeypatch, 64, key=["n"])
    assert torch.equal(plain.shift(X), X + 1)
    assert torch.equal(plain.shift(X[:50]), X[:50] + 1)  # another key
    assert seen == [((2,), 64, 2), ((4,), 16, 2)]


def test_a_grid_that_the_caller_has_computed_follows_as_the_space_says(tmp_path, monkeypatch):
    seen = served(tmp_path / "registry.db", WIDE, monkeypatch, 64, grid=["cdiv(n, BLOCK)"])
    entry = noted(tmp_path / "record", lambda: plain.shift_by_tuple(X))["shift_kernel"]
    (call,) = next(iter(entry.problems.values())).calls
    assert call.grids == ((7,), (7,), (4,), (4,), (2,), (2,))
    assert torch.equal(plain.shift_by_tuple(X[:90]), X[:90] + 1)
    assert seen == [((2,), 64, 2)] * 2


def test_a_grid_may_ask_for_what_the_program_leaves_to_its_default(tmp_path, monkeypatch):
    seen, y = served(tmp_path / "registry.db", WIDE, monkeypatch, 64), torch.empty_like(X)
    grid = lambda meta: (triton.cdiv(100, meta["BLOCK"]) if meta["UP"] else 0,)  # noqa: E731
    plain.shift_kernel[grid](X, y, 100, 1.0, BLOCK=16, num_warps=2)
    assert torch.equal(y, X + 1)
    assert seen == [((2,), 64, 2)]


def test_a_grid_that_is_not_what_the_space_says_leaves_the_program_alone(tmp_path, monkeypatch):
    seen = served(tmp_path / "registry.db", WIDE, monkeypatch, 64, grid=["cdiv(n, BLOCK)"])
    with recording(tmp_path / "record") as made, pytest.warns(RuntimeWarning, match=r"grid \(9,\), and its space says"):
        assert torch.equal(plain.shift_by_tuple(X, grid=(9,)), X + 1)
    assert seen == [((9,), 16, 2)]
    (reason,) = made.left_out
    assert reason == "UsageError: plain:shift_kernel runs on the grid (9,), and its space says (7,)"


def test_a_block_that_the_grid_does_not_follow_stays_as_the_program_passes_it(tmp_path, monkeypatch):
    seen = served(tmp_path / "registry.db", WIDE, monkeypatch, 64)
    fixed = "BLOCK of plain:shift_kernel stays as the program passes it"
    with pytest.warns(RuntimeWarning, match=fixed):
        entry = noted(tmp_path / "record", lambda: plain.shift_by_tuple(X))["shift_kernel"]
    (call,) = next(iter(entry.problems.values())).calls
    assert call.grids == ((7,), (7,), None, None, None, None)
    y = torch.empty_like(X)
    plain.shift_kernel[lambda meta: (triton.cdiv(100, 16),)](X, y, 100, 1.0, BLOCK=16, num_warps=2)
    assert torch.equal(y, X + 1)
    assert seen == [((7,), 16, 2)] * 2


def test_a_config_that_does_not_fit_gives_way_to_the_programs_own(tmp_path, monkeypatch):
    seen = served(tmp_path / "registry.db", WIDE, monkeypatch, 64)
    run = type(plain.shift_kernel).run

    def small(self, *args, **kwargs):
        if kwargs["BLOCK"] == 64:
            raise OutOfResources(300_000, 200_000, "shared memory")
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(plain.shift_kernel), "run", small)
    vars(plain.shift_kernel).pop("run")
    tilebook.give_space(plain.shift_kernel, WIDE)
    for _ in range(2):
        assert torch.equal(plain.shift(X), X + 1)
    assert seen == [((7,), 16, 2)] * 2


def test_what_the_program_passes_has_to_be_in_the_space(tmp_path):
    tilebook.give_space(plain.shift_kernel, {"BLOCK": (32, 64)})
    said = r"BLOCK=16, which the program passes, is not in the space of plain:shift_kernel"
    with recording(tmp_path) as made, pytest.warns(RuntimeWarning, match=said):
        assert torch.equal(plain.shift(X), X + 1)
    assert len(made.left_out) == 1


@pytest.mark.parametrize(
    ("kernel", "space", "options", "why"),
    [
        (others.scale_kernel, {"BLOCK": (16,)}, {}, "has an autotuner of its own"),
        (torch.add, {"BLOCK": (16,)}, {}, "is no Triton kernel"),
        ("plain", {"BLOCK": (16,)}, {}, "is not package.module:kernel"),
        ("plain:no_kernel", {"BLOCK": (16,)}, {}, "cannot be imported"),
        (plain.shift_kernel, {}, {}, "a space has one axis or more"),
        (plain.shift_kernel, {"BLOCK": ()}, {}, "a space has from 1 to 10000 configs, not 0"),
        (plain.shift_kernel, {"BLOCK": range(10_001)}, {}, "configs, not 10001"),
        (plain.shift_kernel, {"n": (16,)}, {}, "n is none of its constexprs"),
        (plain.rows_kernel, {"EVEN": (True,)}, {}, "EVEN is none of its constexprs"),
        (plain.shift_kernel, {"BLOCK": (16,)}, {"key": ["m"]}, "its key cannot have m"),
        (plain.shift_kernel, {"BLOCK": (16,)}, {"key": ["BLOCK"]}, "its key cannot have BLOCK"),
        (plain.shift_kernel, {"BLOCK": (16,)}, {"grid": ["cdiv(n, TILE)"]}, "grid: 'cdiv.n, TILE.' is no arithmetic"),
        (plain.shift_kernel, {"BLOCK": (16,)}, {"grid": ["n.__class__"]}, "is no arithmetic"),
        (plain.shift_kernel, {"BLOCK": (16,)}, {"grid": "cdiv(n, BLOCK)"}, "grid is 'same' or a list"),
        (plain.shift_kernel, {"BLOCK": (16,)}, {"grid": 5}, "grid is 'same' or a list"),
        (plain.shift_kernel, {"BLOCK": (16,)}, {"grid": ["n // 0"]}, "is no arithmetic"),
        (plain.shift_kernel, {"BLOCK": (16,)}, {"grid": ["-" * 5000 + "1"]}, "is no arithmetic"),
        (plain.shift_kernel, {"BLOCK": (16,)}, {"key": 5}, "a key is names of arguments, not 5"),
        (plain.shift_kernel, {"BLOCK": 16}, {}, "a space is axes and the values of each, not {'BLOCK': 16}"),
        (plain.shift_kernel, {"BLOCK": "16"}, {}, "a space is axes and the values of each"),
        (plain.shift_kernel, [16], {}, "a space is axes and the values of each"),
        (plain.shift_kernel, {"BLOCK": ([16],)}, {}, r"BLOCK=\[16\] is neither an integer, a flag nor a text"),
        (plain.shift_kernel, {"BLOCK": (16, 1.5)}, {}, "BLOCK=1.5 is neither"),
        (plain.shift_kernel, {"BLOCK": (16, None)}, {}, "BLOCK=None is neither"),
    ],
)
def test_what_cannot_be_right_is_refused_with_a_word(kernel, space, options, why):
    with pytest.raises(UsageError, match=why):
        tilebook.give_space(kernel, space, **options)


def test_a_module_may_be_imported_later(tmp_path, monkeypatch):
    text = "@triton.jit\ndef {}(x, BLOCK: triton.language.constexpr):\n    pass\n"
    (tmp_path / "imported_late.py").write_text("import triton\n" + text.format("one") + text.format("other"))
    monkeypatch.syspath_prepend(tmp_path)
    spaces = {f"imported_late:{name}": {"space": {"num_warps": [4, 8]}} for name in ("one", "other")}
    (tmp_path / "spaces.json").write_text(json.dumps(spaces))
    give_spaces(tmp_path / "spaces.json")
    assert "imported_late" not in sys.modules
    import imported_late

    for kernel in (imported_late.one, imported_late.other):
        assert autotuner(kernel).keys == ["BLOCK", "num_warps"]


@pytest.mark.parametrize("text", ["", "[]", '{"a:b": 1}', '{"a:b": {}}', '{"a:b": {"space": {}, "grids": 1}}'])
def test_a_file_that_has_no_spaces_is_refused(text, tmp_path):
    (tmp_path / "spaces.json").write_text(text)
    with pytest.raises(UsageError, match=r"spaces\.json has no spaces"):
        give_spaces(tmp_path / "spaces.json")


def test_a_process_that_tunes_runs_what_it_is_told_to(monkeypatch):
    monkeypatch.setenv("TILEBOOK_RECORDED", "/nowhere")
    tilebook.give_space(plain.shift_kernel, WIDE)
    assert "run" not in vars(plain.shift_kernel)


def test_a_call_that_no_verdict_covers_is_looked_up_once(tmp_path, monkeypatch):
    on_an_h200(monkeypatch, tmp_path / "registry.db")
    stored(tmp_path / "registry.db")
    asked = []
    monkeypatch.setattr(serving.Book, "chosen", lambda *call, **how: asked.append(call) or [])
    tilebook.give_space(plain.shift_kernel, WIDE)
    for _ in range(3):
        plain.shift(X)
    assert len(asked) == 1


def test_without_a_gpu_nothing_is_looked_up_and_nothing_said():
    tilebook.give_space(plain.shift_kernel, WIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(plain.shift(X), X + 1)
