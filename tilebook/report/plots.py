"""Pictures of figures, where matplotlib is installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_COLUMNS = 4


@dataclass(frozen=True)
class Panel:
    """Bars by name, or lines of x and y by name."""

    title: str
    bars: dict[str, float] = field(default_factory=dict)
    lines: dict[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    x: str = ""


def draw(out: Path, panels: Sequence[Panel]) -> None:
    """One picture beside the figures in `out`; without matplotlib there is none."""
    panels = [panel for panel in panels if panel.bars or panel.lines]
    try:
        import matplotlib
    except ImportError:
        print("no plot: it needs matplotlib: pip install matplotlib", file=sys.stderr)
        return
    if not panels:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height, columns = max(3.0, *(0.35 * len(panel.bars) for panel in panels)), min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(5 * columns, height * rows), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, panel in zip(grid.flat, panels, strict=False):
        axes.set_title(panel.title, loc="left", fontsize=9)
        if panel.bars:
            axes.barh(list(panel.bars), list(panel.bars.values()), color="#1f77b4")
            axes.invert_yaxis()
        for name, (x, y) in panel.lines.items():
            axes.plot(x, y, "o-", ms=3, label=name)
        if panel.lines:
            axes.set(xscale="log", yscale="log", xlabel=panel.x)
            axes.legend(fontsize=7)
    figure.savefig(out.with_suffix(".png"), dpi=130)
    plt.close(figure)
