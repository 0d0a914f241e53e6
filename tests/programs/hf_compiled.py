"""What Dynamo makes of a model of transformers: its graphs, the functions it left, and how often it began anew."""

import torch
from torch._dynamo.utils import counters

from programs.hf_models import inputs, made

LEFT = "bart", "whisper"
"""Models whose layers Dynamo leaves in the middle, where functions of ours are graphs of their own."""


def compiled(name, kind, device, steps=3):
    """(reasons to break, graphs, functions looked at, functions compiled) of some training steps."""
    torch._dynamo.reset()
    counters.clear()
    model = made(name).to(device, torch.bfloat16)
    called = torch.compile(model, backend="eager")
    given = inputs(name, kind, device)
    features = [key for key in ("pixel_values", "input_features") if key in given]
    given |= {key: given[key].to(model.dtype) for key in features}
    for _ in range(steps):
        fresh = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in given.items()}
        called(**fresh)[0].float().square().mean().backward()
    frames = counters["frames"]
    counts = (counters["stats"]["unique_graphs"], frames["total"], frames["ok"]) if name not in LEFT else ()
    reasons = sorted({each.partition("\n")[0] for each in counters["graph_break"]})  # what follows tells where
    found = reasons, *counts
    torch._dynamo.reset()
    return found
