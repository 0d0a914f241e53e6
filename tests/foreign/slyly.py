"""What a tune would say of the kernels of `corpus.sly`, in the process that asks."""

import json

from corpus import sly
from recorded import recording

from tilebook.foreign.offered import offered
from tilebook.tuner.judge.verify import Wrong, final_cases, trial_cases, verify


def judged(kernel, folder, device):
    """The faults of which nothing is said when their configs are tried and confirmed, and honest configs that are
    refused, with the reason."""
    with recording(folder / "record") as made:
        sly.CALLS[kernel](device)
    assert made.left_out == {}
    rules = {name: rule for name, rule in sly.RULES.items() if name.endswith(kernel)}
    (folder / "rules.json").write_text(json.dumps(rules))
    missed, refused = [], {}
    with offered(folder / "record", folder / "rules.json") as offer:
        ((op, problem),) = offer.problems
        cases = [*trial_cases(op, problem, device), *final_cases(op, problem, device, 7)]
        for config in op.tunable.space.configs():
            fault = next((name for name, number in sly.SLY.items() if number == config["FAULT"]), "")
            try:
                verify(op.tunable, config, cases)
                missed += [fault] if fault else []
            except Wrong as wrong:
                refused |= {} if fault else {str(config): str(wrong)}
    return missed, refused
