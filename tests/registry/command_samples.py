"""What tests of commands share: a home, and a registry in it with something of everything."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from registry_samples import A100, START, miss, revocation, trial, verdict

from tilebook import device as devices
from tilebook import op as ops
from tilebook.cli import main
from tilebook.registry import Registry, Trial, Verdict

OP = ops.get("rms_norm_fwd")
H200 = devices.find("H200")
Run = Callable[..., Result]


def key(shape: str, dtype: str = "bf16") -> str:
    return OP.problem.parse(shape, dtype).key


def today(shape: str = "M64,N256", **changes: Any) -> Verdict:
    """A verdict of today's kernel."""
    config = dict(OP.tunable.space.default(OP.problem.parse("M64,N256", "bf16"), H200))
    return verdict(**{"problem": key(shape), "kernel": OP.digest, "config": config, **changes})


def tried(shape: str = "M64,N256", number: int = 0, **changes: Any) -> Trial:
    return trial(number, **{"problem": key(shape), "kernel": OP.digest, **changes})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command with an empty home, where no verdicts ship."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("TILEBOOK_REGISTRY", raising=False)
    monkeypatch.setattr("tilebook.registry.layers.SHIPPED", tmp_path / "package" / "registry.db")

    def start(*arguments: object, status: int | None = 0, **more: Any) -> Result:
        result = CliRunner().invoke(main, [str(each) for each in arguments], **more)
        assert status in (None, result.exit_code), result.output
        return result

    return start


@pytest.fixture
def mine(tmp_path: Path, run: Run) -> Path:
    """The user's registry: two GPUs, two dtypes, two origins, two sources, a year of age."""
    path = tmp_path / "data" / "tilebook" / "registry.db"
    old = START - timedelta(days=400)
    with Registry.open(path, write=True) as registry:
        registry.merge(
            [tried(), tried(number=1, created_at=old), tried(number=2, kernel="ab" * 32)],
            [
                today(),
                today("M8,N256", device=A100),
                today(problem=key("M64,N256", "fp16"), created_at=old),
                today("M16,N256", origin="imported", trusted=False),
                today("M32,N256", kernel="ab" * 32),
            ],
            [revocation()],
        )
        registry.merge([tried("M8,N256", number=9)], origin="imported")
        registry.count_misses([miss()])
    return path


def left(path: Path) -> tuple[int, int, int, int]:
    with Registry.open(path) as registry:
        found = registry.verdicts(), registry.trials(), registry.revocations(), registry.misses()
        assert registry.problems == []
    verdicts, trials, revocations, misses = map(len, found)
    return verdicts, trials, revocations, misses
