"""A stranger's records, changed in thousands of ways with digests that fit, through every command that meets them.

    python benchmarks/reliability/mutants.py [--mutants 20000] [--seed 0] [--out FILE]

Each mutant is a file of its own: a record of what ships, a trial or a revocation, with one to three changes anywhere in
its content, digests made anew. It is imported without trust into a registry that also holds the user's own verdict,
and every `--batch` of them `show`, `status`, `explain`, `export`, dispatch and (now and then) `tune` run over what was
let in. Counted as faults: an exception, more than one line for a refusal, control characters in what is printed, more
than `LONGEST` seconds for a command, a choice of dispatch or a stored verdict other than without the mutants, and more
than `MEMORY` of memory. No GPU needed.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from here import tell

from tilebook.registry import Failure, Revocation, Status, Trial
from tilebook.registry.codec import verdict_from

LONGEST = 2.0
"""Seconds that one command may take, whatever it meets."""
MEMORY = 512 << 20
"""Bytes by which all of it may grow a process."""

GPU = "H200"
MADE = {"by": "Eve", "machine": "a" * 16, "run": "b" * 16}
SHIPPED = Path(__file__).parents[2] / "tilebook" / "shipped"
Path_ = tuple[Any, ...]

_TEXTS = (
    "", " ", "x" * 5000, "[red]x[/red]", "[/]", "\x1b[2Jx", "a\nb", "\x00", "‮evil", "../../etc/passwd", "NVIDIA H200",
    "sm_90", "sm_9999", "2026-11-21T02:09:16.661038+00:00", "9999-12-31T23:59:59+00:00", "0001-01-01T00:00:00+00:00",
    "%s%n", "'; DROP TABLE verdict; --", "torch", "triton", "inductor", "predicted", "measured", "ok", "é́́́", "\ud800",
    "1e999", "-1", "f" * 64, "0" * 64,
)  # fmt: skip
_NUMBERS = (
    0, 1, -1, 2, 7, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**40, 0.0, -0.0, 1e-320, 1e-9, 0.5, 1e9, 1.7e308,
    -1e308,
)  # fmt: skip
_OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [{}], {"": ""}, [None] * 50, {"a": {"b": [1, 2.5, "c"]}})

_DEEP = "nested deeply"
"""Stands for what no encoder writes."""


@dataclass
class Outcome:
    """What came of the mutants: how many were let in, and the faults, each with the seed that makes it again."""

    mutants: int = 0
    accepted: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: dict[str, float] = field(default_factory=dict)
    grown: int = 0


def originals() -> list[dict[str, Any]]:
    """Records of every kind, as the exchange format has them, without their digests."""
    found = []
    for path in sorted(SHIPPED.glob("*/*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines()[1:3]:
            found.append(json.loads(line))
    verdict = verdict_from(
        {k: v for k, v in found[0].items() if k not in ("type", "sha256")}, origin="imported", trusted=False
    )
    best = verdict.finalists[0]
    trial = Trial(
        verdict.op, verdict.problem, verdict.device, verdict.environment, verdict.kernel, best.implementation,
        best.config, Status.OK, None, "", best.time_ms, best.samples_ms, {"registers": 32, "made": MADE},
        verdict.created_at,
    )  # fmt: skip
    failed = replace(
        trial, status=Status.FAILED, failure=Failure.WRONG_ANSWER, reason="hung", time_ms=None, samples_ms=()
    )
    revoked = Revocation(
        verdict.op, "triton", "wrong", verdict.kernel, "sm_90", "<4,>=3.6", made=MADE, created_at=verdict.created_at
    )
    found += [{"type": "trial", **each.content()} for each in (trial, failed)] * 4
    found += [{"type": "revocation", **revoked.portable()}] * 4
    for each in found:
        each.pop("sha256", None)
        if each["type"] == "verdict":
            each["notes"]["made"] = dict(MADE)
    return found


def mutants(seed: int, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(seed of its own, record) of so many mutants."""
    known = originals()
    for number in range(count):
        own = seed * 1_000_003 + number
        yield own, mutant(own, known)


def mutant(seed: int, known: list[dict[str, Any]]) -> dict[str, Any]:
    """One of the records with one to three changes."""
    draw = random.Random(seed)
    record = copy.deepcopy(draw.choice(known))
    if draw.random() < 0.7:  # few finalists: most of a record's places are samples of times
        record.get("finalists", [])[2:] = []
        for each in record.get("finalists", ()):
            each["samples_ms"] = each["samples_ms"][:3]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        _change(draw, record, known)
    return record


def _change(draw: random.Random, record: dict[str, Any], known: list[dict[str, Any]]) -> None:
    if isinstance(record.get("problem"), str) and draw.random() < 0.3:  # JSON within JSON
        try:
            inner = json.loads(record["problem"])
            _change_at(draw, inner, draw.choice(list(_places(inner))), known)
            record["problem"] = json.dumps(inner, sort_keys=True, separators=(",", ":"))
            return
        except (ValueError, RecursionError, IndexError):
            pass
    _change_at(draw, record, draw.choice(list(_places(record))), known)


def _places(value: Any, at: Path_ = ()) -> Iterator[Path_]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        if len(at) < 12:
            yield from _places(inner, (*at, key))


def _change_at(draw: random.Random, whole: Any, place: Path_, known: list[dict[str, Any]]) -> None:
    holder = whole
    for key in place[:-1]:
        holder = holder[key]
    key = place[-1]
    kinds: list[Callable[[], Any]] = [
        lambda: draw.choice(_TEXTS), lambda: draw.choice(_NUMBERS), lambda: copy.deepcopy(draw.choice(_OTHERS)),
        lambda: _near(draw, holder[key]), lambda: _near(draw, holder[key]), lambda: _elsewhere(draw, place, known),
        lambda: draw.choice(([[[1]]], _DEEP)),
    ]  # fmt: skip
    way = draw.random()
    if way < 0.12:
        del holder[key]
    elif way < 0.2 and isinstance(holder, dict):
        holder[draw.choice(_TEXTS)] = draw.choice(_NUMBERS)
    elif way < 0.28 and isinstance(holder, list):
        holder.extend(copy.deepcopy(holder[key]) for _ in range(draw.choice((1, 10, 3000))))
    else:
        holder[key] = draw.choice(kinds)()


def _near(draw: random.Random, value: Any) -> Any:
    """A value of the same kind, not far off: what a check of types lets through."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice((-value, value + 1, value * 2, value * 10**6, float(value), 0))
    if isinstance(value, float):
        return draw.choice((-value, value * 1e-6, value * 1e6, value + 1e-12, 0.0, int(value)))
    if isinstance(value, str):
        cut = draw.randrange(len(value) + 1)
        return draw.choice((value[:cut], value + value, value.upper(), value[:cut] + draw.choice(_TEXTS) + value[cut:]))
    if isinstance(value, list):
        return draw.choice((value[::-1], value[:1], value * 2))
    return dict(reversed(value.items())) if isinstance(value, dict) else draw.choice((0, ""))


def _elsewhere(draw: random.Random, place: Path_, known: list[dict[str, Any]]) -> Any:
    """What another record has there."""
    value: Any = draw.choice(known)
    try:
        for key in place:
            value = value[key]
    except (KeyError, IndexError, TypeError):
        return None
    return copy.deepcopy(value)


def text_of(record: dict[str, Any]) -> bytes:
    """A file of this record alone, every digest right."""
    content = {name: value for name, value in record.items() if name != "type"}
    line = _canonical({**record, "sha256": hashlib.sha256(_canonical(content)).hexdigest()}) + b"\n"
    whole = hashlib.sha256(line).hexdigest()
    return _canonical({"format": "tilebook-registry", "version": 3, "records": 1, "sha256": whole}) + b"\n" + line


def _canonical(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass").replace(f'"{_DEEP}"'.encode(), b"[" * 5000 + b"]" * 5000)


class Attempt:
    """Registries, commands and what is watched of them."""

    def __init__(self, folder: Path, batch: int) -> None:
        self.folder, self.batch = folder, batch
        self.outcome = Outcome()
        self.registry = folder / "registry.db"
        self.honest = folder / "honest.db"
        os.environ |= {"XDG_DATA_HOME": str(folder / "data"), "HOME": str(folder), "COLUMNS": "200"}
        os.environ["TILEBOOK_REGISTRY"] = str(self.honest)
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two tunes are to store the same, and so must not measure
        self.command("tune", *TUNE, "--registry", self.honest)
        self.expected_choices, self.expected_verdicts = self.choices(), self.own_verdicts(self.honest)
        self._warm_up()
        self.started_with = _most_memory()

    def _warm_up(self) -> None:
        for each in (["show"], ["status", "--gpu", GPU], ["explain", *EXPLAIN, "--gpu", GPU]):
            self.command(*each, "--registry", self.honest)

    def command(self, *arguments: Any, seed: int | None = None) -> Result:
        from tilebook.cli import main

        started = time.monotonic()
        result = CliRunner().invoke(main, [str(each) for each in arguments])
        took = time.monotonic() - started
        name = str(arguments[0])
        if name != "tune":
            self.outcome.slowest[name] = max(took, self.outcome.slowest.get(name, 0.0))
            if took > LONGEST:
                self.fault(seed, f"{name} took {took:.1f} s")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            self.fault(seed, f"{name}: {type(result.exception).__name__}: {str(result.exception)[:200]}")
        if any((ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 for c in result.output):
            self.fault(seed, f"{name} printed control characters")
        return result

    def fault(self, seed: int | None, what: str) -> None:
        self.outcome.faults.append(f"{'after a batch' if seed is None else f'mutant {seed}'}: {what}")

    def run(self, seed: int, count: int) -> Outcome:
        self._fresh()
        for number, (own, record) in enumerate(mutants(seed, count), 1):
            self._import(own, record)
            if number % self.batch == 0 or number == count:
                self._look(number, tune=number % (20 * self.batch) == 0 or number == count)
                self._fresh()
        self.outcome.mutants = count
        self.outcome.grown = _most_memory() - self.started_with
        if self.outcome.grown > MEMORY:
            self.fault(None, f"memory grew by {self.outcome.grown >> 20} MiB")
        return self.outcome

    def _fresh(self) -> None:
        """A copy of the user's own registry, for the next batch."""
        for each in self.folder.glob("registry.db*"):
            each.unlink()
        self.registry.write_bytes(self.honest.read_bytes())

    def _import(self, seed: int, record: dict[str, Any]) -> None:
        file = self.folder / "mutant.jsonl"
        file.write_bytes(text_of(record))
        result = self.command("import", file, "--registry", self.registry, seed=seed)
        if result.exit_code == 0:
            self.outcome.accepted += "skipped" not in result.output
        else:
            lines = result.output.strip().splitlines()
            self.outcome.refusals[lines[-1].partition(":")[2][:40] if lines else ""] += 1
            if len(lines) != 1 or result.exit_code not in (1, 2):
                self.fault(seed, f"a refusal of {len(lines)} lines, exit status {result.exit_code}")

    def _look(self, number: int, tune: bool) -> None:
        for each in (
            ["show"], ["show", "--format", "json"], ["show", "--trials"], ["revoke", "--list"],
            ["status", "--gpu", GPU], ["explain", *EXPLAIN, "--gpu", GPU], ["export", self.folder / f"{number}.jsonl"],
        ):  # fmt: skip
            result = self.command(*each, "--registry", self.registry)
            if result.exit_code:
                self.fault(None, f"{each[0]}, {number} mutants, ended with {result.exit_code}: {result.output[-200:]}")
        (self.folder / f"{number}.jsonl").unlink(missing_ok=True)
        if self.choices(self.registry) != self.expected_choices:
            self.fault(None, f"dispatch chose otherwise after {number} mutants")
        if tune:
            self._tune(number)

    def _tune(self, number: int) -> None:
        from tilebook.registry import Registry

        with Registry.open(self.registry, write=True) as registry:
            strangers = [each for each in registry.verdicts() if each.origin == "imported"]
        again = self.folder / "again.db"
        again.unlink(missing_ok=True)
        with Registry.open(again, write=True) as registry:
            registry.merge((), strangers, (), origin="imported")
        result = self.command("tune", *TUNE, "--registry", again)
        studies = self.command(
            "export", self.folder / f"{number}.studies", "--as", "optuna", "--registry", self.registry
        )
        if studies.exit_code:
            self.fault(None, f"studies of {number} mutants: {studies.output[-200:]}")
        if result.exit_code or self.own_verdicts(again) != self.expected_verdicts:
            self.fault(None, f"after {number} mutants a tune stored other verdicts: {result.output[-200:]}")

    def choices(self, registry: Path | None = None) -> dict[str, Any]:
        """What dispatch would run for the quick suites' problems, by this registry and what ships."""
        from tilebook import device as devices
        from tilebook import op as ops
        from tilebook.dispatch.snapshot import Snapshot

        snapshot = Snapshot(devices.find(GPU), str(registry or self.honest))
        found = {}
        for suite in ops.suites(ops.ops().values()).values():
            for op, problem in suite[:12]:
                choice = snapshot.choose(op, problem)
                found[f"{op.name} {problem.key}"] = (choice.implementation.name, choice.config, choice.source)
        return found

    def own_verdicts(self, registry: Path) -> list[Any]:
        from tilebook.registry import Registry

        with Registry.open(registry) as opened:
            found = [each for each in opened.verdicts() if each.origin != "imported"]
        return [(v.op, v.problem, v.winner.implementation, v.winner.config) for v in sorted(found, key=lambda v: v.op)]


TUNE = ("mlp", "--shape", "M64,H32,I64", "--direction", "fwd", "--gpu", GPU, "--trials", "2", "--workers", "1")
EXPLAIN = ("rms_norm_fwd", "--shape", "M4096,N4096")


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def run(count: int, seed: int = 0, batch: int = 50) -> Outcome:
    """Tries so many mutants in a folder of its own."""
    kept = dict(os.environ)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return Attempt(Path(folder), batch).run(seed, count)
    finally:
        os.environ.clear()
        os.environ.update(kept)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mutants", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    outcome = run(given.mutants, given.seed)
    report = {
        "mutants": outcome.mutants, "seed": given.seed, "accepted": outcome.accepted, "faults": outcome.faults,
        "refusals": dict(outcome.refusals.most_common(40)), "slowest_s": outcome.slowest,
        "memory_grown_mib": outcome.grown >> 20,
    }  # fmt: skip
    tell(report, given.out)
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
