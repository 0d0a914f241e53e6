"""A program around a kernel that has no autotuner, which knows nothing of tilebook. It prints the block that is run."""

import os

import torch
import triton

if name := os.environ.get("TILEBOOK_TEST_GPU"):
    from tilebook import device

    gpu = device.find(name)
    device.present, device.current = lambda: True, lambda index=0: gpu


def main():
    import plain

    x = torch.randn(100)
    y = torch.empty_like(x)

    def grid(meta):
        print(meta["BLOCK"])
        return (triton.cdiv(x.numel(), meta["BLOCK"]),)

    plain.shift_kernel[grid](x, y, x.numel(), 1.0, BLOCK=16, num_warps=2)
    assert torch.equal(y, x + 1)


if __name__ == "__main__":
    main()
