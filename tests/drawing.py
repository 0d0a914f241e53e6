"""How many examples Hypothesis draws: in `make test` two fifths of what plain `pytest` does."""

from hypothesis import settings

_SHARE = 0.4


def sample() -> None:
    """From here on tests draw fewer, whatever else the profile in use says."""
    whole = settings.get_profile("default")
    settings.register_profile("sample", settings.default, max_examples=int(_SHARE * whole.max_examples))
    settings.load_profile("sample")


def examples(most: int) -> int:
    """Of so many examples, what is to be drawn."""
    whole = settings.get_profile("default")
    return max(2, most * settings.default.max_examples // whole.max_examples)
