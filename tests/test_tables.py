"""The tables of README.md and docs/speed.md say what the figures do."""

import copy
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"torch": "2.11.0", "cudnn": "91900", "triton": "3.6.0", "python": "3.12.3", "driver": "580"}


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tables")


def step(model, mode, ms, ratio, losses=None, mb=None, **more):
    """A row as `e2e.py` writes it."""
    return {
        "model": model,
        "mode": mode,
        "first_losses": losses or {name: [1.0, 0.9] for name in ms},
        "ms": ms,
        "peak_mb": mb or dict.fromkeys(ms, 2048),
        "ratio": {**{name: [value - 0.1, value, value + 0.1] for name, value in ratio.items()}, "again": [1, 1, 1]},
        **more,
    }


def document(*rows, **more):
    return {
        "device": "GPU",
        "environment": ENVIRONMENT,
        "time": "2026-11-29T01:00:00Z",
        "commit": "abc",
        "results": list(rows),
        **more,
    }


def rows_of(lines):
    return [line.strip("|").split("|") for line in lines if line.startswith("|")][2:]


def test_pages_have_the_tables_that_the_figures_make(tables):
    made = tables.blocks()
    for page, names in tables.PAGES.items():
        text = (ROOT / page).read_text()
        assert text == tables.filled(text, made), "run python benchmarks/tables.py --write"
        for name in names:
            assert "\n".join(made[name]) in text


def test_a_figure_that_changes_changes_the_page(tables, monkeypatch):
    page, load = (ROOT / "README.md").read_text(), tables.load
    for file, change in (
        ("e2e", lambda d: d["results"][0]["ms"].update(tilebook=1.25)),
        ("train_steps", lambda d: d["results"][0]["losses"]["tilebook"].__setitem__(0, 99.0)),
        ("never_slower", lambda d: d["classes"]["eager"]["mlp forward"].update(worst=0.123)),
    ):
        documents = {name: load(name) for name in ("e2e", "train_steps", "never_slower")}
        change(documents[file])
        monkeypatch.setattr(tables, "load", documents.__getitem__)
        assert tables.filled(page, tables.blocks()) != page


def test_what_was_not_measured_is_a_dash_and_the_least_gain_comes_first(tables):
    made = tables.models_table([
        document(
            step("A 2 × 8", "eager", {"pytorch": 30.0, "tilebook": 20.0}, {"tilebook": 1.5}),
            step("B", "eager", {"pytorch": 10.0, "tilebook": 12.0}, {"tilebook": 0.8}),
            {"model": "B", "mode": "compiled", "failed": "no memory"},
        )
    ])  # fmt: skip
    assert made[0].startswith("One GPU, PyTorch 2.11.0, cuDNN 9.19, Triton 3.6.0")
    b, a = rows_of(made)
    assert a == ["A 2×8", "**30.0**", "–", "**20.0**", "–", "–", "1.50 (1.40–1.60)", "2.0 → 2.0"]
    assert (b[0], b[2], b[6]) == ("B", "–", "0.80 (0.70–0.90)")


def test_the_best_way_with_tilebook_is_compared_with_the_best_without(tables):
    eager = {"pytorch": 30.0, "tilebook": 20.0, "patched": 12.0}
    compiled = {"pytorch": 16.0, "tilebook": 15.0}
    first = step(
        "A", "eager", eager, {"tilebook": 1.5, "patched": 2.5}, mb={**dict.fromkeys(eager, 4096), "patched": 512}
    )
    other = step("A", "compiled", compiled, {"tilebook": 1.06})
    # Eager and compiled were not timed in turns: 16 / 12, and not the 2.5 over eager PyTorch.
    ((*times, gain, memory),) = rows_of(tables.models_table([document(first, other)]))
    assert times == ["A", "30.0", "**16.0**", "20.0", "15.0", "**12.0** patch"]
    assert (gain, memory) == ("≈ 1.33", "2.0 → 0.50")
    patched = step("A", "compiled, patched", {"pytorch": 15.5, "patched": 10.0}, {"patched": 1.57})
    ((*times, gain, _),) = rows_of(tables.models_table([document(first, other, patched)]))
    assert times == ["A", "30.0", "**16.0**", "20.0", "15.0", "**10.0** patch, compiled"]
    assert gain == "1.57 (1.47–1.67)"


def test_a_way_that_changes_nothing_in_a_model_is_no_other_way(tables):
    ms = {"pytorch": 30.0, "tilebook": 20.0, "patched": 19.0, "loss head": 18.0}
    ratio = {"tilebook": 1.5, "patched": 1.6, "loss head": 1.7}
    rows = [step(model, "eager", ms, ratio) for model in ("BERT-base 1 × 2", "GPT-2 1 × 2")]
    bert, gpt = rows_of(tables.models_table([document(*rows)]))
    assert (bert[5], bert[6]) == ("–", "1.50 (1.40–1.60)")
    assert gpt[5] == "**18.0** loss head"


def test_models_of_which_ways_are_left_out_are_those_that_patch_leaves_as_they_are(tables):
    transformers = pytest.importorskip("transformers")
    import tilebook

    tiny = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(intermediate_size=64, **tiny))
    small = {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    models = {"BERT-base": bert, "GPT-2": transformers.GPT2LMHeadModel(transformers.GPT2Config(**small))}
    found = set()
    for name, model in models.items():
        for way in ("patched", "loss head"):
            report = tilebook.patch(model, loss_head=way == "loss head")
            found |= set() if report.changed else {(name, way)}
            report.undo()
    assert found == tables.UNCHANGED
    assert all(
        any("drop" in each and value for each, value in model.config.to_dict().items()) for model in models.values()
    )


def test_how_far_losses_part_is_said_without_dropout_and_with(tables):
    def losses(other):
        return {"pytorch": [2.0, 1.0], "tilebook": [2.0, other]}

    ms, ratio = {"pytorch": 3.0, "tilebook": 2.0}, {"tilebook": 1.5}
    rows = [
        step("Plain", "eager", ms, ratio, losses(1.0201)),
        step("BERT-base 1 × 2", "eager", ms, ratio, losses(1.2)),
        step("BERT-base 1 × 2", "compiled", ms, ratio, {"pytorch": [2.0, 1.4], "tilebook": [2.0, 1.4]}),
        step("GPT-2 1 × 2", "eager", ms, ratio, losses(1.1)),
        step("Llama 1B, 256 after 8 × 1024", "eager", ms, ratio, losses(900.0)),
    ]
    (told,) = tables.losses_told([document(*rows)])
    assert (
        "Without dropout the first losses part from plain PyTorch's by at most 1.1 % of its first (Plain, eager)."
        in told
    )
    assert "up to 10.0 % (BERT-base 1×2, eager) and 5.0 % (GPT-2 1×2, eager)" in told
    assert "plain PyTorch's own, eager and compiled, by 20.0 % in BERT-base 1×2" in told


def test_every_way_has_its_line_with_its_noise_day_and_commit(tables):
    hand = {"model": "M", "mode": "compiled", "by_hand": True, "losses": {"pytorch": [1.0], "tilebook": [1.0]}}
    hand |= {"ms": {"pytorch": 3.0, "tilebook": 2.0}, "peak_mb": {"pytorch": 100, "tilebook": 90}}
    hand |= {"ratio": [1.4, 1.5, 1.6], "noise": [0.9, 1.0, 1.1], "commit": "fed", "time": "2026-12-01T00:00:00Z"}
    ways = {"pytorch": 3.0, "tilebook": 2.5, "patched": 1.0}
    made = tables.ways_table([document(step("A", "eager", ways, {"tilebook": 1.2, "patched": 3.0}), hand)])
    assert made[0].endswith("; 29 November 2026 to 1 December 2026.")
    first, by_hand, last = rows_of(made)
    assert (first[1], first[-1], last[1]) == ("`TILEBOOK=1`, eager", "2026-11-29 abc", "patch, eager")
    assert by_hand[1:6] == ["functions by hand, compiled", "3.0", "2.0", "1.50 (1.40–1.60)", "1.00 (0.90–1.10)"]
    assert by_hand[-2:] == ["< 0.05 %", "2026-12-01 fed"]


def test_classes_of_calls_come_in_the_order_of_their_worst(tables):
    def figures(worst):
        return {"cells": 3, "worst": worst, "mean": 1.25, "noise": 1.1}

    classes = {
        "graph": {"forms forward": figures(0.9), "drawn norms training": figures(0.8)},
        "eager": {"forms forward": figures(0.7), "all, below 50 µs": figures(0.75)},
    }
    calls = document({"name": "a"}, classes=classes, measured=2, asked=1000)
    others = document({"model": "a"})
    made = tables.classes_table(calls, [others])
    assert made[0] == "The same card and versions; 29 November 2026. 2 of 1,000 calls were measured."
    assert rows_of(made) == [
        ["unfused attention, forward", "3", "0.90", "1.25", "1.10", "0.70", "1.25", "1.10"],
        ["all, below 50 µs", "3", "–", "–", "–", "0.75", "1.25", "1.10"],
        ["drawn RMSNorm, training", "3", "0.80", "1.25", "1.10", "–", "–", "–"],
    ]
    newer = copy.deepcopy(calls)
    newer["environment"]["torch"] = "2.13.0"
    assert tables.classes_table(newer, [others])[0].startswith("One GPU, PyTorch 2.13.0")


def test_a_mark_that_nothing_is_made_for_is_refused(tables):
    page = "a\n<!-- tables.py: models -->\nold\n<!-- end -->\nb"
    assert tables.filled(page, {"models": ["new"]}) == page.replace("old", "new")
    with pytest.raises(ValueError, match="models"):
        tables.filled(page, {"ways": ["new"]})
