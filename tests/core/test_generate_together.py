"""Requests of different people in one forward: the same pictures as alone, and nobody depends on another's fate."""

import numpy as np
import pytest
from PIL import Image

from core.config import GenerateConfig, Sampler
from core.errors import Cancelled, ConfigError, Interrupted
from core.generate import generate, generate_together
from core.memory_ladder import generation_memory
from core.pipelines import LoadedBase
from core.progress import Progress, silent

SHARED = GenerateConfig(prompt="", width=32, height=40, steps=4, sampler="euler_a")
CONFIGS = [
    SHARED.model_copy(update={"prompt": "a red apple", "seed": 5, "count": 2}),
    SHARED.model_copy(update={"prompt": "a blue house", "negative_prompt": "a cat", "seed": 9}),
    SHARED.model_copy(update={"prompt": "a green car", "seed": 70, "count": 3}),
]


def _pixels(images: list[Image.Image] | Interrupted) -> np.ndarray:
    assert not isinstance(images, Interrupted)
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def _cancelling(at_step: int) -> tuple[list[int], object]:
    seen: list[int] = []

    def report(progress: Progress) -> None:
        seen.append(progress.step)
        if progress.step >= at_step:
            raise Cancelled("stop")

    return seen, report


@pytest.mark.parametrize("sampler", ["default", "dpmpp_2m", "euler_a"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_each_request_gets_the_pictures_that_it_gets_alone(
    tiny_base: LoadedBase, sampler: Sampler, guidance: float
) -> None:
    configs = [config.model_copy(update={"sampler": sampler, "guidance": guidance}) for config in CONFIGS]
    together = generate_together(tiny_base, configs, [], [silent] * 3)
    alone = [generate(tiny_base, config) for config in configs]
    for mine, theirs in zip(together, alone, strict=True):
        assert np.abs(_pixels(mine) - _pixels(theirs)).max() <= 1
    assert np.abs(_pixels(together[0])[0] - _pixels(together[1])[0]).max() > 3


def test_they_share_their_forwards(tiny_base: LoadedBase) -> None:
    sizes: list[int] = []
    hook = tiny_base.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    try:
        generate_together(tiny_base, CONFIGS, [], [silent] * 3)
    finally:
        hook.remove()
    assert sizes == [12] * 4


@pytest.mark.parametrize("rung", [0, 2, 4])
def test_one_that_is_cancelled_drops_out_and_the_others_go_on_unharmed(tiny_base: LoadedBase, rung: int) -> None:
    seen, cancelling = _cancelling(2)
    results = generate_together(
        tiny_base,
        CONFIGS,
        [],
        [silent, cancelling, silent],
        memory=generation_memory(rung),  # type: ignore[list-item]
    )
    assert isinstance(results[1], Cancelled)
    assert seen[-1] == 2, "it is told nothing after it has left"
    for number in (0, 2):
        assert np.abs(_pixels(results[number]) - _pixels(generate(tiny_base, CONFIGS[number]))).max() <= 1


def test_a_forward_that_nobody_wants_any_more_stops_at_once(tiny_base: LoadedBase) -> None:
    calls = 0

    def count(module: object, inputs: object) -> None:
        nonlocal calls
        calls += 1

    hook = tiny_base.unet.register_forward_pre_hook(count)
    reports = [_cancelling(step)[1] for step in (1, 2, 2)]
    try:
        results = generate_together(tiny_base, CONFIGS, [], reports)  # type: ignore[arg-type]
    finally:
        hook.remove()
    assert all(isinstance(result, Cancelled) for result in results)
    assert calls == 2


def test_each_is_told_its_own_progress_and_hears_of_life_while_it_waits(tiny_base: LoadedBase) -> None:
    told: list[list[tuple[int, int]]] = [[], [], []]
    reports = [lambda p, mine=mine: mine.append((p.step, p.total)) for mine in told]
    generate_together(tiny_base, CONFIGS, [], reports, memory=generation_memory(3))  # two pictures per forward
    assert told[0] == [(1, 4), (2, 4), (3, 4), (4, 4)] + [(4, 4)] * 8
    assert told[1] == [(0, 4)] * 4 + [(1, 4), (2, 4), (3, 4), (4, 4)] + [(4, 4)] * 4
    assert told[2] == [(0, 8)] * 4 + [(step, 8) for step in range(1, 9)]


def test_requests_that_do_not_fit_each_other_are_refused(tiny_base: LoadedBase) -> None:
    other = CONFIGS[1].model_copy(update={"steps": 9})
    with pytest.raises(ConfigError, match="differ in steps"):
        generate_together(tiny_base, [CONFIGS[0], other], [], [silent] * 2)
