"""Linear attention where decays are large, where calls are wrong, and in a program's modes and transforms."""

import pytest
import torch

import tilebook
from tilebook import device as devices
from tilebook import op
from tilebook.kernels.bidirectional import features
from tilebook.launch import intercepted


def token_by_token(q, k, v, g):
    q, k, v, g = (x.double() for x in (q, k, v, g))
    state, outputs = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
    for n in range(q.shape[2]):
        state = state * g[:, :, n].clamp(min=-100).exp()[..., None, None]
        state = state + k[:, :, n, :, None] * v[:, :, n, None, :]
        outputs.append((q[:, :, n, None, :] @ state)[:, :, 0])
    return torch.stack(outputs, 2) * q.shape[3] ** -0.5, state


def test_what_comes_after_many_tokens_that_forget_all_is_as_exact_as_without_them():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4096, 4) for _ in range(3))
    g = torch.full((1, 1, 4096), -0.01)
    g[:, :, :2048] = -torch.inf
    found = tilebook.gated_linear_attention(q, k, v, g, return_state=True)
    for mine, right in zip(found, token_by_token(q, k, v, g), strict=True):
        assert (mine - right).abs().max() < 1e-5 * right.abs().max()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", ["elu+1", "performer", "softmax"])
@pytest.mark.parametrize(
    "q", [torch.ones(()), torch.ones(2, 5, 8), torch.ones(1, 2, 5, 0), torch.ones(1, 2, 5, 8).int()]
)
def test_what_no_feature_map_takes_is_named(q, feature_map, causal):
    with pytest.raises(ValueError, match=r"floating point tensors of shape \(batch, heads.*got q "):
        tilebook.linear_attention(q, q, q, feature_map=feature_map, causal=causal)


def test_a_feature_map_that_makes_no_tensors_and_tensors_of_two_kinds_are_named():
    q = torch.ones(1, 2, 5, 8)
    with pytest.raises(ValueError, match="feature_map must return tensors, not int, int"):
        tilebook.linear_attention(q, q, q, feature_map=lambda x: 1)
    with pytest.raises(ValueError, match=r"at most; got q .* torch\.float32 on cpu, k .* torch\.float16 on cpu"):
        tilebook.linear_attention(q, q.half(), q.half(), feature_map="relu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": None}, "expected a tensor, not NoneType"),
        ({"state": None}, "expected a tensor, not NoneType"),
        ({"log_decay": -0.1}, "expected a tensor, not float"),
        ({"v": torch.ones(1, 2, 8).int()}, "must be floating point"),
        ({"v": torch.ones(1, 2, 8, device="meta")}, "on one device"),
    ],
)
def test_a_wrong_step_is_named(change, message):
    given = {**dict.fromkeys("qkv", torch.ones(1, 2, 8)), "state": torch.ones(1, 2, 8, 8), **change}
    with pytest.raises(ValueError, match=message):
        tilebook.linear_attention_step(**given)


def test_autocast_takes_tensors_of_several_dtypes_causal_or_not():
    q = torch.ones(1, 2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for causal in (False, True):
            assert tilebook.linear_attention(q, q.bfloat16(), q, causal=causal).dtype == torch.bfloat16


def attended(x):
    return tilebook.linear_attention(x, x, x, feature_map="performer")


def test_random_features_are_the_same_whatever_the_first_call_is_under():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 9, 8)
    right = attended(x)

    def inferred():
        with torch.inference_mode():
            return attended(x)

    def elsewhere():
        with torch.device("meta"):
            return attended(x)

    compiled = torch.compile(attended, backend="aot_eager", fullgraph=True)
    for first in (inferred, elsewhere, lambda: torch.vmap(attended)(x[None])[0], lambda: compiled(x)):
        features._projection.cache_clear()
        torch.testing.assert_close(first(), right)
        assert torch.equal(attended(x), right)
        assert not features.projection(8, 64, 0).is_inference()


def test_random_features_under_a_fake_mode_are_not_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode

    features._projection.cache_clear()
    with FakeTensorMode():
        assert attended(torch.ones(1, 2, 9, 8)).shape == (1, 2, 9, 8)
    assert type(features.projection(8, 64, 0)) is torch.Tensor


def test_random_features_are_no_coarser_under_autocast():
    torch.manual_seed(0)
    x = 3 * torch.randn(1, 2, 9, 8)
    right = features.performer(x, x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(features.performer(x, x), right)


def test_a_gpu_can_start_as_many_heads_as_there_are():
    """It takes 65,535 programs at most along the second axis of a grid."""
    q = torch.empty(1 << 12, 32, 2048, 8, dtype=torch.bfloat16, device="meta")
    g, state = torch.empty(q.shape[:3], device="meta"), torch.empty(*q.shape[:2], 8, 8, device="meta")
    base = {"CHUNK": 16, "BLOCK_V": 16, "STATE_V": 16, "STATE_WARPS": 4, "num_warps": 1, "num_stages": 1, "WALK": 8}
    grids = []
    with devices.posing_as(devices.find("H200")), intercepted(lambda kernel, grid, *_: grids.append(grid)):
        forward, backward = (op.get(f"linear_attention_{way}").implementations["triton"] for way in ("fwd", "bwd"))
        forward(q, q, q, g, state, 1.0, False, 0.0, config=op.Config(base, SPAN=8))
        backward(q, state, q, q, q, g, state, None, 1.0, True, config=op.Config(base))
    assert len(grids) == 11
    assert max(grid[1] for grid in grids) < 1 << 16
