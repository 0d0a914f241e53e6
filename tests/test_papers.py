"""The programs of `benchmarks/papers`, tried on the CPU."""

import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tilebook

PAPERS = Path(__file__).parents[1] / "benchmarks" / "papers"


@pytest.fixture
def papers(monkeypatch):
    monkeypatch.syspath_prepend(str(PAPERS.parent))
    monkeypatch.syspath_prepend(str(PAPERS))
    return importlib.import_module


def run(name, out, *arguments):
    command = [sys.executable, str(PAPERS / name), "--device", "cpu", "--tiny", "--rounds", "2", "--out", str(out)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert out.with_suffix(".png").exists()
    return json.loads(out.read_text()), done.stdout


@pytest.mark.long
def test_cct_is_timed_and_learns_in_every_way_and_with_every_fault(tmp_path, papers):
    document, printed = run("cct.py", tmp_path / "cct.json", "--seeds", "1", "--steps", "1")
    faults = papers("faults")
    assert [row["way"] for row in document["accuracy"]] == [*faults.WAYS, *faults.FAULTS]
    for row in document["speed"]:
        assert set(row["step"]["ms"]) == set(row["forward"]["ms"]) == set(faults.WAYS), row
    assert "5325" in printed


def test_cct_is_of_the_size_that_its_authors_give(papers):
    model, plain = papers("cct_model"), papers("faults").PLAIN
    with torch.device("meta"):
        made = model.CCT(model.CCT_7, plain), model.CCT(model.CCT_14, plain)
    sizes = [sum(each.numel() for each in one.parameters()) / 1e6 for one in made]
    assert sizes == pytest.approx([3.76, 22.17], abs=0.005)


def test_ways_of_cct_compute_the_same_and_faults_in_the_forward_pass_do_not(papers):
    model, faults = papers("cct_model"), papers("faults")
    shape, x = model.CCT_7.tiny(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain = model.CCT(shape, faults.PLAIN).eval()
    for each in plain.parameters():
        torch.nn.init.normal_(each, std=0.3)
    wanted = plain(x)

    def apart(way):
        other = model.CCT(shape, way.use).eval()
        other.load_state_dict(plain.state_dict())
        return ((other(x) - wanted).norm() / wanted.norm()).item()

    assert max(map(apart, faults.WAYS.values())) < 1e-5
    seen = {name for name, way in faults.FAULTS.items() if apart(way) > 1e-5}
    assert seen == {
        "the scale left out",
        "the scale applied twice",
        "heads and tokens mixed up",
        "64 rows of padding seen as keys",
        "softmax over the queries",
        "tanh GELU",
        "the first bias after GELU",
        "tanh GELU and fp16, its loss not scaled",
    }


@pytest.mark.long
def test_distilbert_is_timed_and_learns_with_attention_of_every_make(tmp_path):
    document, printed = run("distilbert.py", tmp_path / "distilbert.json", "--seeds", "1", "--epochs", "1")
    ways = ["pytorch", "sdpa", "attn_implementation", "TILEBOOK=1"]
    assert [row["way"] for row in document["accuracy"]] == ways
    for row in document["speed"]:
        assert list(row["ms"]) == ways, row
    assert "1104" in printed


def test_distilbert_learns_with_linear_attention_in_all_layers_and_in_every_other_one(
    tmp_path, papers, monkeypatch, capsys
):
    out = tmp_path / "linear.json"
    arguments = ["--device", "cpu", "--tiny", "--rounds", "2", "--seeds", "1", "--epochs", "1", "--out"]
    monkeypatch.setattr("sys.argv", ["distilbert_linear.py", *arguments, str(out)])
    papers("distilbert_linear").main()
    document, printed = json.loads(out.read_text()), capsys.readouterr().out
    ways = ["pytorch", "sdpa", "tilebook", "Performer", "hybrid", "elu+1"]
    assert [(row["tokens"], list(row["ms"])) for row in document["speed"]] == [(1024, ways)]
    assert [row["way"] for row in document["accuracy"]["1024"]] == ways
    assert out.with_suffix(".png").exists()
    assert "2993" in printed
    assert "| 1024 | hybrid |" in printed


@pytest.mark.long
def test_a_language_model_of_bytes_learns_with_all_kinds_of_layers(tmp_path, papers, monkeypatch):
    program = papers("hybrid_language")
    sizes = {way: sum(x.numel() for x in program.model_of(way, 8, 64, 4).parameters()) for way in program.WAYS}
    assert max(sizes.values()) < 1.01 * min(sizes.values())
    kinds = [each.kind for each in program.model_of("1:3", 8, 64, 4).attention]
    assert kinds == ["gated", "gated", "gated", "exact"] * 2
    out = tmp_path / "bytes.json"
    monkeypatch.setattr(program, "WAYS", {"1:1": ("gated", "exact")})
    monkeypatch.setattr(
        "sys.argv", ["hybrid_language.py", "--device", "cpu", "--tiny", "--rounds", "2", "--out", str(out)]
    )
    program.main()
    document = json.loads(out.read_text())
    assert [row["tokens"] for row in document["speed"]] == [64, 96]
    assert all(4 < row["held_out"] < 9 for row in document["learned"])


def test_ways_of_distilbert_have_the_layers_that_they_are_named_for(papers):
    program, e2e = papers("distilbert_linear"), papers("e2e")
    tilebook.register_transformers()
    names = {}
    for name, way in program.WAYS.items():
        model = way.turned(e2e.made(program.case_of(2, 1024), True, "cpu", way.attention))
        layers = model.distilbert.transformer.layer
        names[name] = [each.attention.config._attn_implementation for each in layers]
    linear = "tilebook_linear"
    assert names == {
        "pytorch": ["eager"] * 2,
        "sdpa": ["sdpa"] * 2,
        "tilebook": ["tilebook"] * 2,
        "Performer": [linear] * 2,
        "hybrid": [linear, "tilebook"],
        "elu+1": [linear] * 2,
    }


def test_accuracy_is_kept_within_a_bound_or_the_noise_of_seeds(papers):
    found = {"pytorch": [90.0, 91.0], "near": [89.8, 90.8], "noisy": [88.0, 91.0], "lost": [88.0, 89.2], "once": [91.0]}
    rows = {row["way"]: row for row in papers("beside").apart(found, {"lost": 12.0})}
    assert {name: row["kept"] for name, row in rows.items()} == {
        "pytorch": True, "near": True, "noisy": True, "lost": False, "once": True
    }  # fmt: skip
    assert rows["lost"]["difference"] == pytest.approx(-1.9)
    assert (rows["lost"]["error"], rows["lost"]["put_in"]) == (pytest.approx(0.1), 12.0)
    assert (rows["once"]["difference"], rows["once"]["error"]) == (1.0, None)


def test_data_is_read_from_the_folders_that_people_have(tmp_path, papers):
    for part in ("train", "test"):
        for kind in ("neg", "pos"):
            (tmp_path / part / kind).mkdir(parents=True)
            for n in range(3):
                (tmp_path / part / kind / f"{n}_7.txt").write_text(f"A {kind} film.")
    found = papers("texts").imdb(tmp_path, 8, 99, 4)
    ids, labels = found.train
    assert (ids.shape, labels.tolist().count(1)) == ((4, 8), 2)
    assert len({tuple(row) for row in ids.tolist()}) == 2  # one text of each kind
    assert (ids > 0).sum(1).tolist() == [5] * 4  # and the first token

    row = torch.arange(3 * 32 * 32, dtype=torch.uint8)
    for name in ("test_batch", *(f"data_batch_{n}" for n in range(1, 6))):
        (tmp_path / name).write_bytes(pickle.dumps({b"data": row.repeat(2, 1).numpy(), b"labels": [4, 9]}))
    images, labels = papers("images").chosen("", tmp_path, False).train
    assert labels.tolist() == [4, 9] * 5
    mean, deviation = 0.4465, 0.2616
    assert images[0, 2, 0, 5].item() == pytest.approx((row[2 * 1024 + 5].item() / 255 - mean) / deviation)


def test_texts_of_a_file_are_joined_until_they_are_as_long_as_can_be_read(papers, monkeypatch, tmp_path):
    texts = papers("texts")
    folders = [tmp_path / "stdlib", tmp_path / "torch"]
    for folder in folders:
        folder.mkdir()
        for n in range(12):
            (folder / f"{n}.py").write_text("\n".join(f'"""{"word " * 9}"""' for _ in range(5)) + '\n"""few"""\n')
    monkeypatch.setattr(texts.sysconfig, "get_path", lambda _: folders[0])
    monkeypatch.setattr(texts.torch, "__file__", str(folders[1] / "__init__.py"))
    for joined, wanted in ((False, [10] * 120), (True, [11] * 24 + [15] * 48)):
        found = texts.packages(15, 99, 10**6, joined)
        assert sorted((ids > 0).sum().item() for part in (found.train, found.test) for ids in part[0]) == wanted


@pytest.mark.long
def test_a_grid_of_gpts_is_timed_with_attention_of_every_make(tmp_path):
    document, printed = run("flash_grid.py", tmp_path / "grid.json")
    assert [len(row["ms"]) for row in document["results"]] == [3] * 4
    assert document["saved"]["standard"]["configurations"] == 4
    assert "68.9" in printed


def test_shares_count_what_both_hold_and_name_what_only_one_does(papers):
    rows = [
        {"ms": {"standard": 4.0, "tilebook": 1.0}, "bytes": {"standard": 10, "tilebook": 5}},
        {"ms": {"standard": 4.0, "tilebook": 2.0}, "bytes": {"standard": 10, "tilebook": 10}},
        {"ms": {"tilebook": 2.0}, "bytes": {"tilebook": 10}},
    ]
    found = papers("flash_grid").saved(rows, "standard")
    assert found["time"] == [62.5, 50.0, 75.0]
    assert found["memory"] == [25.0, 0.0, 50.0]
    assert (found["configurations"], found["only tilebook fits"], found["only standard fits"]) == (2, 1, 0)


@pytest.mark.long
def test_attention_is_timed_in_every_direction_and_seen_by_the_profiler(tmp_path):
    document, printed = run("flash_triton.py", tmp_path / "flash.json")
    assert len(document["results"]) == 2 * 2 * 3
    for row in document["results"]:
        assert set(row["ms"]) == set(row["profile"]) == {"written out", "sdpa", "tilebook"}
        assert all(each["cpu_ms"] > 0 for each in row["profile"].values())
    assert "backward level" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens on a machine without a GPU")
@pytest.mark.parametrize(
    "name", ["cct", "distilbert", "distilbert_linear", "flash_grid", "flash_triton", "hybrid_language"]
)
def test_without_a_gpu_a_program_says_so_in_one_line(tmp_path, name):
    command = [sys.executable, str(PAPERS / f"{name}.py"), "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == f"{name}.py: there is no GPU here: --device cpu --tiny tries whether the program runs\n"
    assert not any(tmp_path.iterdir())


def test_commands_of_the_page_about_papers_can_be_pasted():
    page = (PAPERS.parents[1] / "docs" / "papers.md").read_text(encoding="utf-8")
    commands = [line.strip() for line in page.splitlines() if line.startswith("    ")]
    assert len(commands) >= 6
    assert not [line for line in commands if set(line) & set("[]<>…")]
