"""Recorded calls of ours, written out for the extension."""

import ctypes
import struct
from collections import namedtuple
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tilebook.native import plans
from tilebook.native.plans import Empty, Ours, contiguous


def _recorded(signature, template, tensors, descriptors=(), structs=(), **options):
    given = {"num_ctas": 1, "launch_pdl": False, "launch_cooperative_grid": False, "global_scratch_size": 0,
             "profile_scratch_size": 0, "num_warps": 4, "shared": 96, **options}  # fmt: skip
    compiled = SimpleNamespace(src=SimpleNamespace(signature=signature), metadata=SimpleNamespace(**given))
    launch = None, (2, 3, 1), 1234, None, template, tensors, descriptors, structs
    maker = partial(torch.empty_strided, (6, 8), (8, 1), dtype=torch.bfloat16, device="cpu")
    return SimpleNamespace(makers=[maker], launches=[launch], outputs=[2], compiled=[compiled])


SIGNATURE = {
    "x": "*fp32",
    "w": "constexpr",
    "y": "*bf16",
    "rows": "i32",
    "eps": "fp32",
    "many": "i64",
    "B": "constexpr",
}
TEMPLATE = [None, None, None, -5, 1e-5, 1 << 40, 16]
TENSORS = [(0, 0), (2, 2)]
X = torch.randn(6, 8)
GIVEN, POSED = (None, X, None, None, None), (X, 1e-5)
EPS = struct.unpack("<I", struct.pack("<f", 1e-5))[0]
HIDDEN = [(-1, 0), (-1, 0)]


WHOLE = (contiguous((6, 8)),)


def _translated(plan, outputs=WHOLE, given=GIVEN, posed=POSED, places=(1, None)):
    return plans.translated(plan, given, posed, places, outputs)


@pytest.fixture
def sizes(monkeypatch):
    """Of the parameters that a kernel was last asked for."""
    told = []
    monkeypatch.setattr(plans, "_takes", lambda function, sizes: told.append(sizes) or True)
    return told


def test_a_recorded_launch_is_written_out(sizes):
    made, launches, outputs, copied, rest = _translated(
        _recorded(SIGNATURE, TEMPLATE, TENSORS), [contiguous((2, 3, 8))]
    )
    assert made == [((2, 3, 8), (24, 8, 1), 15)]
    assert (outputs, copied, rest) == ([(5, 0)], [], None)
    ((function, grid, threads, shared, parameters),) = launches
    assert (function, grid, threads, shared) == (1234, (2, 3, 1), 128, 96)
    assert parameters == [(1, 0), (5, 0), (-1, (1 << 64) - 5), (-1, EPS), (-1, 1 << 40), *HIDDEN]
    assert sizes == [[8, 8, 4, 4, 8, 8, 8]]


def test_outputs_may_be_numbers_missing_or_read_by_nobody(sizes):
    plan = _recorded(SIGNATURE, TEMPLATE, TENSORS)
    wanted = [None, contiguous((6, 8)), 7, Empty((2,), torch.int64), Empty((), torch.float32)]
    made, _, outputs, *_ = _translated(plan, wanted)
    assert made == [((6, 8), (8, 1), 15), ((2,), (1,), 4), ((), (), 6)]
    assert outputs == [(-1, 0), (5, 0), (-2, 7), (6, 0), (7, 0)]


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [(Ours((6, 8), (8, 1)), True), (Ours((6, 8), (1, 6)), False), (Ours((8, 6), (6, 1)), True),
     (Ours((2, 3, 8), (24, 8, 1)), True), (Ours((2, 3, 8), (8, 16, 1)), False), (Ours((6, 9), (9, 1)), False)],
)  # fmt: skip
def test_outputs_lie_as_pytorchs(sizes, wanted, taken):
    assert (_translated(_recorded(SIGNATURE, TEMPLATE, TENSORS), [wanted]) is not None) is taken
    assert plans.fits(torch.empty(6, 8), wanted) is taken


def test_what_has_been_copied_will_be(sizes):
    plan = _recorded(SIGNATURE, TEMPLATE, TENSORS)
    assert _translated(plan, posed=(X.clone(), 1e-5))[3] == [1]
    assert _translated(plan, posed=(X.view(-1, 4), 1e-5))[3] == []


Steps = namedtuple("Steps", "a b")
Inner = namedtuple("Inner", "x y")


def test_structs_are_their_fields(sizes):
    signature = {
        **SIGNATURE, "rows": ("*i32", "constexpr", "i32"), "many": (("i32", "constexpr"), ("i64", "fp32")),
    }  # fmt: skip
    template = [*TEMPLATE]
    template[3], template[5] = None, Steps(Inner(3, None), Inner(4, 1e-5))
    plan = _recorded(signature, template, TENSORS, structs=[(3, [None, None, 9], [(0, 0)])])
    ((*_, parameters),) = _translated(plan)[1]
    assert parameters == [(1, 0), (5, 0), (1, 0), (-1, 9), (-1, EPS), (-1, 3), (-1, 4), (-1, EPS), *HIDDEN]
    assert sizes == [[8, 8, 8, 4, 4, 4, 8, 4, 8, 8]]


def test_memory_of_a_kernels_own_is_made_for_all_its_programs(sizes):
    made, launches, *_ = _translated(_recorded(SIGNATURE, TEMPLATE, TENSORS, global_scratch_size=64))
    assert made[1] == ((64 * 6,), (1,), 0)
    assert launches[0][-1][-2:] == [(6, 0), (-1, 0)]


@pytest.fixture
def triton_maps(monkeypatch):
    from triton.backends.nvidia import driver

    asked = []

    def fill(address, *given):
        asked.append((address, *given))
        return object()

    utils = SimpleNamespace(fill_tma_descriptor=fill, fill_tma_descriptor_tiled=fill)
    monkeypatch.setattr(driver.triton.runtime.driver, "_active", SimpleNamespace(utils=utils), raising=False)
    return asked


META = {"swizzle": 3, "elem_size": 2, "elem_type": 8, "block_size": [16, 8], "fp4_padded": False}


def _descriptor(base):
    return SimpleNamespace(base=base, shape=[6, 8], strides=[8, 1], padding="zero", round_f32_to_tf32=False)


def test_descriptors_are_maps_with_sizes_and_steps(sizes, monkeypatch):
    described = []

    def mapped(describe, meta, address):
        described.append((describe(plans._At(address)).base.data_ptr(), meta))
        return b"m" * 128, [6, 8, 8, 1]

    monkeypatch.setattr(plans, "_mapped", mapped)
    signature = {**SIGNATURE, "x": "tensordesc<fp32[16, 8],L>"}
    plan = _recorded(signature, TEMPLATE, TENSORS[1:], [(0, 0, _descriptor)], tensordesc_meta=[META])
    ((*_, parameters),) = _translated(plan)[1]
    assert parameters[:6] == [(1, b"m" * 128), (-1, 6), (-1, 8), (-1, 8), (-1, 1), (5, 0)]
    assert sizes[0][:6] == [128, 4, 4, 8, 8, 8]
    assert described == [(X.data_ptr(), META)]


def test_a_map_is_made_by_triton_and_of_its_kind(triton_maps):
    with pytest.raises(plans._Untranslatable):  # what comes is no tensor map of Triton's
        plans._mapped(_descriptor, META, 4096)
    assert triton_maps[0][:3] == (4096, 3, 2)
    with pytest.raises(plans._Untranslatable):
        plans._mapped(_descriptor, None, 4096)


REFUSED = {
    "a descriptor without its layout": {"descriptors": [(0, 0, None)]},
    "a cluster": {"num_ctas": 2},
    "a dependent launch": {"launch_pdl": True},
    "a cooperative launch": {"launch_cooperative_grid": True},
    "a profile": {"profile_scratch_size": 64},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_repeated_is_not(sizes, name):
    assert _translated(_recorded(SIGNATURE, TEMPLATE, TENSORS, **REFUSED[name])) is None


@pytest.mark.parametrize(
    ("signature", "tensors"),
    [
        ({**SIGNATURE, "rows": "tensordesc<fp16[16, 16]>"}, TENSORS),
        ({**SIGNATURE, "eps": "bf16"}, TENSORS),
        (SIGNATURE, [(0, 1), (2, 2)]),  # an address of what is no tensor
    ],
)
def test_what_is_no_address_or_number_is_refused(sizes, signature, tensors):
    assert _translated(_recorded(signature, TEMPLATE, tensors)) is None


class Function:
    """The driver's answers about the sizes of a kernel's parameters."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __call__(self, function, index, offset, size):
        if index >= len(self.sizes):
            return 1
        size._obj.value = self.sizes[index]
        return 0


RIGHT = [8, 8, 4, 4, 8, 8, 8]


@pytest.mark.parametrize(
    ("found", "taken"),
    [(RIGHT, True), (RIGHT[:-1], False), ([*RIGHT, 8], False), ([8, 8, 8, 4, 8, 8, 8], False), (None, False)],
)
def test_a_kernel_must_take_these_parameters(monkeypatch, found, taken):
    def driver(name):
        if found is None:
            raise OSError
        return SimpleNamespace(cuFuncGetParamInfo=Function(found))

    monkeypatch.setattr(ctypes, "CDLL", driver)
    assert (_translated(_recorded(SIGNATURE, TEMPLATE, TENSORS)) is not None) is taken
