"""`tilebook.patch` of transformers' hybrid models, whose linear layers have the gated delta rule."""

import pytest
import torch

import tilebook
from tilebook import dispatch, recurrence

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

DELTA = "attention with tilebook.gated_delta_rule"
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1,
}  # fmt: skip
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has kernels that are compiled")


@pytest.fixture
def called(monkeypatch):
    """How often ours was called."""
    calls, ours = [], recurrence.gated_delta_rule
    monkeypatch.setattr(recurrence, "gated_delta_rule", lambda *args, **how: calls.append(1) or ours(*args, **how))
    return calls


def made(family="qwen3_next"):
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES)
    return transformers.AutoModelForCausalLM.from_config(config)


def step(model, length=20):
    ids = torch.randint(50, (1, length), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    found = model(ids, labels=ids)
    found.loss.backward()
    return [found.logits.detach(), *(x.grad.clone() for x in model.parameters() if x.grad is not None)]


@interpreted
@pytest.mark.parametrize(
    ("family", "route"), [("qwen3_next", "torch"), ("qwen3_next", "triton"), ("qwen3_5_text", "torch")]
)
def test_layers_with_the_rule_call_ours_and_give_the_same_numbers(family, route, called):
    model = made(family)
    right = step(model)
    with tilebook.patched(model) as report:
        assert list(report.changed.values()).count(DELTA) == 1, str(report)
        called.clear()
        with dispatch.use(route):
            found = step(model)
        assert len(called) == 1, "once in its only layer of the kind"
    for mine, other in zip(found, right, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=3e-4 * other.abs().max().item() + 1e-7)
    assert all(torch.equal(mine, other) for mine, other in zip(step(model), right, strict=True))


def test_patched_models_generate_the_same_tokens(called):
    model = made().eval()
    ids = torch.randint(50, (1, 9), generator=torch.Generator().manual_seed(2))
    right = model.generate(ids, max_new_tokens=6, do_sample=False)
    with tilebook.patched(model), dispatch.use("torch"):
        called.clear()
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), right)
    assert called


def test_without_a_verdict_the_kernels_of_others_are_left_where_they_are_installed(monkeypatch):
    rows, gates = torch.randn(1, 5, 2, 8), torch.rand(1, 5, 2)
    options = {"g": -gates, "beta": gates, "use_qk_l2norm_in_kernel": True}
    assert recurrence._takes(rows, rows, rows, **options)
    monkeypatch.setattr(recurrence, "_fla_installed", lambda: True)
    assert not recurrence._takes(rows, rows, rows, **options)
    with dispatch.use("triton"):
        assert recurrence._takes(rows, rows, rows, **options)
        assert not recurrence._takes(rows, rows.half(), rows, **options)
        ends = torch.tensor([0, 2, 5])
        assert recurrence._takes(rows, rows, rows, cu_seqlens=ends, **options)
        assert not recurrence._takes(rows, rows, rows, cu_seqlens=ends, output_final_state=True, **options)


def test_a_function_whose_layers_repeat_keys_for_it_has_the_same_rule():
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    def older(query, key, value, **options):
        if key.shape[2] != value.shape[2]:
            raise RuntimeError("as many heads of all")
        return theirs.torch_chunk_gated_delta_rule(query, key, value, **options)

    def wrong(query, key, value, **options):
        times = value.shape[2] // key.shape[2]
        query, key = (x.repeat_interleave(times, 2) for x in (query, key))
        o, state = theirs.torch_chunk_gated_delta_rule(query, key, value, **options)
        return (o, state) if times == 1 else (2 * o, state)

    assert recurrence._same_rule(older)
    assert not recurrence._same_rule(wrong)


def test_another_rule_is_left(monkeypatch):
    model = made()
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    theirs = modeling.torch_chunk_gated_delta_rule
    monkeypatch.setattr(
        modeling, "torch_chunk_gated_delta_rule", lambda *args, **how: [2 * x for x in theirs(*args, **how)]
    )
    report = tilebook.patch(model)
    assert DELTA not in report.changed.values()
    assert "has another delta rule than tilebook.gated_delta_rule" in report.left.values()
