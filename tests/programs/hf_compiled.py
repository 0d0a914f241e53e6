"""What Dynamo makes of a model of transformers: its graphs, the functions it left, and how often it began anew."""

import torch
from torch._dynamo.utils import counters

from programs.hf_models import inputs, made


def compiled(name, kind, device, steps=3):
    """(graphs, functions looked at, functions compiled, reasons to break) of some training steps."""
    torch._dynamo.reset()
    counters.clear()
    model = made(name).to(device, torch.bfloat16)
    called = torch.compile(model, backend="eager")
    given = inputs(name, kind, device)
    given = {key: x.to(model.dtype) if key == "pixel_values" else x for key, x in given.items()}
    for _ in range(steps):
        fresh = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in given.items()}
        called(**fresh)[0].float().square().mean().backward()
    frames = counters["frames"]
    found = counters["stats"]["unique_graphs"], frames["total"], frames["ok"], sorted(counters["graph_break"])
    torch._dynamo.reset()
    return found
