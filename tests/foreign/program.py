"""A user's program with somebody's kernel, which knows nothing of tilebook. It prints which config ran.

Run by tests in Triton's interpreter; `TILEBOOK_TEST_GPU` lets it believe that it runs on a GPU of that model.
"""

import os

import torch
import triton
import triton.language as tl

tried = []


def bench(call, quantiles):
    tried.append(1)
    return [1.0, 1.0, 1.0]


@triton.autotune([triton.Config({"BLOCK": block}) for block in (16, 32, 64)], key=["n"], do_bench=bench)
@triton.jit
def double_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


def main():
    for n in (100, 70):
        x = torch.randn(n)
        y = torch.empty_like(x)
        for _ in range(3):
            double_kernel[lambda meta, n=n: (triton.cdiv(n, meta["BLOCK"]),)](x, y, n)
        assert torch.equal(y, 2 * x)
        print(n, double_kernel.best_config.kwargs["BLOCK"], len(tried))


if __name__ == "__main__":
    if name := os.environ.get("TILEBOOK_TEST_GPU"):
        from tilebook import device

        gpu = device.find(name)
        device.present, device.current = lambda: True, lambda index=0: gpu
    main()
