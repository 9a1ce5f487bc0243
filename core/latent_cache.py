"""Posteriors of all training pictures, computed once, so that the loop needs neither pictures nor VAE.

Mean and standard deviation are kept instead of one sample, so each step still draws its own latent: caching is exact.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.errors import DatasetError
from core.image_gate import open_image
from core.manifest import PreparedDataset, PreparedImage
from core.pipelines import LoadedBase
from core.progress import Progress, Report, silent
from core.vae import encode_to_posterior


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentCache:
    """Mean and standard deviation by picture, in the manifest's order: each (c, h, w) fp32 on the training device."""

    means: list[Tensor]
    stds: list[Tensor]

    def sample(self, indices: Sequence[int], noise: Tensor) -> Tensor:
        """Latents mean + std * noise of pictures of one size: (n, c, h, w).

        Args:
            indices: n pictures of one bucket.
            noise: (n, c, h, w) standard normal.
        """
        mean = torch.stack([self.means[index] for index in indices])  # (n, c, h, w)
        std = torch.stack([self.stds[index] for index in indices])  # (n, c, h, w)
        return mean + std * noise

    @property
    def byte_count(self) -> int:
        """Memory held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.means, *self.stds))


def cache_latents(base: LoadedBase, dataset: PreparedDataset, report: Report = silent) -> LatentCache:
    """Encode every picture of a dataset.

    One at a time: a batch of another size may round differently, and a resumed run has to see the same bits.

    Raises:
        DatasetError: A picture is missing, not the one in the manifest, or does not fit the base's latent grid.
    """
    means: list[Tensor] = []
    stds: list[Tensor] = []
    images = dataset.manifest.images
    for done, image in enumerate(images, start=1):
        if image.width % base.facts.vae_factor or image.height % base.facts.vae_factor:
            raise DatasetError(
                f"{image.name} is {image.width}x{image.height} px; this base model needs multiples of "
                f"{base.facts.vae_factor}: prepare the dataset again with bucket_step_px {base.facts.bucket_step_px}"
            )
        pixels = read_pixels(image, dataset.files[image.sha256])
        mean, std = encode_to_posterior(base, pixels[None])  # (1, c, h, w) each
        means.append(mean[0])
        stds.append(std[0])
        report(Progress(stage="caching latents", step=done, total=len(images)))
    return LatentCache(means=means, stds=stds)


def read_pixels(image: PreparedImage, path: Path) -> Tensor:
    """A prepared picture as (3, h, w) fp32 in [-1, 1], after checking that it is the very file of the manifest.

    Raises:
        DatasetError: Missing, changed, or of another size than the manifest says.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"prepared picture {path} cannot be read ({error.strerror}): prepare it again") from error
    if hashlib.sha256(data).hexdigest() != image.sha256:
        raise DatasetError(f"prepared picture {path} has changed since it was prepared: prepare the dataset again")
    picture = open_image(io.BytesIO(data)).convert("RGB")
    if picture.size != (image.width, image.height):
        raise DatasetError(f"prepared picture {path} is {picture.size}, the manifest says {image.width, image.height}")
    values = torch.from_numpy(np.array(picture, dtype=np.float32))  # (h, w, 3) in 0..255
    return values.permute(2, 0, 1).contiguous() / 127.5 - 1
