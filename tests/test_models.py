"""Shapes of public models, from which the suite `models` is made."""

import pytest

from tilebook import device as devices
from tilebook import models
from tilebook import op as ops


def posed(family):
    return [(op, p) for op in ops.families()[family] for p in op.problem.suites()["models"]]


def test_the_suite_has_sixty_problems_of_attention_and_of_the_mlp_and_each_once():
    for family in ("attention", "mlp"):
        for op in ops.families()[family]:
            found = [p for each, p in posed(family) if each is op]
            assert len({p.key for p in found}) == len(found)
        assert len(ops.families()[family][0].problem.suites()["models"]) >= 60


def test_heads_and_widths_go_together():
    for name, model in models.MODELS.items():
        assert sum(model.attention.values()) <= model.layers, name
        assert model.heads % (model.heads_kv or model.heads) == 0, name
        for split in model.splits:
            assert model.heads % split == 0, name


def test_products_are_asked_for_from_one_row_to_sixteen_thousand_and_those_of_decoding_have_no_backward_pass():
    rows = {p.rows for op, p in posed("mlp") if op.name == "mlp_up_fwd"}
    assert {1, 16, 128} <= rows
    assert max(rows) >= 16384
    assert min(p.rows for op, p in posed("mlp") if op.direction == "bwd") >= models.LEAST_TRAINED_ROWS


def test_forms_of_models_are_posed_as_kernels_know_them():
    labels = {p.label for op, p in posed("attention") if op.name == "attention_fwd"}
    for form in ("window4095x0", "softcap", "alibi", "maskbk", "window64x64", "causal,biashqk", "Sk1500", "D256"):
        assert any(form in label for label in labels), form


def test_shares_of_time_sum_up_to_one_and_what_no_model_asks_for_has_none():
    gpu, fwd = devices.find("H200"), ops.get("attention_fwd")
    some = [(fwd, fwd.problem.parse("B1,H1,S64,D64", "bf16")), *posed("attention")]
    found = models.share(some, gpu)
    assert sum(found) == pytest.approx(1.0)
    assert found[0] == 0
    assert min(found[1:]) > 0


def test_a_shape_of_a_longer_sequence_has_the_larger_share_of_its_models_time():
    gpu, fwd = devices.find("H200"), ops.get("attention_fwd")
    local, whole = (fwd.problem.parse(f"B1,H12,S8192,D64{form}", "bf16") for form in (",window64x64", ""))
    shares = models.share([(fwd, local), (fwd, whole)], gpu)
    # 14 layers see 128 columns and 8 all 8,192.
    assert shares[1] > 10 * shares[0] > 0
