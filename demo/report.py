"""The demo's report: one HTML file with everything in it, readable offline. Called by `demo/run.py`.

Every text goes through the template engine's escaping; pictures are embedded as data URIs.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.template import Context, Engine

from core.lora_header import read_header
from demo.colour_layout import Distance, fall_percent

GOAL_PERCENT = 40.0
CURVE_WIDTH, CURVE_HEIGHT = 720, 200
SMOOTH_STEPS = 15


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One prompt, drawn from one seed without and with the LoRA."""

    prompt: str
    seed: int
    before: Path
    after: Path


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A picture that the training drew on its way."""

    step: int
    prompt: str
    file: Path


@dataclass(frozen=True, kw_only=True)
class LoraFacts:
    """What the LoRA file says of itself, and what is computed from its bytes."""

    name: str
    size_bytes: int
    sha256: str
    model_hash: str
    modules: int
    alphas: int
    ranks: tuple[int, ...]
    metadata: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """All that the report shows.

    Attributes:
        pictures: The LoRA's pictures with their captions.
        seconds: Of each stage, in order.
    """

    base_model: str
    lora_file: Path
    pictures: Sequence[tuple[Path, str]]
    pairs: Sequence[Pair]
    samples: Sequence[Sample]
    losses: Sequence[float]
    settings: dict[str, Any]
    drawing: dict[str, Any]
    before: Distance
    after: Distance
    seconds: dict[str, float]

    @property
    def fall(self) -> float:
        """By how many percent the mean distance to the LoRA's pictures fell."""
        return fall_percent(self.before.mean, self.after.mean)


def read_lora_facts(path: Path) -> LoraFacts:
    """Facts of a kohya/WebUI file.

    Raises:
        core.errors.LoraFileError: It is no sound safetensors file.
    """
    header = read_header(path)
    content = path.read_bytes()
    downs = {name: info for name, info in header.tensors.items() if name.endswith(".lora_down.weight")}
    return LoraFacts(
        name=path.name,
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        model_hash=hashlib.sha256(content[header.data_offset_bytes :]).hexdigest(),
        modules=len(downs),
        alphas=sum(name.endswith(".alpha") for name in header.tensors),
        ranks=tuple(sorted({info.shape[0] for info in downs.values()})),
        metadata=dict(sorted(header.metadata.items())),
    )


def render_report(result: DemoResult) -> str:
    """The whole page as text."""
    lora = read_lora_facts(result.lora_file)
    total_seconds = sum(result.seconds.values())
    longest = max(result.seconds.values(), default=1.0) or 1.0
    # Numbers become text here: the engine would ask Django's settings, which the demo does not need, how to write them.
    values = {
        "base_model": result.base_model,
        "picture_count": str(len(result.pictures)),
        "cards": [
            (f"{result.fall:.0f} %", "nearer to the pictures it learnt from", f"goal: {GOAL_PERCENT:.0f} % or more"),
            (f"{result.seconds.get('train', 0):.0f} s", "of training", f"{len(result.losses)} steps, no GPU needed"),
            (f"{lora.size_bytes / 2**20:.1f} MiB", "LoRA file", f"{lora.modules} modules, rank {_list(lora.ranks)}"),
            (f"{total_seconds:.0f} s", "for everything", "from starting the studio to this page"),
        ],
        "pictures": [(_data_uri(file), caption) for file, caption in result.pictures],
        "pairs": [
            {"prompt": p.prompt, "seed": str(p.seed), "before": _data_uri(p.before), "after": _data_uri(p.after)}
            for p in result.pairs
        ],
        "sample_rows": _sample_rows(result.samples),
        "curve": _curve(result.losses),
        "settings": [(name, str(value)) for name, value in result.settings.items() if name != "sample_prompts"],
        "drawing": ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result.drawing.items()),
        "distances": [
            ("mean", f"{result.before.mean:.3f}", f"{result.after.mean:.3f}", f"{result.fall:.0f} %"),
            (
                "nearest",
                f"{result.before.nearest:.3f}",
                f"{result.after.nearest:.3f}",
                f"{fall_percent(result.before.nearest, result.after.nearest):.0f} %",
            ),
        ],
        "stages": [
            (name, f"{seconds:.1f}", f"{100 * seconds / longest:.1f}") for name, seconds in result.seconds.items()
        ],
        "lora": [
            ("file", lora.name),
            ("size", f"{lora.size_bytes} bytes"),
            ("modules", str(lora.modules)),
            ("rank", _list(lora.ranks)),
            (
                ".alpha tensors",
                f"{lora.alphas} (one for each module)" if lora.alphas == lora.modules else str(lora.alphas),
            ),
            ("sha256 of the file", lora.sha256),
            ("sha256 of its tensors (sshs_model_hash)", lora.model_hash),
            ("the header says the same", "yes" if lora.metadata.get("sshs_model_hash") == lora.model_hash else "no"),
        ],
        "metadata": list(lora.metadata.items()),
    }
    engine = Engine(dirs=[str(Path(__file__).parent)], autoescape=True)
    return engine.get_template("report.html").render(Context(values))


def _data_uri(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _sample_rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One row per step, in order: {"label", "pictures": [(data URI, prompt), ...]}."""
    steps = sorted({sample.step for sample in samples})
    return [
        {
            "label": "before" if step == 0 else f"step {step}",
            "pictures": [(_data_uri(sample.file), sample.prompt) for sample in samples if sample.step == step],
        }
        for step in steps
    ]


def _curve(losses: Sequence[float]) -> dict[str, Any]:
    """Loss of each step and its running mean as SVG points, with the labels of the axes."""
    if not losses:
        return {}
    smooth = [
        sum(window) / len(window)
        for window in (losses[max(0, step - SMOOTH_STEPS + 1) : step + 1] for step in range(len(losses)))
    ]
    top = max(losses) * 1.05 or 1.0
    marks = [0.0, top / 2, top]
    return {
        "raw": _points(losses, top),
        "smooth": _points(smooth, top),
        "marks": [(f"{mark:.2f}", f"{CURVE_HEIGHT * (1 - mark / top):.1f}") for mark in marks],
        "first": f"{smooth[min(SMOOTH_STEPS, len(smooth)) - 1]:.3f}",
        "last": f"{smooth[-1]:.3f}",
        "steps": str(len(losses)),
    }


def _points(values: Sequence[float], top: float) -> str:
    across = CURVE_WIDTH / max(1, len(values) - 1)
    return " ".join(f"{step * across:.1f},{CURVE_HEIGHT * (1 - value / top):.1f}" for step, value in enumerate(values))
