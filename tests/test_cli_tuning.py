"""What `tilebook tune` says and ends with where it reaches, finds or searches nothing, on a machine without a GPU."""

import pytest
import test_cli
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens on a machine without a GPU")

run = test_cli.run


@pytest.mark.usefixtures("forked")
def test_a_tune_that_reaches_nothing_fails_in_one_line_and_names_each_problem_once(run):
    command = ["tune", "mlp", "--shape", "M4096,H64,I64", "--direction", "fwd", "--gpu", "H200", "--budget", "0.01s"]
    process = run(*command, "--workers", "1", "--registry", run.registry)
    assert process.returncode == 1
    said = process.out + process.err
    for op in ("mlp_up_fwd", "mlp_down_fwd"):
        assert said.count(f"{op} M4096,H64,I64") == 1, said
    told = "tilebook: none of 2 problems was reached (the budget was spent before its turn): give it more time"
    assert process.err.strip().splitlines()[-1] == told


@pytest.mark.usefixtures("forked")
def test_what_no_kernel_of_ours_can_run_is_said_once(run):
    command = ["tune", "attention", "--shape", "B1,H2,S64,D127", "--gpu", "H200", "--workers", "1"]
    process = run(*command, "--registry", run.registry)
    assert (process.returncode, process.out) == (1, "")
    assert process.err.count("does not run this problem") == 1, process.err
    assert "run `tilebook tune` first" not in process.err
    assert process.err.strip().splitlines()[-1] == "tilebook: 2 of 2 problems failed"


@pytest.mark.usefixtures("forked")
def test_what_was_measured_before_it_shipped_is_not_searched_by_prediction_unless_it_is_forced(run):
    command = ["tune", "attention_fwd", "--shape", "B8,H16,S2048,D128,causal", "--gpu", "H200", "--workers", "1"]
    process = run(*command, "--registry", run.registry)
    assert process.returncode == 0, process.err
    assert "attention_fwd B8,H16,S2048,D128,causal: has a measured verdict already" in process.err
    assert "(measured, shipped)" in process.out
    assert "what it took" not in process.out
    forced = run(*command, "--registry", run.registry, "--force", "--budget", "0.01s")
    assert "has a measured verdict" not in forced.err
