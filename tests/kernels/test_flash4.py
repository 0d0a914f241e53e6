"""FlashAttention-4 behind our ops: the package's functions in eager PyTorch stand in for it where there is no GPU."""

import ast
import importlib.util
import inspect
import sys
from pathlib import Path

import fake_flash4
import pytest
import torch

import tilebook
from tilebook import device as devices
from tilebook import dispatch
from tilebook.kernels.attention.form import CAUSAL, form
from tilebook.kernels.attention.ops import attention_bwd, attention_fwd
from tilebook.kernels.attention.peers import flash4
from tilebook.op import Config
from tilebook.tuner.verify import Case, truths, verify

FORWARD, BACKWARD = attention_fwd.problem, attention_bwd.problem
NAME, H200 = "flash_attention_4", devices.find("H200")
WIDE = Config(TILE_M=128, TILE_N=176, P_IN_SHARED=0, OVERLAP=1)

SUPPORTED = (
    "B2,H2,S1,Sk40,D64",
    "B1,H2,S100,D64",
    "B1,H2,S197,D64,causal",
    "B1,H2,S17,Sk70,D64",
    "B2,H8,Hkv2,S40,D32,causal",
    "B1,H1,S40,D256",
    "B1,H2,S17,Sk70,D64,causal",
    "B1,H2,S70,Sk17,D64,causal",
    "B1,H2,S70,Sk97,D32,causal,bottom_right",
    "B1,H2,S97,D32,causal,window40x0",
    "B1,H2,S70,Sk97,D32,window9x20",
    "B1,H4,Hkv2,S60,Sk90,D32,bottom_right,window30x9",
)
UNSUPPORTED = (
    "B1,H2,S100,D72,causal",  # its dq was wrong
    "B2,H2,S1,D64",
    "B1,H2,S100,D160",  # what lies between 128 and 256 it has on Hopper alone
    "B1,H2,S100,D36",
    "B1,H1,S97,Sk70,D64,causal,bottom_right",  # rows that see nothing
    "B1,H1,S97,Sk40,D64,window20x0",
    "B1,H1,S100,D64,softcap",
    "B1,H2,S70,D32,alibi",
    "B1,H2,S70,D32,biashqk",
    "B1,H2,S70,D32,maskbk",
    "B1,H2,S70,D32,dropout",
)


@pytest.fixture(autouse=True)
def _short_calls_count(request, monkeypatch):
    if "short" not in request.function.__name__:
        monkeypatch.setattr(flash4, "LEAST_FLOPS", 0.0)


def test_short_calls_are_not_worth_its_host_time():
    assert not flash4.supports(FORWARD.parse("B8,H6,S196,D64", "bf16"))
    assert not flash4.supports(BACKWARD.parse("B16,H12,S256,D64", "bf16"))
    assert flash4.supports(FORWARD.parse("B8,H16,S2048,D128", "bf16"))


@pytest.fixture
def package(monkeypatch):
    """The stand-in where the package would be."""
    names = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")
    for name in names:
        monkeypatch.setitem(sys.modules, name, fake_flash4)
    flash4._functions.cache_clear()
    fake_flash4.calls.clear()
    fake_flash4.told.clear()
    yield fake_flash4
    flash4._functions.cache_clear()


def _tensors(*shapes, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source).to(torch.bfloat16) for shape in shapes]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("text", SUPPORTED)
@pytest.mark.parametrize("op", [attention_fwd, attention_bwd], ids=lambda op: op.name)
def test_masks_windows_and_groups_reach_it_as_it_counts_them(package, op, text, dtype):
    problem = op.problem.parse(text, dtype)
    implementation = op.implementations[NAME]
    assert implementation.supports(problem)
    verify(implementation, None, [Case.make(op, problem, "cpu", 0)])
    assert package.calls


@pytest.mark.parametrize("text", UNSUPPORTED)
@pytest.mark.parametrize("op", [attention_fwd, attention_bwd], ids=lambda op: op.name)
def test_what_it_cannot_do_it_does_not_claim(op, text):
    assert not op.implementations[NAME].supports(op.problem.parse(text, "bf16"))


def test_fp32_it_does_not_claim():
    assert not flash4.supports(FORWARD.parse("B1,H2,S100,D64", "fp32"))


def test_its_default_leaves_every_choice_to_it_and_a_config_names_them_all(package):
    q, k, v = _tensors((1, 2, 40, 32), (1, 2, 40, 32), (1, 2, 40, 32))
    implementation, problem = attention_fwd.implementations[NAME], FORWARD.parse("B1,H2,S40,D32", "bf16")
    for config in (implementation.space.default(problem, H200), None, WIDE):
        implementation(q, k, v, CAUSAL, 0.2, config=config)
    assert package.told == [(None, None, None), (None, None, None), ((128, 176), True, True)]
    with dispatch.use(NAME, WIDE):
        tilebook.attention(q, k, v)
    assert package.told[-1] == ((128, 176), True, True)


@pytest.mark.parametrize(
    ("head_dim", "theirs"), [(16, (192, 128)), (32, (192, 128)), (64, (192, 128)), (128, (128, 128))]
)
def test_its_space_is_small_and_has_its_own_choice(head_dim, theirs):
    problem = FORWARD.parse(f"B1,H2,S100,D{head_dim}", "bf16")
    feasible = flash4.FORWARD_SPACE.feasible(problem, H200)
    assert flash4.FORWARD_SPACE.default(problem, H200) in feasible
    assert Config(TILE_M=theirs[0], TILE_N=theirs[1], P_IN_SHARED=0, OVERLAP=1) in feasible
    assert 10 < len(feasible) < 40


def test_where_it_takes_no_tiles_of_ours_its_own_choice_is_all_there_is():
    problem = FORWARD.parse("B1,H2,S100,D128", "bf16")
    for gpu in ("B200", "A100"):
        assert len(flash4.FORWARD_SPACE.feasible(problem, devices.find(gpu))) == 1


def _its_rules():
    """Its own search for configs on Hopper, which imports nothing; None where it is not installed."""
    spec = importlib.util.find_spec("flash_attn")
    for place in (spec.submodule_search_locations if spec else None) or ():
        file = Path(place) / "cute" / "sm90_config_search.py"
        if file.exists():
            found = importlib.util.spec_from_file_location("sm90_config_search", file)
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
            return module
    return None


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
def test_every_config_is_valid_by_its_own_rules(head_dim):
    rules = _its_rules()
    if rules is None:
        pytest.skip("flash-attn-4 is not installed")
    valid = {
        (each["tile_m"], each["tile_n"], not each["pv_is_rs"], each["overlap_wg"])
        for each in rules.find_feasible_fwd_configs(head_dim)
    }
    problem = FORWARD.parse(f"B1,H2,S100,D{head_dim}", "bf16")
    for config in flash4.FORWARD_SPACE.feasible(problem, H200):
        tile_m, tile_n, in_shared, overlap = config.values()
        assert not tile_m or (tile_m, tile_n, bool(in_shared), bool(overlap)) in valid


def test_tensors_go_there_as_views_and_results_lie_as_queries_and_keys_do(package):
    """Slices of one (B, S, 3, H, D) projection."""
    (qkv,) = _tensors((2, 40, 3, 2, 32))
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    (do,) = _tensors((2, 2, 40, 32), seed=1)
    o, lse = attention_fwd.implementations[NAME](q, k, v, CAUSAL, 0.2)
    inputs = do, q, k, v, o, lse, CAUSAL, 0.2
    dq, dk, dv = attention_bwd.implementations[NAME](*inputs)
    for found, truth in zip((dq, dk, dv), truths(attention_bwd, inputs), strict=True):
        assert (found.float() - truth).norm() < 5e-3 * truth.norm()
    for x in (o, dq, dk, dv):
        assert x.transpose(1, 2).is_contiguous()
    for _, tensors in package.calls:
        assert [x.data_ptr() for x in tensors[:3]] == [x.data_ptr() for x in (q, k, v)]


def test_the_public_function_differentiates_through_it(package):
    q, k, v = (x.requires_grad_() for x in _tensors((1, 4, 30, 32), (1, 2, 30, 32), (1, 2, 30, 32)))
    (do,) = _tensors((1, 4, 30, 32), seed=1)
    truth = torch.nn.functional.scaled_dot_product_attention(
        *(x.detach().float().requires_grad_() for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    with dispatch.use(NAME):
        o = tilebook.attention(q, k, v, causal=True)
        found = torch.autograd.grad(o, (q, k, v), do)
    assert [name for name, _ in package.calls] == ["fwd", "bwd"]
    assert (o.float() - truth).norm() < 5e-3 * truth.norm()
    expected = torch.autograd.grad(tilebook.attention(q, k, v, causal=True), (q, k, v), do)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).float().norm() < 1e-2 * theirs.float().norm()


def test_a_call_that_must_repeat_never_gets_its_backward(monkeypatch):
    monkeypatch.setattr(flash4, "_installed", lambda: True)
    gpu, text = devices.find("H200"), "B1,H2,S100,D64"
    for op, expected in ((attention_fwd, True), (attention_bwd, False)):
        q, *rest = op.problem.parse(text, "bf16").inputs("cpu", 0)
        arguments = [form(deterministic=True) if hasattr(x, "softcap") else x for x in rest]
        problem = op.problem.of(q, *arguments)
        assert op.implementations[NAME].can_run(problem, gpu) is expected


@pytest.mark.parametrize(("gpu", "expected"), [("H200", True), ("B200", True), ("A100", False), ("MI300X", False)])
def test_it_is_for_hopper_and_blackwell(monkeypatch, gpu, expected):
    monkeypatch.setattr(flash4, "_installed", lambda: True)
    assert flash4.available(devices.find(gpu)) is expected


def test_it_is_found_by_its_distribution_without_being_imported(monkeypatch, tmp_path):
    (tmp_path / "flash_attn_4-4.0.0.dist-info").mkdir()
    (tmp_path / "flash_attn_4-4.0.0.dist-info" / "METADATA").write_text("Name: flash-attn-4\nVersion: 4.0.0\n")
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # whoever imports it fails
    others = [path for path in sys.path if not list(Path(path).glob("flash_attn_4*"))]
    for paths, expected in ((others, False), ([str(tmp_path), *others], True)):
        monkeypatch.setattr(sys, "path", paths)
        flash4._installed.cache_clear()
        assert flash4.available(devices.find("H200")) is expected
    flash4._installed.cache_clear()


def test_the_stand_in_takes_what_the_package_takes():
    spec = importlib.util.find_spec("flash_attn")
    places = [
        Path(place) / "cute" / "interface.py" for place in (spec.submodule_search_locations if spec else None) or ()
    ]
    source = next((place for place in places if place.exists()), None)
    if source is None:
        pytest.skip("flash-attn-4 is not installed")
    functions = {
        each.name: each.args for each in ast.parse(source.read_text()).body if isinstance(each, ast.FunctionDef)
    }
    for name in ("_flash_attn_fwd", "_flash_attn_bwd"):
        theirs = [each.arg for each in functions[name].args]
        mine = inspect.signature(getattr(fake_flash4, name)).parameters.values()
        positional = [each.name for each in mine if each.kind is each.POSITIONAL_OR_KEYWORD]
        assert theirs[: len(positional)] == positional
        assert {each.name for each in mine} <= set(theirs)
