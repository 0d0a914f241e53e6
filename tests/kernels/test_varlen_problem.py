"""What problems packed sequences pose: which are one, which are none, their lengths and limits."""

import itertools

import pytest
import torch
from drawing import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from tilebook.kernels.attention.form import form
from tilebook.kernels.varlen.problem import ForwardProblem, simplest
from tilebook.op import UsageError


@pytest.mark.parametrize("text", ["B4,H6,Hkv4,T64,S32,D64", "B4,H1,T64,S32,D512", "B2,H1,T128,S32,D64",
                                  "B4,H1,T64,S128,D64"])  # fmt: skip
def test_impossible_problems_are_usage_errors(text):
    with pytest.raises(UsageError):
        ForwardProblem.parse(text, "bf16")


def test_packs_of_one_bucket_are_one_problem():
    def problem(total, longest, ends=(0,) * 13, **options):
        q, k = (torch.empty(total, heads, 64, device="meta") for heads in (4, 2))
        return ForwardProblem.of(q, k, k, ends, ends, longest, longest, form(**options), 0.1)

    assert problem(9000, 1200) == problem(16384, 2048, ends=(0,) * 17)
    assert problem(9000, 1200) != problem(8192, 1200)
    assert problem(100, 100_000) == problem(100, 100)  # a limit is no length
    assert problem(4096, 1) == problem(4096, 300)  # nor is what is too low, where there must be longer ones
    assert problem(9000, 1200, right=0) != problem(9000, 1200, right=0, bottom_right=True)


@settings(max_examples=examples(60), deadline=None, derandomize=True)
@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 8), st.integers(0, 5))
def test_made_lengths_are_as_the_problem_says(batch, total, longest, seed):
    longest = min(longest, total)
    if longest + batch < total:
        return
    problem = ForwardProblem(1 << batch, 1, 1, 1 << total, 1 << total, 1 << longest, 1 << longest, 64)
    problem.check()
    n_q, n_k = problem.lengths(seed)
    assert len(n_q) == len(n_k) == problem.batch
    assert min(n_q) >= 0
    assert max(n_q) <= problem.max_q
    if seed == 0:
        assert n_q == n_k
        assert (sum(n_q), max(n_q)) == (problem.total_q, problem.max_q)
    elif batch:
        assert (n_q[-1], n_k[0]) == (0, 0)


@pytest.mark.parametrize("corner", [False, True])
def test_limits_that_hide_nothing_are_dropped_and_no_others(corner):
    """Against what they do in every sequence of up to 4 queries and 6 keys."""

    def hides(left, right):
        for n_q, n_k in itertools.product(range(1, 5), range(1, 7)):
            shift = n_k - n_q if corner else 0
            for i, j in itertools.product(range(n_q), range(n_k)):
                distance = j - i - shift
                if (left >= 0 and distance < -left) or (right >= 0 and distance > right):
                    return True
        return False

    for left, right in itertools.product(range(-1, 8), repeat=2):
        kept_left, kept_right, kept_corner = simplest(4, 6, left, right, corner)
        assert (kept_left == -1) == (not hides(left, -1))
        assert (kept_right == -1) == (not hides(-1, right))
        assert kept_corner == (corner or kept_left == kept_right == -1)
