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


def test_a_model_poses_its_norms_to_the_family_that_it_has():
    found = {family: {p.label for _, p in posed(family)} for family in ("rms_norm", "layer_norm")}
    assert {"M8192,N4096", "M262144,N128"} <= found["rms_norm"]  # Llama-3 8B, the heads of Qwen3 0.6B
    for model, label in {
        "BERT base": "M8192,N768",
        "ViT-B/16": "M16384,N768",  # 64 × 197
        "GPT-2 XL": "M16,N1600",
        "CCT-14": "M32768,N384,transposed196",
        "ModernBERT base": "M16384,N768,unbiased",
        "DiT-XL/2": "M8192,N1152,bare",
        "Flux.1": "M8192,N3072,bare",
    }.items():
        assert label in found["layer_norm"], model
    asking = {family: {call.model for call in models.calls() if call.family == family} for family in found}
    assert not asking["rms_norm"] & asking["layer_norm"]
    assert asking["rms_norm"] == {name for name, model in models.MODELS.items() if model.rms}
    assert asking["layer_norm"] == {name for name, model in models.MODELS.items() if not model.rms and model.inner}
    assert "M8192,N3584" in found["rms_norm"] - found["layer_norm"]  # Qwen2 7B's


def test_calls_are_of_families_that_there_are_and_are_posed_in_the_words_of_their_problems():
    for family, shape, dtype in {(call.family, call.shape, call.dtype) for call in models.calls()}:
        for op in ops.families()[family]:
            assert op.problem.parse(shape, dtype).dtype == dtype
    for family in ("rms_norm", "layer_norm"):
        assert {(p.label, p.dtype) for _, p in posed(family)} == set(models.shapes(family))


def test_norms_share_the_time_of_their_models():
    gpu = devices.find("H200")
    rms, layer = (models.share(posed(family), gpu) for family in ("rms_norm", "layer_norm"))
    for found in (rms, layer, models.share([*posed("rms_norm"), *posed("layer_norm")], gpu)):
        assert sum(found) == pytest.approx(1.0)
        assert min(found) > 0


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


def test_the_suite_of_training_has_norms_as_autocast_has_them():
    for family in ("layer_norm", "rms_norm"):
        for op in ops.families()[family]:
            found = op.problem.suites()["training"]
            assert len(found) == len(set(found)) >= 30
            assert all(problem.dtype == "fp32" and problem.rows >= 2048 for problem in found)
