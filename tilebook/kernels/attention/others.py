"""The implementations of attention that are not ours: which there are, where they run, what they take."""

from __future__ import annotations

from tilebook.kernels.attention import flash4, peers
from tilebook.kernels.attention.backward import attention_bwd
from tilebook.kernels.attention.forward import attention_fwd

attention_fwd.implementation("torch")(peers.torch_forward)
attention_bwd.implementation("torch", deterministic=False)(peers.torch_backward)

_cudnn = {"available": peers.cudnn_available, "supports": peers.cudnn_supports}
attention_fwd.implementation("cudnn", **_cudnn)(peers.cudnn_forward)
attention_bwd.implementation("cudnn", **_cudnn, deterministic=False)(peers.cudnn_backward)

_flash4 = {"available": flash4.available, "supports": flash4.supports}
attention_fwd.implementation("flash_attention_4", **_flash4)(flash4.forward)
attention_bwd.implementation("flash_attention_4", **_flash4, deterministic=False)(flash4.backward)
