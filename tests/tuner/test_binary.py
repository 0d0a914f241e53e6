"""Machine code that cannot be right is refused, whatever compiles to it."""

import pytest

from tilebook.tuner.process import binary

# Of a kernel by ptxas 12.8: the second factor's place is made from UR26, where it ought to be made from UR36.
MISCOMPILED = """
.section  .text.forward_kernel,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*04f0*/                   UMOV UR16, 0x400 ;
        /*0e70*/                   USHF.R.U32.HI UR36, URZ, 0x4, UR16 ;
        /*0f00*/               @P1 IADD3 R94, R94, UR16, R25 ;
        /*0f30*/                   UIADD3 UR26, UP0, UR26, 0x40, URZ ;
        /*1120*/                   USGXT.U32 UR36, UR36, 0xe ;
        /*1160*/                   UIADD3.X UR27, UR27, -0x7fffffe0, URZ, UP0, !UPT ;
        /*13e0*/                   UIADD3.64 UR24, UR26, 0x7e, URZ ;
        /*4400*/                   HGMMA.64x32x16.F32.BF16 R72, gdesc[UR24].tnspA.tnspB, R72 ;
"""


def right(text: str) -> str:
    return text.replace("UR26, UP0, UR26", "UR26, UP0, UR36").replace("UR27, UR27", "UR27, URZ")


def test_a_register_that_nothing_has_set_is_found():
    assert binary.unset_registers(MISCOMPILED) == "0f30 UIADD3 UR26, UP0, UR26, 0x40, URZ"
    assert binary.unset_registers(right(MISCOMPILED)) == ""
    assert binary.unset_registers(right(MISCOMPILED) + MISCOMPILED.replace("UR36, URZ", "UR36, UR8")).startswith("0e70")


@pytest.mark.parametrize(
    ("line", "unset"),
    [
        ("HGMMA.64x32x16.F32.BF16 R56, gdesc[UR36].tnspB, RZ, !UPT", True),  # both factors' places: UR36 … UR39
        ("HGMMA.64x32x16.F32.BF16 R56, R24, gdesc[UR36].tnspB, R56", False),  # the second's alone: UR38, UR39
        ("HGMMA.64x32x16.F32.BF16 R56, R24, gdesc[UR34].tnspB, R56", True),
        ("@!UP3 UIADD3 UR4, UR38, 0x1, URZ", False),
        ("LDS.128 R28, [R37+UR36+0xa00]", True),
        ("UISETP.GE.AND UP0, UPT, UR37, UR38, UPT", True),
        ("ULOP3.LUT UP0, UR32, UR38, 0x7f, URZ, 0xc0, !UPT", False),  # sets UR32
        ("ULOP3.LUT UP0, URZ, UR37, 0x7f, URZ, 0xc0, !UPT", True),
        ("R2UR P1, UR5, R72", False),
    ],
)
def test_what_an_instruction_reads(line, unset):
    text = f"        /*0010*/   ULDC.64 UR38, c[0x0][0x220] ;\n        /*0020*/   {line} ;\n"
    assert bool(binary.unset_registers(text)) == unset


def test_such_a_candidate_is_refused(monkeypatch):
    shown = {"nvdisasm": MISCOMPILED, "cuobjdump": "REG:32 STACK:0 LOCAL:0"}
    monkeypatch.setattr(binary, "_told", lambda tool, *_: shown[tool])
    monkeypatch.setattr(binary, "code_digest", lambda _: "")
    assert binary.facts({"cubin": b"1", "ptx": "mma.sync"}).registers == 32
    with pytest.raises(binary.Miscompiled, match="before they are set: 0f30 UIADD3"):
        binary.facts({"cubin": b"1", "ptx": "wgmma.mma_async"})
