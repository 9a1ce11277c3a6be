"""Photographs that stay on disk, a folder of JPEGs a class: decoded, cropped and mirrored as they are needed.

Sets of this kind do not fit on a device, so that training is fed from disk: by worker processes on CUDA, which are
ahead of it by a few batches, and by the run's own process on the CPU. Decoding and cropping are torchvision's and
Pillow's, which are imported when the first image is read. Pixels travel as bytes and are normalised on the device.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import current_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fa.errors import UserError
from fa.layers.feedback import generator

__all__ = ["ImageFolderSource", "DiskSplit"]


@dataclass(frozen=True)
class ImageFolderSource:
    """How one set of photographs is found, checked, read and normalised: an entry of ``fa.data.SETS``.

    Args:
        images: what it holds, in words.
        classes: number of classes.
        folder: below the data folder; holds a folder for every split, which holds one for every class.
        counts: split -> number of its images.
        size: height and width in pixels of what the network sees.
        sha256: of the lines that ``find . -name '*.JPEG' | LC_ALL=C sort | xargs sha256sum`` prints in ``folder``; ""
            where only the images are counted, for reading the whole set takes too long.
        mean, sd: per channel, of pixels scaled to [0, 1] (default: ImageNet's, as torchvision documents them).
    """

    images: str
    classes: int
    folder: str
    counts: dict[str, int] = field(default_factory=dict)
    size: int = 224
    sha256: str = ""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    sd: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def train(self) -> int:
        """Number of training images."""
        return self.counts["train"]

    @property
    def black(self) -> tuple[float, ...]:
        """The normalised value of a black pixel, per channel."""
        return tuple(-mean / sd for mean, sd in zip(self.mean, self.sd))

    def samples(self, root: Path, split: str) -> list[tuple[str, int]]:
        """(path, class) of every image of a split, by class and then by name; classes are numbered in the order of
        their names.
        """
        folder = root / self.folder / split
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []
        files = [sorted(os.listdir(folder / name)) for name in classes]
        kinds = (".jpeg", ".jpg", ".png")
        return [(f"{folder}/{c}/{f}", i) for i, c in enumerate(classes) for f in files[i] if f.lower().endswith(kinds)]

    def state(self, root: Path) -> str:
        """yes, no, or damaged: another number of images or classes, or another sha256."""
        found = {split: self.samples(root, split) for split in self.counts}
        if not any(found.values()):
            return "no"
        whole = all(len(found[split]) == n for split, n in self.counts.items())
        whole = whole and all(len({label for _, label in of}) == self.classes for of in found.values())
        return "yes" if whole and (not self.sha256 or self.digest(root) == self.sha256) else "damaged"

    def check(self, name: str, root: Path) -> None:
        """Raise a UserError that says what to put where, unless every image is there."""
        if (state := self.state(root)) != "yes":
            what = "is not there" if state == "no" else "is damaged or not whole"
            parts = " and ".join(f"{n:,} images into {root / self.folder / split}" for split, n in self.counts.items())
            raise UserError(
                f"data set {name}: {root / self.folder} {what}; put {parts}, "
                f"a folder for each of {self.classes:,} classes"
            )

    def digest(self, root: Path) -> str:
        """The sha256 of the folder as it is; see ``sha256``."""
        folder, lines = root / self.folder, hashlib.sha256()
        for path in sorted(f"./{p.relative_to(folder).as_posix()}" for p in folder.rglob("*.JPEG")):
            lines.update(f"{hashlib.sha256((folder / path).read_bytes()).hexdigest()}  {path}\n".encode())
        return lines.hexdigest()


class DiskSplit:
    """One split of an :class:`ImageFolderSource`, on disk.

    Its images have an order of their own, drawn once and the same for every run, so that the first of them are a fair
    sample and not a class or two.

    Args:
        source: the set.
        root: the data folder.
        part: "train" or "val".
        device: where batches shall be.
        dtype: floating type of the images.
        workers: processes that decode (default None: on CUDA one for each core, shared by torchrun's ranks on this
            machine; on the CPU none, which leaves the run one process).
    """

    def __init__(
        self,
        source: ImageFolderSource,
        root: Path,
        part: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        workers: int | None = None,
    ) -> None:
        samples = source.samples(root, part)
        order = torch.randperm(len(samples), generator=generator(0, "photos")).tolist()
        # One array, not a million strings: a forked worker that counts references would copy every page of those.
        self.paths = np.array([os.fsencode(samples[i][0]) for i in order])
        self.labels = np.array([samples[i][1] for i in order])
        self.size, self.device, self.dtype = source.size, torch.device(device), dtype
        wide = torch.promote_types(dtype, torch.float32)
        mean_sd = (torch.tensor(v, dtype=wide, device=device).view(-1, 1, 1) for v in (source.mean, source.sd))
        self.mean, self.sd = mean_sd  # (3, 1, 1) each
        cores = max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
        self.workers = (cores if self.device.type == "cuda" else 0) if workers is None else workers

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, n: int) -> tuple[Tensor, Tensor]:
        """The first ``n`` images (n, 3, size, size), normalised, and their classes (n,), on the device; cut from the
        middle.
        """
        return next(self._serve([range(min(n, len(self)))], None))

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images and their classes in order, ``size`` at a time, as :meth:`first` gives them.

        The shorter side is scaled to 8/7 of the size (256 for 224) and the middle cut out.
        """
        return self._serve([range(i, min(i + size, len(self))) for i in range(0, len(self), size)], None)

    def feed(self, index: Tensor, seed: int, epoch: int, augment: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch: images and classes, on the device.

        Args:
            index: numbers of the images (steps, batch), int64.
            seed, epoch: what the augmentation is drawn from, with the number of the image: neither the order of the
                images nor the number of workers matters.
            augment: a random part of each image (8 to 100 % of its area, sides 3:4 to 4:3), scaled to the size, half
                of them mirrored.
        """
        return self._serve(index.tolist(), (seed, epoch) if augment else None)

    def _serve(self, batches: Sequence[Sequence[int]], key: tuple[int, int] | None) -> Iterator[tuple[Tensor, Tensor]]:
        from torch.utils.data import DataLoader

        cuda, workers = self.device.type == "cuda", min(self.workers, len(batches))
        if workers and current_process().daemon:
            raise UserError(
                "photographs are decoded by processes, which this one may not start, for it is a daemon; a worker of "
                "Dask may after DASK_DISTRIBUTED__WORKER__DAEMON=False dask worker ..."
            )
        loader = DataLoader(
            DecodedImages(self.paths, self.labels, self.size, key),
            batch_sampler=batches,
            num_workers=workers,
            pin_memory=cuda,
            prefetch_factor=4 if workers else None,
            generator=torch.Generator(),  # else it draws from the global generator
        )
        for x, y in _told(loader):
            x = x.to(self.device, non_blocking=True).to(self.mean.dtype)
            yield x.div_(255).sub_(self.mean).div_(self.sd).to(self.dtype), y.to(self.device, non_blocking=True)


def _told(loader: Iterable[Any]) -> Iterator[Any]:
    """The loader's batches. An error of the user comes from its processes with their traceback before its sentence."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


class DecodedImages(torch.utils.data.Dataset):
    """Bytes (3, size, size) and class of each image: its middle, or under a key (seed, epoch) a random part of it."""

    def __init__(self, paths: np.ndarray, labels: np.ndarray, size: int, key: tuple[int, int] | None) -> None:
        try:
            from torchvision.transforms import v2
        except ImportError as error:
            raise UserError(
                "photographs are decoded by torchvision, which is not installed: pip install torchvision"
            ) from error
        middle = [v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size)]
        part = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        self.transform: Any = v2.Compose([*(part if key else middle), v2.PILToTensor()])
        self.paths, self.labels, self.key = paths, labels, key

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        from PIL import Image

        path = os.fsdecode(self.paths[i])
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:  # whatever Pillow says of a file that is not whole
            raise UserError(f"photograph {path} is damaged ({type(error).__name__}); restore it") from error
        if self.key is None:
            return self.transform(image), int(self.labels[i])
        own, kept = generator(*self.key, i, "photo"), torch.default_generator.get_state()
        try:  # torchvision draws from the global generator, which is lent for one image
            torch.default_generator.manual_seed(own.initial_seed())
            return self.transform(image), int(self.labels[i])
        finally:
            torch.default_generator.set_state(kept)
