"""Line charts as SVG text, to be put into a page."""

import io
from collections.abc import Mapping, Sequence

Series = Mapping[str, tuple[Sequence[float], Sequence[float | None]]]  # name → x, y

_COLORS = ("#1f5fbf", "#c2410c", "#6b7280")


def line_chart(title: str, x_label: str, series: Series) -> str:
    """One chart; points without a value are left out.

    Args:
        title: above it, also its text for those who cannot see it.
        x_label: below it.
        series: lines with markers, by name.

    Returns:
        An `<svg>` element.
    """
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for color, (name, (x, y)) in zip(_COLORS, series.items(), strict=False):
            points = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=color, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x_label, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    svg = text.getvalue()
    start = svg.index("<svg")
    return svg[start:].replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
