"""Programs of several processes: DDP, FSDP2, tensor parallel; of one process too, which is how they are tried first."""

import os
import socket
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import tilebook
from programs.compare import cotangent, some_calls
from programs.families import BLOCKS, FAMILIES, usual
from programs.isolated import each, run
from programs.own_modules import beside
from programs.transforms import blocks


def _batch(device, rank=0):
    return torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(rank)).to(device)


def _expected(plain, device, ranks):
    """Gradients of the mean over what all ranks see."""
    for rank in range(ranks):
        (plain(_batch(device, rank)).square().mean() / ranks).backward()
    return {name: p.grad for name, p in plain.named_parameters()}


def _close(found, expected):
    for name, right in expected.items():
        torch.testing.assert_close(
            found[name],
            right,
            rtol=2e-2,
            atol=2e-3 * right.abs().max().item() + 1e-6,
            msg=lambda t, n=name: f"{n}: {t}",
        )


def encoders(device):
    return beside("TransformerEncoderLayer", 32, 2, 48, 0.0, batch_first=True, device=device)


def ddp(device, rank, ranks):
    reducers = {}, {"static_graph": True}, {"gradient_as_bucket_view": True}
    for made, options in [(encoders, {}), *((blocks, reducer) for reducer in reducers)]:
        ours, plain = made(device)
        module = DistributedDataParallel(ours, **options)
        for _ in range(3):
            ours.zero_grad()
            module(_batch(device, rank)).square().mean().backward()
        _close({name: p.grad for name, p in ours.named_parameters()}, _expected(plain, device, ranks))


def fsdp(device, rank, ranks):
    mesh = init_device_mesh(torch.device(device).type, (ranks,))
    for made, compiled in ((blocks, False), (blocks, True), (encoders, False)):
        ours, plain = made(device)
        fully_shard(ours, mesh=mesh)
        module = torch.compile(ours, backend="aot_eager") if compiled else ours
        for _ in range(3):
            ours.zero_grad()
            module(_batch(device, rank)).square().mean().backward()
        _close({name: p.grad.full_tensor() for name, p in ours.named_parameters()}, _expected(plain, device, ranks))


def tensor_parallel(device, rank, ranks):
    """Weights sharded, activations local: what `parallelize_module` makes of a block."""
    mesh = init_device_mesh(torch.device(device).type, (ranks,))

    class Mlp(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(32, 32) for _ in range(3))
            self.out = torch.nn.Linear(32, 32)

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
            o = self.attend(q, k, v, is_causal=True)
            return self.out(o.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    plain = Mlp().to(device)
    plain.attend = FAMILIES["attention"].plain
    ours = Mlp().to(device)
    ours.load_state_dict(plain.state_dict())
    ours.attend = tilebook.scaled_dot_product_attention
    plan = {name: ColwiseParallel() for name in ("q", "k", "v")} | {"out": RowwiseParallel()}
    parallelize_module(ours, mesh, plan)
    for _ in range(3):
        got, right = ours(_batch(device)), plain(_batch(device))
        torch.testing.assert_close(got, right, rtol=1e-2, atol=2e-3)
        ours.zero_grad()
        plain.zero_grad()
        got.square().mean().backward()
        right.square().mean().backward()
    _close(
        {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in ours.named_parameters()},
        {name: p.grad for name, p in plain.named_parameters()},
    )


def dtensors(device, rank, ranks):
    """Distributed tensors as they are, without `to_local`: through PyTorch's dispatcher, or a clear TypeError."""
    mesh = init_device_mesh(torch.device(device).type, (ranks,))

    def placement(name, i, x):
        if name in BLOCKS:
            return Shard(0) if i == 0 else Replicate()
        if name == "varlen":
            return Shard(1) if i < 3 else Replicate()  # by heads
        return Shard(1) if x.ndim == 4 else Replicate()

    def step(function, family, inputs, start):
        parts = tuple(
            distribute_tensor(x.detach(), mesh, [placement(family.name, i, x)]).requires_grad_(x.requires_grad)
            for i, x in enumerate(inputs)
        )
        o = function(*parts)
        assert isinstance(o, DTensor), type(o)
        start = distribute_tensor(start, mesh, o.placements)
        gradients = torch.autograd.grad(o, parts[: family.trained], start) if family.trained else ()
        return [x.full_tensor() for x in (o, *gradients)]

    def body(name):
        family = FAMILIES[name]
        inputs = family.leaves(device, usual(device))
        right = family.plain(*inputs)
        expected = torch.autograd.grad(right, inputs[: family.trained], cotangent(right)) if family.trained else ()
        for _ in range(some_calls(inputs)):
            try:
                found = step(family.ours, family, inputs, cotangent(right))
            except TypeError:
                continue
            except (NotImplementedError, RuntimeError):
                with pytest.raises((NotImplementedError, RuntimeError)):  # where PyTorch can, so must ours
                    step(family.plain, family, inputs, cotangent(right))
                continue
            for got, wanted in zip(found, (right, *expected), strict=True):
                torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())

    names = ["attention", "drop_in", "softcap", "varlen", "decode", "mlp", "rms_norm"]
    each(names if torch.device(device).type == "cuda" else ["softcap", "mlp", "rms_norm"], body)


PROGRAMS = ddp, fsdp, tensor_parallel, dtensors


def _rank(rank, device, ranks, port, failures):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    where = "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
        where = f"cuda:{rank}"
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=ranks)
    try:
        for program in PROGRAMS:
            program(where, rank, ranks)
    except BaseException as failure:
        what = f"{program.__name__}, rank {rank}: {type(failure).__name__}: {str(failure)[:3000]}"
        Path(failures, str(rank)).write_text(what)
        raise
    finally:
        dist.destroy_process_group()


def launch(device, ranks):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as failures:
        try:
            if ranks == 1:
                _rank(0, device, 1, port, failures)
            else:
                mp.spawn(_rank, (device, ranks, port, failures), nprocs=ranks)
        except Exception:
            pytest.fail("\n".join(each.read_text() for each in Path(failures).iterdir()), pytrace=False)


# On the CPU two processes are as easily had as one, and tell more.
@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2] if torch.cuda.is_available() else [2])
def test_data_sharded_and_tensor_parallel_programs_give_pytorchs_numbers(device, ranks):
    if device == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"fewer than {ranks} GPUs")
    run("programs.parallel", "launch", device=device, ranks=ranks, seconds=240)
