"""`attention(…, approx="auto")`: never without being asked, and only from the length on that was measured."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import tilebook
from tilebook import approximation


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(approximation, "user_folder", lambda: tmp_path)
    for cached in (approximation._kept, approximation._say):
        cached.cache_clear()
    yield
    for cached in (approximation._kept, approximation._say):
        cached.cache_clear()


def qkv(n=48, heads=2, **how):
    torch.manual_seed(0)
    return [0.3 * torch.randn(1, heads, n, 16, **how) for _ in range(3)]


def measured(forward, training=1e9, width=16):
    return [
        {"head_dim": width, "direction": kind, "tokens": {"performer": tokens, "linear": 1.0}}
        for kind, tokens in (("forward", forward), ("with gradients", training))
    ]


def features(q, k, v):
    return tilebook.linear_attention(q, k, v, feature_map="performer", causal=True)


def test_without_being_asked_it_is_exact_and_silent():
    approximation.keep("cpu", measured(1))
    q, k, v = qkv()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        o = tilebook.attention(q, k, v, causal=True)
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_from_the_measured_length_on_it_is_approximated_and_says_so_once():
    approximation.keep("cpu", measured(40))
    q, k, v = qkv()
    with pytest.warns(UserWarning, match=r"64 random features \(Performer\), heads of 16, from 40 tokens on"):
        o = tilebook.attention(q, k, v, causal=True, approx="auto")
    assert torch.equal(o, features(q, k, v))
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert 0 < (o - exact).square().mean().sqrt() < 0.3 * exact.square().mean().sqrt()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for causal in ("top_left", "bottom_right"):
            assert torch.equal(tilebook.attention(q, k, v, causal=causal, approx="auto"), o)
        short = qkv(39)
        right = F.scaled_dot_product_attention(*short, is_causal=True)
        torch.testing.assert_close(tilebook.attention(*short, causal=True, approx="auto"), right)


def test_directions_have_lengths_of_their_own():
    approximation.keep("cpu", measured(40, training=60))
    for n, approximated in ((48, False), (64, True)):
        q, k, v = qkv(n, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            o = tilebook.attention(q, k, v, causal=True, approx="auto")
        other = features(q, k, v) if approximated else F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(o, other)
        assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum(), (q, k, v)))


def test_nobody_has_measured_is_said_once_and_exact():
    for found in ([], measured(1, width=8), measured(None)):
        if found:
            approximation.keep("cpu", found)
        q, k, v = qkv()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            o, _ = (tilebook.attention(q, k, v, causal=True, approx="auto") for _ in range(2))
        assert len(said) == (1 if not found else 0)
        torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize(
    "how",
    [
        {"causal": False}, {"causal": True, "window": (3, 0)}, {"causal": True, "softcap": 2.0},
        {"causal": True, "return_lse": True}, {"causal": True, "attn_mask": torch.ones(48, 48, dtype=torch.bool)},
    ],
    ids=lambda how: "-".join(how),
)  # fmt: skip
def test_what_features_have_not_is_exact(how):
    approximation.keep("cpu", measured(1))
    q, k, v = qkv()
    found, right = (tilebook.attention(q, k, v, **how, **more) for more in ({"approx": "auto"}, {}))
    torch.testing.assert_close(found, right)


def test_groups_of_heads_and_scales_are_those_of_exact_attention():
    approximation.keep("cpu", measured(1))
    q, k, v = qkv(heads=4)
    with pytest.warns(UserWarning, match="approximates"):
        o = tilebook.attention(q, k[:, :2], v[:, :2], causal=True, scale=0.5, approx="auto")
    many = [x[:, :2].repeat_interleave(2, 1) for x in (k, v)]
    torch.testing.assert_close(o, features(q * 2.0, *many))


def test_what_is_kept_takes_the_place_of_older_figures_and_broken_files_say_nothing():
    approximation.keep("cpu", measured(10))
    path = approximation.keep("cpu", measured(20, width=32))
    approximation.keep("cpu", measured(30))
    assert approximation.crossover("cpu", 16, False) == 30
    assert approximation.crossover("cpu", 24, False) == 20
    assert approximation.crossover("cpu", 64, False) is None
    for text in ("{", "[]", '{"crossover": [{"tokens": 3}]}'):
        path.write_text(text)
        approximation._kept.cache_clear()
        assert approximation.crossover("cpu", 16, False) is None


def test_it_compiles_to_one_graph():
    approximation.keep("cpu", measured(40))
    q, k, v = qkv()
    run = torch.compile(lambda *x: tilebook.attention(*x, causal=True, approx="auto"), fullgraph=True, backend="eager")
    torch.testing.assert_close(run(q, k, v), features(q, k, v))


def test_another_wish_is_named():
    with pytest.raises(ValueError, match='approx must be None or "auto"'):
        tilebook.attention(*qkv(), causal=True, approx="linear")
