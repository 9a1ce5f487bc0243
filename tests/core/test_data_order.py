"""Every picture gets its share, batches keep to one size, and the order is a function of the seed."""

from collections import Counter
from dataclasses import replace

import pytest

from core.data_order import plan_batch
from core.errors import DatasetError
from core.manifest import DatasetManifest
from tests.core.training_parts import SQUARE, WIDE, make_dataset


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> DatasetManifest:
    return make_dataset(tmp_path_factory.mktemp("pictures"), [SQUARE] * 5 + [WIDE] * 3 + [(24, 48)]).manifest


@pytest.mark.parametrize("effective_batch", [1, 2, 4, 7])
def test_each_picture_is_seen_equally_often_in_a_cycle(manifest: DatasetManifest, effective_batch: int) -> None:
    seen: Counter[int] = Counter()
    for step in range(len(manifest.images)):
        seen.update(plan_batch(manifest, 3, step, effective_batch))
    assert seen == dict.fromkeys(range(len(manifest.images)), effective_batch)


def test_a_batch_is_full_and_of_one_size(manifest: DatasetManifest) -> None:
    for step in range(40):
        plan = plan_batch(manifest, 0, step, 4)
        assert len(plan) == 4
        assert len({(manifest.images[index].width, manifest.images[index].height) for index in plan}) == 1


def test_the_order_is_a_function_of_the_seed_and_differs_between_epochs(manifest: DatasetManifest) -> None:
    def orders(seed: int, first: int) -> list[list[int]]:
        return [plan_batch(manifest, seed, step, 2) for step in range(first, first + 9)]

    assert orders(1, 0) == orders(1, 0)
    assert orders(1, 0) != orders(2, 0)
    assert orders(1, 0) != orders(1, 9)


def test_a_dataset_smaller_than_the_batch_repeats_its_pictures(manifest: DatasetManifest) -> None:
    two = replace(manifest, images=manifest.images[:2])
    assert Counter(plan_batch(two, 0, 0, 6)) == {0: 3, 1: 3}


def test_an_empty_dataset_is_refused(manifest: DatasetManifest) -> None:
    with pytest.raises(DatasetError, match="no pictures"):
        plan_batch(replace(manifest, images=()), 0, 0, 2)
