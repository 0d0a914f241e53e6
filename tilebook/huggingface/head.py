"""The loss of transformers' language models without their logits: the last layer and the loss are one function then.

A model of theirs calls its base model, its last layer and `self.loss_function`, with a soft-cap between the latter two
in some. While it trains, the last layer here only notes what it was given, and the loss function makes the loss of it.
"""

from __future__ import annotations

import copy
import inspect
import threading
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tilebook.hooks import hooked
from tilebook.kernels.cross_entropy.problem import IGNORED, capped
from tilebook.kernels.linear_cross_entropy import wide_loss


class _Call:
    """A call of a model that is under way: is its loss ours to make, and of what?"""

    def __init__(self, on: bool) -> None:
        self.on = on
        self.hidden: torch.Tensor | None = None


class _Here(threading.local):
    """This thread's calls, by the number of their head."""

    def __init__(self) -> None:
        self.calls: dict[int, _Call] = {}


_here = _Here()


class Head:
    """One model whose last layer notes what it is given, for the loss."""

    def __init__(self, model: Any, linear: nn.Linear, softcap: float) -> None:
        self.model, self.linear, self.softcap = model, linear, softcap
        self.configured = _softcap(model)

    def places(self) -> list[tuple[nn.Module, str, Any]]:
        """Whose attribute is to be what. No bound methods, which others bind to a model of theirs."""
        forward: Any = partial(Head.forward, self)
        forward.__signature__ = inspect.signature(self.model.forward)  # by which trainers choose what they pass
        return [
            (self.model, "forward", forward),
            (self.linear, "forward", partial(Head.project, self)),
            (self.model, "_loss_function", partial(Head.loss, self)),
        ]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before, mine = _here.calls.get(id(self)), _Call(self._trains(**kwargs))
        _here.calls[id(self)] = mine
        try:
            out = type(self.model).forward(self.model, *args, **kwargs)
        finally:
            del _here.calls[id(self)]
            if before is not None:
                _here.calls[id(self)] = before
        if mine.hidden is None:  # it has its logits
            return out
        if isinstance(out, tuple):
            return out[0], None, *out[2:]
        return type(out)(**{name: each for name, each in out.items() if name != "logits"})

    def _trains(self, labels: Any = None, logits_to_keep: Any = None, **_: Any) -> bool:
        wanted = labels is not None and logits_to_keep is None and self.model.training and torch.is_grad_enabled()
        same = self.model.get_output_embeddings() is self.linear and type(self.linear) is nn.Linear
        loss = getattr(self.model.__dict__.get("_loss_function"), "args", ())  # somebody may have set another since
        same = same and _softcap(self.model) == self.configured
        return bool(wanted and same and not hooked(self.linear) and loss and loss[0] is self)

    def project(self, input: torch.Tensor) -> torch.Tensor:
        call = _here.calls.get(id(self))
        if call is None or not call.on:
            return nn.Linear.forward(self.linear, input)
        call.hidden = input
        return input[..., :1]

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, num_items_in_batch: Any = None,
        ignore_index: int = IGNORED, shift_labels: torch.Tensor | None = None, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        """transformers' ForCausalLMLoss."""
        from transformers.loss.loss_utils import ForCausalLMLoss

        call = _here.calls.get(id(self))
        if call is None or call.hidden is None:
            return ForCausalLMLoss(  # type: ignore[no-any-return]
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
            )
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        hidden, weight, bias = call.hidden.flatten(0, -2), self.linear.weight, self.linear.bias
        reduction = "mean" if num_items_in_batch is None else "sum"
        target = shift_labels.reshape(-1).to(hidden.device)
        loss = wide_loss(hidden, weight, target, bias, ignore_index, reduction, self.softcap)
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch


def candidate(module: Any) -> nn.Module | None:
    """The last layer of a language model of transformers; None for any other module."""
    if not type(module).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return None  # first: of a base model its loss is a warning
    if not hasattr(module, "loss_function") or not hasattr(module, "base_model") or module.base_model is module:
        return None
    return module.get_output_embeddings()  # type: ignore[no-any-return]


def another_loss(model: Any) -> bool:
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    return (
        "_loss_function" in model.__dict__ or LOSS_MAPPING.get(model.loss_type, ForCausalLMLoss) is not ForCausalLMLoss
    )


def _softcap(model: Any) -> float:
    """What the configuration says of one, 0.0 for none."""
    return float(getattr(model.config, "final_logit_softcapping", None) or 0.0)


def tried(model: Any, linear: nn.Linear) -> float | None:
    """The soft-cap between the last layer and the loss, found by trying: 0.0 for none, None where it is not this loss.

    Tried is a copy whose base model gives random numbers, with a narrow last layer.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Given(BaseModelOutputWithPast):  # type: ignore[misc]
        def __getattr__(self, name: str) -> None:
            if name.startswith("_"):
                raise AttributeError(name)

    source = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=source, dtype=torch.float32, device="cpu")
    hidden = draw(1, 6, 8)
    base = nn.Identity()
    base.forward = lambda *_, **__: Given(last_hidden_state=hidden)  # type: ignore[method-assign]
    small = nn.Linear(8, linear.out_features, bias=linear.bias is not None, device="meta")
    for name, parameter in list(small.named_parameters()):
        setattr(small, name, nn.Parameter(draw(parameter.shape)))
    modules = {id(model.base_model): base, id(linear): small}
    other = object.__new__(type(model))
    other.__dict__.update(model.__dict__)
    other.__dict__["config"] = copy.copy(model.config)
    other.config.output_router_logits = False
    other.__dict__["_modules"] = {name: modules.get(id(each), each) for name, each in model._modules.items()}
    ids = torch.arange(6, device="cpu")[None] % linear.out_features
    labels = ids.flip(1).masked_fill(ids == 2, IGNORED)
    with torch.no_grad():
        out = type(model).forward(other, input_ids=ids, labels=labels, return_dict=True)
        for softcap in (0.0, _softcap(model)):
            logits = capped(F.linear(hidden, small.weight, small.bias), softcap)
            target = F.pad(labels, (0, 1), value=IGNORED)[0, 1:]
            loss = wide_loss(hidden[0], small.weight, target, small.bias, IGNORED, "mean", softcap)
            pairs = (out.logits, logits), (out.loss, loss)
            if all(mine.shape == right.shape and torch.allclose(mine, right, rtol=1e-4) for mine, right in pairs):
                return softcap
    return None
