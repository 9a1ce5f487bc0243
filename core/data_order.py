"""Which pictures make up the batch of an optimizer step: a pure function of (seed, epoch), nothing to save or restore.

Called by `core.train`. Works on sizes only, never on pixels.
"""

import torch

from core.errors import DatasetError
from core.manifest import DatasetManifest
from core.randomness import generator


def plan_batch(manifest: DatasetManifest, seed: int, step: int, effective_batch: int) -> list[int]:
    """Indices into `manifest.images` of one effective batch, all of one bucket (one width and height).

    Steps are grouped into cycles of as many steps as there are pictures. In a cycle a bucket of n pictures has n
    batches, at shuffled places, and draws them from `effective_batch` shuffled passes over its pictures. So every
    picture is seen exactly `effective_batch` times per cycle, no batch is short, and no small bucket counts double.

    Args:
        manifest: The dataset.
        seed: Of the training.
        step: Optimizer step, 0-based.
        effective_batch: Pictures per optimizer step, micro-batches together.

    Raises:
        DatasetError: The dataset has no pictures.
    """
    image_count = len(manifest.images)
    if image_count == 0:
        raise DatasetError("the dataset has no pictures: prepare at least one")
    buckets: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(manifest.images):
        buckets.setdefault((image.width, image.height), []).append(index)
    cycle, place = divmod(step, image_count)

    owners = [size for size in sorted(buckets) for _ in buckets[size]]  # one entry per batch of the cycle
    order = torch.randperm(image_count, generator=generator(seed, "bucket order", cycle)).tolist()
    size = owners[order[place]]
    earlier = sum(owners[position] == size for position in order[:place])  # batches of this bucket before this one

    members = buckets[size]
    chosen = []
    for position in range(earlier * effective_batch, (earlier + 1) * effective_batch):
        epoch = cycle * effective_batch + position // len(members)
        passes = torch.randperm(len(members), generator=generator(seed, "picture order", epoch, *size))
        chosen.append(members[int(passes[position % len(members)])])
    return chosen
