"""Programs on the GPU that could cost a process its GPU, in processes of their own."""

import pytest
from programs.isolated import run

pytestmark = pytest.mark.gpu


def hazard(function, **arguments):
    run("programs.hazards", function, **arguments)


@pytest.mark.parametrize("before", [0, 3])
def test_a_tensor_on_the_cpu_is_refused_after_any_number_of_good_calls(before):
    hazard("tensors_on_the_cpu", before=before)


def test_all_tensors_but_one_on_the_cpu_are_refused():
    hazard("all_but_one_on_the_cpu")


def test_lengths_and_tables_on_the_cpu_are_refused():
    hazard("options_on_the_cpu")


def test_a_wrong_call_does_not_change_what_serves_the_next_good_one():
    hazard("a_wrong_call_first")


@pytest.mark.parametrize("family", ["attention", "softcap", "varlen", "mlp"])
def test_the_first_call_of_a_process_may_be_captured(family):
    hazard("first_call_in_a_graph", name=family)


def test_the_first_call_of_a_kind_may_be_captured():
    hazard("first_call_of_a_kind_in_a_graph")


@pytest.mark.parametrize("warm", [True, False])
def test_training_steps_may_be_captured(warm):
    hazard("training_steps_in_a_graph", warm=warm)


def test_functions_and_modules_may_be_made_graphed_callables():
    hazard("graphed_callables")


def test_masks_of_few_numbers_cut_out_of_larger_ones_are_right():
    hazard("masks_of_few_numbers")


def test_unaligned_tensors_in_turns_with_aligned_ones_are_right():
    hazard("misaligned_after_aligned")


def test_gradients_that_arrive_in_any_layout_are_right():
    hazard("an_expanded_cotangent_after_a_dense_one")


def test_a_call_that_does_not_fit_raises_what_pytorch_raises():
    hazard("out_of_memory")
