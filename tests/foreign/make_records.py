"""Makes the records in `records/`: PYTHONPATH=.venv/beside python tests/foreign/make_records.py. No GPU needed.

Programs run as ever, on tensors of the CPU, but no kernel is started: what is noted is what it would have been called
with. The records name no folder of the machine that they were made on.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from triton.runtime.autotuner import Autotuner

HERE = Path(__file__).parent
RECORDS = HERE / "records"
sys.path.append(str(HERE.parents[1] / "examples"))


def product(size=4096):
    from matmul_autotuned import matmul

    matmul(torch.empty(size, size, dtype=torch.float16), torch.empty(size, size, dtype=torch.float16))


def simple_gla(batch=8, tokens=2048, heads=16, width=64):
    """The forward pass of flash-linear-attention's simple GLA."""
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v = (torch.empty(batch, tokens, heads, width, dtype=torch.bfloat16) for _ in range(3))
    with torch.no_grad():
        chunk_simple_gla(q, k, v, torch.empty(batch, tokens, heads))


def main():
    from tilebook.foreign import record

    for program in (product, simple_gla):
        made = record.Recording(RECORDS)
        Autotuner.run = lambda self, *args, made=made, **options: made.note(self, args, options)
        program()
        assert made.left_out == {}
        record.write(
            RECORDS / f"{program.__name__}.json", [dataclasses.replace(each, path="") for each in made.entries()]
        )


if __name__ == "__main__":
    main()
