"""Attention's forward by persistent programs, and with warps of their own for loads: what is right, and when tried."""

import math

import pytest
import torch
import triton
import triton.language as tl

from tilebook import device as devices
from tilebook.kernels.attention.forward import attention_fwd
from tilebook.kernels.attention.tiles import dealt, turns
from tilebook.launch import intercepted
from tilebook.tuner.judge.verify import Case, verify
from tilebook.tuner.process.compile import CompilePool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200, B200 = devices.find("H200"), devices.find("B200")
FORWARD, SPACE = attention_fwd.problem, attention_fwd.tunable.space


def launches(problem, config):
    """(kernel, grid, arguments, constexprs and options) of each kernel that a config starts."""
    started = []
    with intercepted(lambda *launch: started.append(launch)):
        attention_fwd.tunable(*problem.inputs("meta", 0), config=config)
    return started


def right(text, dtype, **axes):
    problem = FORWARD.parse(text, dtype)
    config = SPACE.default(problem, H200).replace(**axes)
    verify(attention_fwd.tunable, config, [Case.make(attention_fwd, problem, DEVICE, 1)], repeats=0)


@pytest.mark.parametrize("axes", [{"DESCRIPTORS": 0}, {"DESCRIPTORS": 1}, {"DESCRIPTORS": 2}, {"HEADS": 4}], ids=str)
@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("B2,H2,S300,D32", "bf16"),
        ("B1,H5,S197,D64,causal", "fp16"),
        ("B1,H4,Hkv2,S140,Sk70,D40,causal", "bf16"),
        ("B2,H2,Hkv1,S70,Sk190,D32,causal,bottom_right", "bf16"),
        ("B1,H3,S200,D32,causal,window40x0", "fp16"),
        ("B1,H2,S150,D32,window20x30", "bf16"),
        ("B1,H2,S100,D32,softcap,alibi,dropout", "bf16"),
    ],
)
def test_few_persistent_programs_do_every_tile(text, dtype, axes):
    right(text, dtype, PERSISTENT=1, **axes)


@pytest.mark.parametrize("each", [1, 2, 3, 4])
@pytest.mark.parametrize(("heads", "rows"), [(1, 1), (1, 64), (2, 65), (3, 130), (1, 500), (7, 129)])
def test_persistent_programs_do_any_number_of_tiles(heads, rows, each):
    right(f"B1,H{heads},S{rows},D32,causal", "bf16", PERSISTENT=each)


@triton.jit
def _deal(times, owner, n_tiles):
    for turn in tl.range(0, turns(n_tiles)):
        number = dealt(turn)
        tl.store(times + number, tl.load(times + number) + 1)
        tl.store(owner + number, tl.program_id(0))


@pytest.mark.parametrize("programs", [1, 2, 5, 16])
@pytest.mark.parametrize("tiles", [1, 4, 5, 15, 16, 17, 31, 32, 33, 50])
def test_every_tile_is_dealt_once_there_and_back(tiles, programs):
    times, owner = (torch.zeros(tiles + programs, dtype=torch.int32, device=DEVICE) for _ in range(2))
    _deal[(programs,)](times, owner, tiles)
    assert times.tolist() == [1] * tiles + [0] * programs
    there, back = list(range(programs)), list(range(programs))[::-1]
    assert owner.tolist()[:tiles] == ((there + back) * tiles)[:tiles]


@pytest.mark.parametrize("text", ["B2,H4,S300,D64", "B1,H5,S197,D64,causal", "B1,H3,S200,D32,causal,window40x0"])
@pytest.mark.parametrize("axes", [{}, {"PERSISTENT": 2}], ids=str)
def test_warps_of_their_own_compute_the_same(text, axes):
    right(text, "bf16", SPECIALIZED=1, **axes)


def test_persistent_programs_fill_the_gpu_and_are_no_more_than_tiles(monkeypatch):
    monkeypatch.setattr(devices, "current", lambda index=0: H200)
    problem = FORWARD.parse("B4,H16,S2048,D64", "bf16")
    config = SPACE.default(problem, H200)
    tiles = 4 * 16 * 2048 // config.number("BLOCK_M")
    assert [grid for _, grid, _, _ in launches(problem, config)] == [(tiles,)]
    assert [grid for _, grid, _, _ in launches(problem, config.replace(PERSISTENT=3))] == [(3 * H200.sm_count,)]
    few = FORWARD.parse("B1,H2,S300,D64", "bf16")
    assert [grid for _, grid, _, _ in launches(few, config.replace(PERSISTENT=3))] == [(2 * math.ceil(300 / 64),)]


def test_a_config_without_the_axes_starts_what_their_old_values_start():
    problem = FORWARD.parse("B4,H16,S2048,D64,causal", "bf16")
    config = SPACE.default(problem, H200)
    assert not config.keys() & {"PERSISTENT", "SPECIALIZED"}
    (_, grid, args, meta), (_, as_grid, as_args, as_meta) = (
        launches(problem, each)[0] for each in (config, config.replace(PERSISTENT=0, SPECIALIZED=0))
    )
    assert (grid, meta) == (as_grid, as_meta)
    assert [a for a in args if isinstance(a, int)] == [a for a in as_args if isinstance(a, int)]
    assert not meta["PERSISTENT"]
    assert not meta["SPECIALIZED"]
    assert SPACE.config({**config, "PERSISTENT": 0, "SPECIALIZED": 0}) == SPACE.config(config)


@pytest.mark.parametrize(
    ("text", "values", "axes", "gpu", "reason"),
    [
        ("B4,H16,S2048,D64", (64, 128, 4, 2), {"PERSISTENT": 3}, "B200", ""),
        ("B4,H16,S2048,D64", (64, 128, 4, 2), {"PERSISTENT": 1}, "B200", "room for more"),
        ("B4,H16,S2048,D128", (128, 128, 8, 2), {"PERSISTENT": 1}, "H200", "Hopper"),
        ("B4,H16,S2048,D128", (128, 128, 8, 2), {"PERSISTENT": 2}, "B200", "do not fit"),
        ("B4,H16,S2048,D128", (128, 128, 8, 2), {"PERSISTENT": 1}, "B200", ""),
        ("B4,H16,S256,D64", (64, 64, 4, 2), {"PERSISTENT": 2, "DESCRIPTORS": 2}, "B200", "of its own as it is"),
        ("B4,H16,S2048,D64", (64, 128, 4, 2), {"PERSISTENT": 3, "DESCRIPTORS": 0}, "B200", "descriptors"),
        ("B4,H16,S2048,D64", (64, 32, 4, 2), {"PERSISTENT": 4}, "A100", ""),
        ("B4,H16,S2048,D64", (128, 128, 8, 2), {"PERSISTENT": 1, "MAXNREG": 128}, "B200", "cap"),
        ("B4,H16,S2048,D64", (128, 64, 4, 2), {"SPECIALIZED": 1}, "B200", ""),
        ("B4,H16,S2048,D64", (128, 64, 4, 2), {"SPECIALIZED": 1, "PERSISTENT": 1}, "B200", ""),
        ("B4,H16,S2048,D64", (128, 64, 4, 2), {"SPECIALIZED": 1, "PERSISTENT": 2}, "B200", "do not fit"),
        ("B4,H16,S2048,D64", (128, 64, 8, 2), {"SPECIALIZED": 1, "MAXNREG": 128}, "B200", "registers"),
        ("B4,H16,S2048,D64", (128, 64, 4, 2), {"SPECIALIZED": 1, "DESCRIPTORS": 0}, "B200", "TMA"),
        ("B4,H16,S2048,D64", (128, 64, 4, 1), {"SPECIALIZED": 1}, "B200", "ring"),
        ("B4,H16,S2048,D64", (128, 64, 4, 2), {"SPECIALIZED": 1}, "H200", "Hopper"),
        ("B4,H16,S2048,D64", (64, 32, 4, 2), {"SPECIALIZED": 1}, "A100", "tcgen05"),
    ],
)
def test_where_the_axes_cannot_matter_the_space_says_why(text, values, axes, gpu, reason):
    problem, device = FORWARD.parse(text, "bf16"), devices.find(gpu)
    shape = dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), values, strict=True))
    config = SPACE.default(problem, device).replace(**shape)
    assert SPACE.reject(problem, config, device) is None
    said = SPACE.reject(problem, config.replace(**axes), device)
    assert reason in said if reason else said is None, said


def test_neither_axis_changes_the_work():
    problem = FORWARD.parse("B4,H16,S2048,D64,causal", "bf16")
    config = SPACE.default(problem, B200)
    assert SPACE.work(problem, config) == SPACE.work(problem, config.replace(PERSISTENT=1, SPECIALIZED=1))


def test_spaces_of_later_gpus_have_both_axes():
    problem = FORWARD.parse("B4,H16,S2048,D64,causal", "bf16")
    both = [c for c in SPACE.feasible(problem, B200) if c.get("PERSISTENT") and c.get("SPECIALIZED")]
    assert both
    assert not [c for c in SPACE.feasible(problem, H200) if c.get("SPECIALIZED") or c.get("PERSISTENT")]


FORMS = [
    "B4,H8,S4000,D64,causal",
    "B4,H8,Hkv2,S4000,D128",
    "B4,H8,S4000,D64,causal,window256x0",
]


@pytest.mark.parametrize("gpu", ["A100", "B200", "MI300X"])
def test_persistent_kernels_compile_for_the_gpu_that_the_process_poses_as(gpu):
    device = devices.find(gpu)
    with CompilePool(device, workers=1) as pool:
        for text in FORMS[:2]:
            problem = FORWARD.parse(text, "bf16")
            config = SPACE.default(problem, device).replace(HEADS=1)
            for each in (1, 2):
                compiled = pool.submit("attention_fwd", "triton", problem.key, config.replace(PERSISTENT=each)).result()
                assert compiled.failure is None, compiled
                assert [b.grid for b in compiled.binaries] == [each * device.sm_count]


@pytest.mark.parametrize("text", FORMS)
def test_specialised_kernels_have_more_warps_and_code_of_their_own(text):
    """A pass that cannot split a loop passes it over in silence, and the config is then another's double."""
    problem = FORWARD.parse(text, "bf16")
    shape = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "HEADS": 1, "DESCRIPTORS": 1}
    config = SPACE.default(problem, B200).replace(**shape)
    with CompilePool(B200, workers=1) as pool:
        plain, split, lasting = (
            pool.submit("attention_fwd", "triton", problem.key, config.replace(**axes)).result()
            for axes in ({}, {"SPECIALIZED": 1}, {"SPECIALIZED": 1, "PERSISTENT": 1})
        )
    for compiled in (plain, split, lasting):
        assert compiled.failure is None, compiled
    assert plain.binaries[0].warps == 4
    assert min(split.binaries[0].warps, lasting.binaries[0].warps) > 4
    assert len({each.binaries[0].hash for each in (plain, split, lasting)}) == 3
