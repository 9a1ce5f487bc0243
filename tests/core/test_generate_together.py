"""Requests of different people in one forward: the same pictures as alone, and nobody depends on another's fate."""

import numpy as np
import pytest
from PIL import Image

from core.config import GenerateConfig, Sampler
from core.drawing import Outcome, Request
from core.errors import Cancelled, ConfigError
from core.generate import generate, generate_as_they_come, generate_together
from core.memory_ladder import generation_memory
from core.pipelines import LoadedBase
from core.progress import Progress, Report, silent

SHARED = GenerateConfig(prompt="", width=32, height=40, steps=4, sampler="euler_a")
CONFIGS = [
    SHARED.model_copy(update={"prompt": "a red apple", "seed": 5, "count": 2}),
    SHARED.model_copy(update={"prompt": "a blue house", "negative_prompt": "a cat", "seed": 9}),
    SHARED.model_copy(update={"prompt": "a green car", "seed": 70, "count": 3}),
]


def _requests(configs: list[GenerateConfig], reports: list[Report] | None = None) -> list[Request]:
    return [Request(config=config, report=(reports or [silent] * 9)[i]) for i, config in enumerate(configs)]


def _pixels(images: Outcome | list[Image.Image]) -> np.ndarray:
    assert isinstance(images, list), images
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def _cancelling(at_step: int) -> tuple[list[int], Report]:
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
    together = generate_together(tiny_base, _requests(configs))
    alone = [generate(tiny_base, config) for config in configs]
    for mine, theirs in zip(together, alone, strict=True):
        assert np.abs(_pixels(mine) - _pixels(theirs)).max() <= 1
    assert np.abs(_pixels(together[0])[0] - _pixels(together[1])[0]).max() > 3


def test_they_share_their_forwards(tiny_base: LoadedBase) -> None:
    sizes: list[int] = []
    hook = tiny_base.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    try:
        generate_together(tiny_base, _requests(CONFIGS))
    finally:
        hook.remove()
    assert sizes == [12] * 4


@pytest.mark.parametrize("rung", [0, 2, 4])
def test_one_that_is_cancelled_drops_out_and_the_others_go_on_unharmed(tiny_base: LoadedBase, rung: int) -> None:
    seen, cancelling = _cancelling(2)
    requests = _requests(CONFIGS, [silent, cancelling, silent])
    results = generate_together(tiny_base, requests, memory=generation_memory(rung))
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
        results = generate_together(tiny_base, _requests(CONFIGS, reports))
    finally:
        hook.remove()
    assert all(isinstance(result, Cancelled) for result in results)
    assert calls == 2


def test_each_is_told_its_own_progress_and_hears_of_life_while_it_waits(tiny_base: LoadedBase) -> None:
    told: list[list[tuple[int, int]]] = [[], [], []]
    reports: list[Report] = [lambda p, mine=mine: mine.append((p.step, p.total)) for mine in told]
    generate_together(tiny_base, _requests(CONFIGS, reports), memory=generation_memory(3))  # two pictures per forward
    assert told[0] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert told[1] == [(0, 4)] * 4 + [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert told[2] == [(0, 8)] * 5 + [(1, 8), (2, 8), (2, 8), (4, 8), (5, 8), (6, 8), (8, 8)], "pictures count alike"


def test_steps_samplers_guidance_and_sizes_may_differ(tiny_base: LoadedBase) -> None:
    changes: list[dict[str, object]] = [
        {"steps": 9, "sampler": "dpmpp_2m"},
        {"guidance": 1.0, "sampler": "euler"},
        {"width": 64, "sampler": "default", "clip_skip": 1},
    ]
    configs = [config.model_copy(update=change) for config, change in zip(CONFIGS, changes, strict=True)]
    together = generate_together(tiny_base, _requests(configs))
    for mine, config in zip(together, configs, strict=True):
        assert np.abs(_pixels(mine) - _pixels(generate(tiny_base, config))).max() <= 1


def test_one_that_does_not_fit_the_base_is_told_so_and_the_others_are_drawn(tiny_base: LoadedBase) -> None:
    wrong = CONFIGS[1].model_copy(update={"width": 33})
    first, second, third = generate_together(tiny_base, _requests([CONFIGS[0], wrong, CONFIGS[2]]))
    assert isinstance(second, ConfigError)
    assert len(_pixels(first)) == 2
    assert len(_pixels(third)) == 3


def test_who_comes_later_joins_at_the_next_step_and_who_is_done_goes_first(tiny_base: LoadedBase) -> None:
    slow, quick, third = (
        CONFIGS[0].model_copy(update={"steps": 9}),
        CONFIGS[1].model_copy(update={"steps": 2}),
        CONFIGS[2].model_copy(update={"steps": 3}),
    )
    requests = _requests([slow, quick, third])
    sizes: list[int] = []
    rooms: list[int] = []
    done: list[tuple[int, int]] = []
    outcomes: dict[Request, Outcome] = {}

    def join(room: int) -> list[Request]:
        rooms.append(room)
        return {3: [requests[1]], 4: [requests[2]]}.get(len(sizes), [])

    def on_done(request: Request, outcome: Outcome) -> None:
        done.append((requests.index(request), len(sizes)))
        outcomes[request] = outcome

    hook = tiny_base.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    try:
        generate_as_they_come(tiny_base, requests[:1], on_done, join=join)
    finally:
        hook.remove()

    assert sizes == [4, 4, 4, 6, 12, 10, 10, 4, 4], "guided pictures take two rows"
    assert done == [(1, 5), (2, 7), (0, 9)]
    assert rooms == [6, 6, 6, 6, 5, 3, 3, 6, 6, 8]
    for request in requests:
        alone = generate(tiny_base, request.config)
        assert np.abs(_pixels(outcomes[request]) - _pixels(alone)).max() <= 1
