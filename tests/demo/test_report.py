"""The demo's report: whole, self-contained, and safe against what people write."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from core.errors import LoraFileError
from demo.colour_layout import Distance
from demo.report import DemoResult, Pair, Sample, read_lora_facts, render_report

HOSTILE = """<script>alert(1)</script>" onerror="alert(2)' {{ settings }} {% debug %}"""


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (8, 8), "blue").save(path)
    return path


@pytest.fixture
def lora_file(tmp_path: Path) -> Path:
    tensors = {}
    for module in ("lora_unet_a", "lora_unet_b"):
        tensors[f"{module}.lora_down.weight"] = np.ones((4, 6), dtype=np.float32)
        tensors[f"{module}.lora_up.weight"] = np.ones((6, 4), dtype=np.float32)
        tensors[f"{module}.alpha"] = np.array(4, dtype=np.float32)
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, metadata={"ss_output_name": HOSTILE, "sshs_model_hash": "0" * 64})
    return path


@pytest.fixture
def result(picture: Path, lora_file: Path) -> DemoResult:
    return DemoResult(
        base_model="demo",
        lora_file=lora_file,
        pictures=[(picture, HOSTILE)],
        pairs=[Pair(prompt=HOSTILE, seed=7, before=picture, after=picture)],
        samples=[Sample(step=0, prompt=HOSTILE, file=picture), Sample(step=50, prompt="a bell", file=picture)],
        losses=[1.0, 0.5, 0.25],
        settings={"rank": 4, "optimizer": HOSTILE},
        drawing={"steps": 20},
        before=Distance(mean=0.4, nearest=0.3),
        after=Distance(mean=0.1, nearest=0.09),
        seconds={"train": 3.0, "draw": 1.0},
    )


class Page(HTMLParser):
    """Tags, attributes and text of a page as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words += data


def test_hostile_text_is_shown_as_text_and_never_becomes_a_tag_or_an_attribute(result: DemoResult) -> None:
    page = Page(render_report(result))
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.words.count(HOSTILE) >= 3  # prompt, setting, metadata
    assert f"with the LoRA: {HOSTILE}" in [value for name, value in page.attributes if name == "alt"]


def test_the_page_needs_nothing_but_itself(result: DemoResult) -> None:
    text = render_report(result)
    page = Page(text)
    sources = [value or "" for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text


def test_the_figure_the_file_and_the_times_are_on_the_page(result: DemoResult, lora_file: Path) -> None:
    words = re.sub(r"\s+", " ", Page(render_report(result)).words)
    assert "75 %" in words  # 0.4 to 0.1
    assert "70 %" in words  # 0.3 to 0.09
    assert "seed 7" in words
    assert f"{lora_file.stat().st_size} bytes" in words
    assert "2 (one for each module)" in words
    assert "before" in words
    assert "step 50" in words
    assert "3.0 s" in words


def test_a_model_hash_that_the_header_gets_wrong_is_reported(result: DemoResult) -> None:
    assert "the header says the sameno" in Page(render_report(result)).words


def test_facts_come_from_the_bytes_of_the_file(lora_file: Path) -> None:
    facts = read_lora_facts(lora_file)
    assert (facts.modules, facts.alphas, facts.ranks) == (2, 2, (4,))
    assert facts.model_hash != facts.metadata["sshs_model_hash"]


def test_a_file_that_is_no_lora_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(LoraFileError):
        read_lora_facts(tmp_path / "torn.safetensors")


def test_the_loss_curve_starts_high_on_the_left_and_ends_at_the_right_edge(result: DemoResult) -> None:
    raw = re.search(r'class="raw" points="([^"]+)"', render_report(result))
    assert raw
    points = [tuple(map(float, point.split(","))) for point in raw[1].split()]
    assert [x for x, _ in points] == [0, 360, 720]
    heights = [y for _, y in points]
    assert heights == sorted(heights)  # y grows downwards: a falling loss
    assert heights[0] > 0
