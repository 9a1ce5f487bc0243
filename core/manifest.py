"""The frozen description of a prepared dataset: which pictures, at which size, with which captions."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from core.config import PreprocessConfig, canonical_json_hash
from core.errors import DatasetError

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    """One training picture.

    Attributes:
        sha256: Of the prepared PNG (RGB, 8 bit, no metadata).
        source_sha256: Of the file that the person gave.
        name: The person's file name, a label only; never used as a path.
        width, height: Pixels of the prepared picture = its bucket.
        caption: Text trained with it, may be empty.
    """

    sha256: str
    source_sha256: str
    name: str
    width: int
    height: int
    caption: str


@dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """All training pictures in a fixed order, and the configuration that made them."""

    config: PreprocessConfig
    images: tuple[PreparedImage, ...]

    def to_json(self) -> dict[str, object]:
        """Plain JSON values; the inverse of `from_json`."""
        return {"format": 1, "config": self.config.dump(), "images": [asdict(image) for image in self.images]}

    @classmethod
    def from_json(cls, data: object) -> "DatasetManifest":
        """Parse `to_json`'s output.

        Raises:
            DatasetError: The JSON is not a manifest of format 1.
        """
        if not isinstance(data, dict) or data.get("format") != 1:
            raise DatasetError("this manifest.json is not a lorasite dataset of format 1: run preprocessing again")
        try:
            images = tuple(PreparedImage(**image) for image in data["images"])
            return cls(config=PreprocessConfig.parse(data["config"]), images=images)
        except (KeyError, TypeError) as error:
            raise DatasetError(f"manifest.json is damaged ({error}): run preprocessing again") from error

    def content_hash(self) -> str:
        """SHA-256 of the canonical JSON: changes with any picture, size, caption, or their order."""
        return canonical_json_hash(self.to_json())


@dataclass(frozen=True, kw_only=True)
class PreparedDataset:
    """A manifest and where its pictures lie: `files[sha256]` is the prepared PNG of that hash."""

    manifest: DatasetManifest
    files: dict[str, Path]


def read_dataset(folder: Path) -> PreparedDataset:
    """Open a folder written by `core.preprocess` (`manifest.json` + `images/<sha256>.png`).

    Raises:
        DatasetError: No manifest there, or a picture of it is missing.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DatasetError(f"no {MANIFEST_NAME} in {folder}: run `python -m core.preprocess` first")
    manifest = DatasetManifest.from_json(json.loads(path.read_text(encoding="utf-8")))
    files = {image.sha256: folder / "images" / f"{image.sha256}.png" for image in manifest.images}
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise DatasetError(f"{len(missing)} pictures of {path} are missing, first {missing[0]}: prepare it again")
    return PreparedDataset(manifest=manifest, files=files)
