"""Programs on the CPU with our kernels in Triton's interpreter: what is about the arguments of one call."""

import pytest
import torch
from programs.layouts import (  # noqa: F401
    test_a_weight_with_a_stride_gives_pytorchs_numbers,
    test_attention_of_nothing_is_what_pytorch_makes_of_it,
    test_biases_with_a_stride_give_pytorchs_numbers,
    test_blocks_on_no_rows_are_what_pytorch_makes_of_them,
    test_decoding_nothing_is_nothing,
    test_one_row_gives_pytorchs_numbers,
    test_one_weight_expanded_to_all_columns_gives_pytorchs_numbers,
    test_one_zero_expanded_to_a_bias_gives_pytorchs_numbers,
    test_sequence_lengths_with_a_stride_are_followed,
    test_slopes_with_a_stride_are_followed,
    test_the_drop_in_on_nothing_is_what_pytorch_makes_of_it,
)
from programs.masks import test_a_bias_cut_out_of_a_larger_one_has_pytorchs_gradient  # noqa: F401
from programs.on_cpu import interpreted as device  # noqa: F401
from programs.options import (  # noqa: F401
    test_a_scale_that_requires_a_gradient_has_it_or_is_refused,
    test_any_scale_gives_pytorchs_numbers,
    test_any_scale_under_a_mask_gives_pytorchs_numbers,
    test_pytorchs_causal_biases_give_pytorchs_numbers,
    test_rows_that_see_nothing_are_zero_and_so_are_their_gradients,
    test_the_drop_in_refuses_as_pytorch_refuses,
    test_the_drop_in_refuses_the_masks_that_pytorch_refuses,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")
