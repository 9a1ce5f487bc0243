"""A training's loss as an inline SVG, drawn here and by a template: no script, nothing fetched."""

from collections.abc import Sequence
from dataclasses import dataclass

from django.template.loader import render_to_string
from django.utils.safestring import SafeString

WIDTH, HEIGHT = 720, 240  # SVG units
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 28  # room for the axis labels
MAX_POINTS = 600  # more than one per pixel column shows nothing new
SMOOTHING = 0.95  # weight of the past in the moving average


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis, in SVG units."""

    at: float
    label: str


def loss_curve(losses: Sequence[float]) -> str | SafeString:
    """The raw loss of each step, faint, and its moving average.

    Args:
        losses: Loss of every step, in order.
    """
    finite = [float(loss) for loss in losses]
    if len(finite) < 2:
        return "no losses yet"
    smooth = smoothed(finite)
    stride = max(1, -(-len(finite) // MAX_POINTS))
    steps = list(range(0, len(finite), stride))
    shown = [smooth[step] for step in steps] + [finite[step] for step in steps]
    low, high = min(shown), max(shown)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5

    def x(step: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / (len(finite) - 1)

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    def points(values: Sequence[float]) -> str:
        return " ".join(f"{x(step):.1f},{y(values[step]):.1f}" for step in steps)

    return render_to_string(
        "jobs/admin/loss_curve.html",
        {
            "width": WIDTH,
            "height": HEIGHT,
            "left": LEFT,
            "right": WIDTH - RIGHT,
            "bottom": HEIGHT - BOTTOM,
            "label_y": HEIGHT - BOTTOM + 18,
            "raw": points(finite),
            "smooth": points(smooth),
            "y_ticks": [Tick(y(low + (high - low) * i / 4), f"{low + (high - low) * i / 4:.3g}") for i in range(5)],
            "x_ticks": [
                Tick(x(step), str(step + 1)) for step in sorted({(len(finite) - 1) * i // 5 for i in range(6)})
            ],
            "first": smooth[0],
            "last": smooth[-1],
            "steps": len(finite),
        },
    )


def smoothed(losses: Sequence[float]) -> list[float]:
    """Bias-corrected exponential moving average, same length."""
    average, weight, out = 0.0, 0.0, []
    for loss in losses:
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        out.append(average / weight)
    return out
