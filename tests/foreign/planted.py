"""What became of the configs of the corpus: which of them a tune has refused, why, and which stand in its verdicts."""

import json
from dataclasses import dataclass
from pathlib import Path

import corpus
from corpus.faults import KINDS, NAMES

from tilebook.registry import Registry

PASSED = (None, "slow", "duplicate_binary")
"""How trials of configs end with which nothing is wrong."""

EXPECTED = {
    "silent": ("max error", "are no numbers"), "race": ("max error", "different bits"), "beyond": ("max error",),
    "ragged": ("max error",), "damage": ("changed its input", "max error"), "hang": ("no result within",),
    "shaky": ("different bits", "max error"), "outside": ("outside its tensors", "max error"),
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """refused: of a kernel's faults, how each was caught. honest: right configs that were refused, with the reason.
    served: the faults of what stands in its ranking."""

    refused: dict[str, str]
    honest: dict[str, str]
    served: set[int]
    tried: int

    def missed(self, kernel):
        """Planted faults that nothing was said of."""
        wanted = {NAMES[fault] for name, fault in corpus.planted()[0] if name == kernel}
        return sorted(wanted - set(self.refused))


def found(path, kernel):
    with Registry.open(path) as registry:
        trials = [trial for trial in registry.trials() if trial.op == kernel]
        verdicts = [verdict for verdict in registry.verdicts() if verdict.op == kernel]
    failed = [trial for trial in trials if trial.failure not in PASSED]
    refused = {
        NAMES[trial.config["FAULT"]]: f"{trial.failure}: {trial.reason}" for trial in failed if trial.config["FAULT"]
    }
    honest = {str(trial.config): f"{trial.failure}: {trial.reason}" for trial in failed if not trial.config["FAULT"]}
    served = {config["FAULT"] for verdict in verdicts for _, config in verdict.ranking()}
    return Found(refused, honest, served, sum(not trial.config["FAULT"] for trial in trials))


def rules(folder):
    path = Path(folder) / "rules.json"
    path.write_text(json.dumps(corpus.RULES))
    return path


def wrongs(kernel, its):
    """What should not be, of what was found of a kernel, as sentences."""
    told = [f"{kernel}: {fault} was not caught" for fault in its.missed(kernel)]
    told += [f"{kernel}: {config} was refused: {reason}" for config, reason in its.honest.items()]
    told += [f"{kernel}: {NAMES[fault]} is in the verdict" for fault in its.served if fault]
    told += [f"{kernel}: it has no verdict"] if not its.served else []
    told += [
        f"{kernel}: {fault} was caught as {how}"
        for fault, how in its.refused.items()
        if not any(words in how for words in EXPECTED[fault])
    ]
    return told


assert set(EXPECTED) == set(KINDS)
