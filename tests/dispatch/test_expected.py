"""Where PyTorch has a kernel, a neighbour's verdict serves only if enough of its lead must be left."""

import json
from pathlib import Path

import pytest
from dispatch_samples import GPU, verdict

from tilebook import device as devices
from tilebook import op as ops
from tilebook.registry import Environment, Revocation

NORM = ops.get("layer_norm_bwd")
LOSS = ops.get("cross_entropy_fwd")
MEASURED = NORM.problem.parse("M8192,N1024", "fp32")


def led(problem, lead, op=NORM, config=None, theirs="torch", **changes):
    """A verdict whose winner is so many times as fast as PyTorch's kernel."""
    config = op.tunable.space.default(problem, GPU) if config is None else config
    ranked = [{"implementation": "triton", "config": dict(config), "time_ms": 1.0}]
    ranked.append({"implementation": theirs, "config": {}, "time_ms": lead})
    fields = {"op": op.name, "kernel": op.digest, "evidence": {"candidates": ranked}}
    return verdict(problem, config, **{**fields, **changes})


def other_config(problem):
    default = NORM.tunable.space.default(problem, GPU)
    return next(c for c in NORM.tunable.space.feasible(problem, GPU) if c != default)


@pytest.mark.parametrize("text", ["M16384,N1024", "M32768,N1024", "M8192,N768", "M16384,N768"])
def test_a_lead_that_is_large_enough_serves_a_problem_like_the_measured_one(choose, text):
    config = other_config(MEASURED)
    choice = choose(led(MEASURED, 1.3, config=config), problem=NORM.problem.parse(text, "fp32"), op=NORM)
    assert (choice.source, choice.implementation.name, choice.config, choice.native) == (
        "nearest", "triton", config, False,
    )  # fmt: skip


UNLIKE = {
    "fewer rows": "M4096,N1024",
    "many more rows": "M65536,N1024",
    "wider blocks": "M8192,N1040",
    "much narrower": "M8192,N640",
    "no whole vectors": "M8192,N1001",
    "without parameters": "M8192,N768,bare",
    "side by side": "M8192,N1024,transposed256",
}


@pytest.mark.parametrize("name", UNLIKE)
def test_a_problem_that_is_not_like_it_is_pytorchs(choose, name):
    choice = choose(led(MEASURED, 3.0), problem=NORM.problem.parse(UNLIKE[name], "fp32"), op=NORM)
    assert (choice.source, choice.native) == ("fallback", True)


GATE, ROTATION = ops.get("glu_bwd"), ops.get("rope_fwd")
OTHERS = {  # measured, like it, not like it
    GATE: (
        "M8192,F8192",
        ("M8192,F11008", "M4096,F5632", "M16384,F14336", "M32768,F8192"),
        ("M8192,F8192,gelu_tanh", "M8192,F8192,packed", "M1024,F8192", "M8192,F1024", "M8192,F11000", "M65536,F32768"),
    ),
    ROTATION: (
        "B4,H32,Hkv8,S2048,D128",
        ("B4,H32,S2048,D128", "B1,H16,Hkv8,S8192,D256", "B8,H14,Hkv2,S2048,D64", "B1,H24,S4096,D96"),
        ("B4,H32,Hkv8,S2048,D128,interleaved", "B4,H32,S2048,D80,R32", "B1,H32,Hkv8,S512,D128", "B4,H32,S2048,D32"),
    ),
}


@pytest.mark.parametrize("op", OTHERS, ids=lambda op: op.name)
def test_gates_and_rotations_are_like_others_of_their_form_and_size(choose, op):
    measured, like, unlike = OTHERS[op]
    problem = op.problem.parse(measured, "bf16")
    choose(led(problem, 2.2, op=op), problem=problem, op=op)
    for text in like:
        choice = choose.again(problem=op.problem.parse(text, "bf16"), op=op)
        assert (choice.source, choice.implementation.name) == ("nearest", "triton"), text
    for text in unlike:
        assert choose.again(problem=op.problem.parse(text, "bf16"), op=op).native, text
    assert choose.again(problem=op.problem.parse(like[0], "fp16"), op=op).native


def test_another_dtype_and_another_op_are_pytorchs(choose):
    assert choose(led(MEASURED, 3.0), problem=NORM.problem.parse("M8192,N768", "bf16"), op=NORM).native
    forward = ops.get("layer_norm_fwd")
    assert choose.again(problem=forward.problem.parse("M8192,N768", "fp32"), op=forward).native


def test_a_thin_lead_is_pytorchs(choose):
    problem = NORM.problem.parse("M16384,N1024", "fp32")
    assert choose(led(MEASURED, 1.2), problem=problem, op=NORM).native


def test_the_smallest_lead_among_those_like_it_counts(choose):
    problem = NORM.problem.parse("M16384,N1024", "fp32")
    thin = led(NORM.problem.parse("M8192,N768", "fp32"), 1.1)
    assert not choose(led(MEASURED, 3.0), problem=problem, op=NORM).native
    assert choose(led(MEASURED, 3.0), thin, problem=problem, op=NORM).native


def test_the_nearest_of_them_serves(choose):
    near, far = other_config(MEASURED), NORM.tunable.space.default(MEASURED, GPU)
    farther = led(NORM.problem.parse("M8192,N768", "fp32"), 2.0, config=far)
    choice = choose(
        farther, led(MEASURED, 2.0, config=near), problem=NORM.problem.parse("M16384,N1024", "fp32"), op=NORM
    )
    assert choice.config == near


def test_a_verdict_of_its_own_comes_first(choose):
    problem = NORM.problem.parse("M16384,N1024", "fp32")
    own = led(problem, 0.5, implementation="torch", config={}, evidence={
        "candidates": [{"implementation": "torch", "config": {}, "time_ms": 0.5}]
    })  # fmt: skip
    choice = choose(led(MEASURED, 3.0), own, problem=problem, op=NORM)
    assert (choice.source, choice.implementation.name) == ("exact", "torch")


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "predicted"},
        {"evidence": {"candidates": [{"implementation": "triton", "config": {}, "time_ms": 1.0}]}},
        {"kernel": "0" * len(NORM.digest)},
        {"trusted": False},
        {"origin": "observed"},
    ],
    ids=["predicted", "PyTorch's not measured", "other source", "not trusted", "observed"],
)
def test_what_was_not_measured_against_pytorchs_is_no_evidence(choose, changes):
    assert choose(led(MEASURED, 3.0, **changes), problem=NORM.problem.parse("M16384,N1024", "fp32"), op=NORM).native


@pytest.mark.parametrize("package", ["torch", "cudnn", "cuda"])
def test_a_lead_in_another_environment_is_no_evidence(choose, package):
    problem = NORM.problem.parse("M16384,N1024", "fp32")
    here = Environment(devices.environment())
    assert not choose(led(MEASURED, 3.0, environment=here), problem=problem, op=NORM).native
    elsewhere = Environment({**devices.environment(), package: "0.1"})
    assert choose(led(MEASURED, 3.0, environment=elsewhere), problem=problem, op=NORM).native


def test_a_revoked_config_is_passed_over(choose):
    problem, config = NORM.problem.parse("M16384,N1024", "fp32"), other_config(MEASURED)
    revoked = Revocation(op=NORM.name, reason="wrong", implementation="triton", config=config)
    assert choose(led(MEASURED, 3.0, config=config), problem=problem, revocations=[revoked], op=NORM).native


def test_no_finalist_serves_that_was_not_far_enough_ahead_itself(choose):
    problem, best = NORM.problem.parse("M16384,N1024", "fp32"), other_config(MEASURED)
    slow = NORM.tunable.space.default(MEASURED, GPU)
    ranked = [
        {"implementation": "triton", "config": dict(best), "time_ms": 1.0},
        {"implementation": "torch", "config": {}, "time_ms": 1.5},
        {"implementation": "triton", "config": dict(slow), "time_ms": 3.0},
    ]
    measured = led(MEASURED, 1.5, config=best, evidence={"candidates": ranked})
    assert choose(measured, problem=problem, op=NORM).config == best
    revoked = Revocation(op=NORM.name, reason="wrong", implementation="triton", config=best)
    assert choose(measured, problem=problem, revocations=[revoked], op=NORM).native


def test_vocabularies_are_like_each_other(choose):
    measured = led(LOSS.problem.parse("M8192,V32000", "bf16"), 3.0, op=LOSS)
    for text in ("M8192,V50257", "M16384,V128256", "M2048,V32000"):
        assert choose(measured, problem=LOSS.problem.parse(text, "bf16"), op=LOSS).source == "nearest"
    for text in ("M8192,V1000", "M512,V32000", "M8192,V50257,smoothed", "M1024,V152064"):
        assert choose(measured, problem=LOSS.problem.parse(text, "bf16"), op=LOSS).native


ATTENTION = {"fwd": ops.get("attention_fwd"), "bwd": ops.get("attention_bwd")}
PADDED = "B16,H16,S512,D64,maskbk"


@pytest.mark.parametrize("direction", ATTENTION)
@pytest.mark.parametrize(
    ("text", "dtype"), [("B16,H12,S512", "bf16"), ("B128,H12,S128", "bf16"), ("B8,H16,S2048", "fp16")]
)
def test_attention_under_masks_of_keys_is_ours_on_problems_like_the_measured_one(choose, direction, text, dtype):
    op = ATTENTION[direction]
    measured, problem = op.problem.parse(PADDED, "bf16"), op.problem.parse(f"{text},D64,maskbk", dtype)
    choice = choose(led(measured, 1.7, op=op), problem=problem, op=op)
    assert (choice.source, choice.implementation.name, choice.native) == ("nearest", "triton", False)


MASKED_OTHERWISE = (
    "B16,H12,S512,D64,causal,maskbk", "B16,H12,S512,D64,maskbqk", "B16,H12,S512,D64,biasbk", "B16,H12,S512,D64",
    "B16,H12,S512,D64,maskbhk", "B16,H12,S512,D64,window64x64,maskbk", "B16,H12,S512,D64,softcap,maskbk",
    "B16,H12,S512,D32,maskbk", "B16,H12,Hkv6,S512,D64,maskbk", "B16,H12,S512,Sk300,D64,maskbk",
    "B4,H12,S512,D64,maskbk", "B16,H12,S4096,D64,maskbk",
)  # fmt: skip


@pytest.mark.parametrize("direction", ATTENTION)
@pytest.mark.parametrize("text", MASKED_OTHERWISE)
def test_attention_of_another_kind_is_not_like_it(direction, text):
    op = ATTENTION[direction]
    assert not op.problem.parse(text, "bf16").like(op.problem.parse(PADDED, "bf16"))


def test_gradients_of_wide_heads_are_measured_or_pytorchs():
    for direction, found in (("fwd", True), ("bwd", False)):
        op = ATTENTION[direction]
        wide, near = (op.problem.parse(f"{each},D128,maskbk", "bf16") for each in ("B4,H16,S1024", "B8,H16,S1024"))
        assert near.like(wide) is found
    op = ATTENTION["fwd"]
    assert not op.problem.parse(PADDED, "fp32").like(op.problem.parse(PADDED, "fp32"))


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/transfer.json")), ids=lambda path: path.parent.name)
def test_no_more_of_a_lead_is_counted_on_than_was_seen_to_be_left(path):
    rows = [row for row in json.loads(path.read_text())["results"] if "left" in row]
    assert len(rows) >= 8
    for row in rows:
        assert row["left"] >= ops.get(row["op"]).problem.TRANSFER, row


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/held_out.json")), ids=lambda path: path.parent.name)
def test_problems_that_no_verdict_was_on_had_what_was_counted_on(path):
    rows = json.loads(path.read_text())["results"]
    served = 0
    for row in rows:
        op, other = ops.get(row["op"]), row["config_of"]
        problem, measured = (op.problem.parse(text, row["dtype"]) for text in (row["problem"], other))
        if problem.like(measured) and row["expected"] * op.problem.TRANSFER >= 1.05:
            served += 1
            assert row["left"] >= op.problem.TRANSFER, row
            assert row["lead"][0] > 1, row
    assert served >= 30


def test_what_nobody_has_looked_at_is_counted_on_by_no_family():
    for name, op in ops.ops().items():
        looked_at = "layer_norm", "rms_norm", "cross_entropy", "rope", "glu_bwd", "add_fwd", "bias_bwd"
        attention = name in ("attention_fwd", "attention_bwd")  # under masks of keys
        assert bool(op.problem.TRANSFER) == (attention or name.startswith(looked_at)), name
