"""`attn_implementation="tilebook"` in transformers: an attention function, and the mask function that belongs to it.

A mask is a tensor of booleans, exact as PyTorch's attention needs it. Where it has a simple structure (causal, a
window, padded keys, packed sequences), a note on the tensor says so. The attention function passes the structure on
instead of the tensor where kernels take it. A model that changes the mask loses the note and keeps a right mask.
"""

from __future__ import annotations

from tilebook.huggingface.attention import NAME, attention_forward
from tilebook.huggingface.masks import attention_mask

OLDEST = 5, 17


def register() -> None:
    """`tilebook.register_transformers`, which says what it is for. Raises ImportError."""
    import transformers
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ImportError(f"'{NAME}' attention needs transformers {needed} or newer, not {transformers.__version__}")
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
