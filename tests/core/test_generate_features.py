"""Pictures that begin from a picture, second passes, previews and exact pictures, through the whole of generation."""

import io

import numpy as np
import pytest
from PIL import Image

from core.config import GenerateConfig, HiresConfig
from core.drawing import Request
from core.generate import generate, generate_together
from core.pipelines import LoadedBase
from core.progress import Progress

CONFIG = GenerateConfig(prompt="a red apple", negative_prompt="a cat", width=32, height=32, steps=6, seed=5)
OTHER = Request(config=CONFIG.model_copy(update={"prompt": "a blue house", "seed": 90, "count": 3, "steps": 4}))


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def _draw(base: LoadedBase, request: Request, *others: Request) -> list[Image.Image]:
    outcome = generate_together(base, [*others, request])[-1]
    assert isinstance(outcome, list), outcome
    return outcome


@pytest.fixture
def original() -> Image.Image:
    """A picture of 32 x 32 with an edge in the middle."""
    picture = Image.new("RGB", (32, 32), (200, 60, 20))
    picture.paste((20, 60, 200), (16, 0, 32, 32))
    return picture


@pytest.mark.parametrize("sampler", ["default", "dpmpp_2m", "euler_a", "dpm2"])
def test_a_picture_from_a_picture_is_the_same_in_company_and_changes_with_its_strength(
    tiny_base: LoadedBase, original: Image.Image, sampler: str
) -> None:
    changes: list[float] = []
    for strength in (0.2, 0.9):
        config = CONFIG.model_copy(
            update={"init_image": "0" * 64, "denoising_strength": strength, "sampler": sampler, "count": 2}
        )
        request = Request(config=config, init_picture=original)
        alone = _draw(tiny_base, request)
        company = _draw(tiny_base, Request(config=config, init_picture=original), OTHER)
        for mine, theirs in zip(alone, company, strict=True):
            assert np.abs(_pixels(mine) - _pixels(theirs)).max() <= 1
        assert np.abs(_pixels(alone[0]) - _pixels(alone[1])).max() > 0, "each has noise of its own"
        changes.append(float(np.abs(_pixels(alone[0]) - _pixels(original)).mean()))
    from_noise = _draw(tiny_base, Request(config=CONFIG.model_copy(update={"sampler": sampler})))[0]
    assert np.abs(_pixels(from_noise) - _pixels(original)).mean() > 0
    assert changes[0] != changes[1]


def test_only_the_white_part_of_a_mask_changes(tiny_base: LoadedBase, original: Image.Image) -> None:
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 8, 32))
    config = CONFIG.model_copy(update={"init_image": "0" * 64, "mask": "1" * 64, "denoising_strength": 1.0})
    drawn = _pixels(_draw(tiny_base, Request(config=config, init_picture=original, mask=mask), OTHER)[0])
    change = np.abs(drawn - _pixels(original))
    assert change[:, 28:].max() == 0
    assert change[:, :4].max() > 3


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_a_second_pass_is_larger_the_same_in_company_and_counted(tiny_base: LoadedBase, upscaler: str) -> None:
    hires = HiresConfig(scale=2.0, steps=4, denoising_strength=0.5, upscaler=upscaler)  # type: ignore[arg-type]
    config = CONFIG.model_copy(update={"hires": hires, "count": 2, "sampler": "dpmpp_2m"})
    told: list[tuple[int, int]] = []

    def tell(progress: Progress) -> None:
        told.append((progress.step, progress.total))

    alone = _draw(tiny_base, Request(config=config, report=tell))
    company = _draw(tiny_base, Request(config=config), OTHER)
    for mine, theirs in zip(alone, company, strict=True):
        assert mine.size == (64, 64)
        assert np.abs(_pixels(mine) - _pixels(theirs)).max() <= 1
    assert told == [(step, 8) for step in range(1, 9)], "six steps of the first pass, two of the second"


def test_previews_come_every_so_many_steps_and_change_nothing(tiny_base: LoadedBase) -> None:
    shown: list[bytes] = []

    def look(progress: Progress) -> None:
        if progress.preview is not None:
            shown.append(progress.preview)

    config = CONFIG.model_copy(update={"count": 2})
    watched = generate(tiny_base, config.model_copy(update={"preview_every_steps": 2}), report=look)
    unwatched = generate(tiny_base, config)
    assert [picture.tobytes() for picture in watched] == [picture.tobytes() for picture in unwatched]
    assert len(shown) == 3
    with Image.open(io.BytesIO(shown[-1])) as preview:
        assert preview.format == "JPEG"


def test_exact_pictures_have_the_same_bytes_whatever_else_runs_and_however_many_are_asked_for(
    tiny_base: LoadedBase,
) -> None:
    config = CONFIG.model_copy(update={"exact": True, "sampler": "dpmpp_2m"})
    (alone,) = _draw(tiny_base, Request(config=config))
    (company,) = _draw(tiny_base, Request(config=config), OTHER)
    three = _draw(tiny_base, Request(config=config.model_copy(update={"seed": 4, "count": 3})))
    assert alone.tobytes() == company.tobytes() == three[1].tobytes()
