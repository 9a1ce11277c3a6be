"""Data sets as tensors on the device, checked and normalised once, so that a training loop only has to index them.

================ ===================== ======================== ===================== =======================
name             images                train / val / test       normalised with       from
================ ===================== ======================== ===================== =======================
digits           8x8 grey, 10 classes  1,437 / - / 360          training split (ours) scikit-learn's package
mnist            28x28 grey, 10        60,000 / - / 10,000      0.1307, 0.3081 (p3)   ``MNIST/raw``
cifar10          32x32 RGB, 10         45,000 / 5,000 / 10,000  per channel (p3)      ``cifar-10-batches-py``
cifar10-16       16x16 RGB, 10         45,000 / 5,000 / 10,000  as cifar10            the same files
cifar10-24       24x24 RGB, 10         45,000 / 5,000 / 10,000  as cifar10            the same files
imagenet         224x224 RGB, 1,000    1,281,167 / 50,000 / -   ImageNet's (p3)       ``imagenet/{train,val}``
tiny-imagenet-20 32x32 RGB, 20         2,000 / 500 / -          ImageNet's            ``tiny-imagenet-20``
================ ===================== ======================== ===================== =======================

Every file is checked by its md5 *before* any is parsed, for CIFAR-10's are pickles and a pickle can run anything.
Nothing is downloaded unless :func:`download` is called. The last two are photographs that stay on disk
(:mod:`fa.train.photos`): their images are counted, and those of tiny-imagenet-20 checked by their sha256. cifar10-24
is the middle of CIFAR-10's images, of which a recipe that augments sees random crops of 24x24 pixels.

Sources: normalisation, CIFAR-10's split and its augmentation are Li & Benna 2024 (authors' code ``datasets/mnist.py``,
``datasets/cifar.py``); the split of digits is ours; tiny-imagenet-20 is every tenth class of Tiny ImageNet (Le & Yang
2015), 100 + 25 images each, scaled to half their size, so that accuracies on it compare with nobody's.
"""

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fa.errors import UserError, unknown
from fa.paths import home, user_folder
from fa.train.photos import DiskSplit, ImageFolderSource
from fa.train.sources import SETS, Source

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Split:
    """Images ``x`` (n, channels, height, width), normalised, and their classes ``y`` (n,), int64, on the device; of
    ``x`` ``margin`` pixels on each side are for random crops alone."""

    x: Tensor
    y: Tensor
    margin: int = 0

    def __len__(self) -> int:
        return len(self.y)

    def first(self, n: int) -> tuple[Tensor, Tensor]:
        """The first ``n`` images and their classes, as they are."""
        return self.middle(self.x[:n]), self.y[:n]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images and their classes in order, ``size`` at a time, as they are."""
        return zip(map(self.middle, self.x.split(size)), self.y.split(size))

    def middle(self, x: Tensor) -> Tensor:
        """Images without their margin; (n, c, h + 2 margin, w + 2 margin) -> (n, c, h, w)."""
        cut = slice(self.margin, -self.margin or None)
        return x[:, :, cut, cut].contiguous() if self.margin else x


@dataclass(frozen=True)
class Data:
    """A data set on the device; a split that the set does not have is None."""

    name: str
    classes: int
    train: Split | DiskSplit
    val: Split | DiskSplit | None
    test: Split | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return tuple(self.train.first(1)[0].shape[1:])


def root() -> Path:
    """The data folder: ``$FA_DATA``, or ``data`` in the repository.

    A relative ``$FA_DATA`` is taken from :data:`fa.ROOT`, whatever the working folder is; where that is no clone of the
    repository, both are taken from the working folder.
    """
    return _folder(None)


def load(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, root: str | Path | None = None
) -> Data:
    """Read a data set from its own files, check them, and put it on the device, normalised.

    .. math:: x = (pixel / top - mean) / sd

    computed in float32 (float64 for ``dtype=float64``); to the bit what torchvision's ``ToTensor``, ``Normalize`` give.

    Args:
        name: a key of :data:`fa.train.sources.SETS`.
        device: where the tensors shall live.
        dtype: floating type of the images.
        root: the data folder; default :func:`root`. A relative one is taken as ``$FA_DATA`` is.

    Raises:
        UserError: an unknown name, a file that is not there, or a damaged one; nothing has been parsed then.

    Photographs (:mod:`fa.train.photos`) stay on disk, and are put on the device a batch at a time.
    """
    source = _source(name)
    if isinstance(source, ImageFolderSource):
        folder = _folder(root)
        source.check(name, folder)
        train, val = (DiskSplit(source, folder, part, device, dtype) for part in ("train", "val"))
        return Data(name, source.classes, train, val, None)
    splits = source.parse(_verified(name, root))
    wide = torch.promote_types(dtype, torch.float32)
    mean, sd = (torch.tensor(v, dtype=wide, device=device).view(-1, 1, 1) for v in (source.mean, source.sd))

    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        x = torch.tensor(images, device=device).to(wide)  # uint8 travels, floats are made on the device
        x = x if x.ndim == 4 else x[:, None]  # (n, h, w) -> (n, 1, h, w)
        x = x.div_(source.top).sub_(mean).div_(sd).to(dtype)
        return Split(x, torch.tensor(labels, device=device).long(), source.margin)

    made = {part: split(*arrays) for part, arrays in splits.items()}
    return Data(name, source.classes, made["train"], made.get("val"), made.get("test"))


def digest(name: str, root: str | Path | None = None) -> str:
    """12 digits that say which files a data set has here, checked as :func:`load` checks them: of photographs the names
    of classes and images, of all else the md5 of each file.

    Args:
        name: a key of :data:`fa.train.sources.SETS`.
        root: the data folder; default :func:`root`.

    Raises:
        UserError: as :func:`load`.
    """
    source = _source(name)
    if isinstance(source, ImageFolderSource):
        source.check(name, folder := _folder(root))
        lines = [path[len(str(folder)) :] for part in source.counts for path, _ in source.samples(folder, part)]
    else:
        _verified(name, root)
        lines = [f"{path} {md5}" for path, md5 in source.files.items()]
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()[:12]


def draw_crops(n: int, generator: torch.Generator, pad: int = 4) -> Tensor:
    """What :func:`crop` shall do to n images: (3, n), int64: down and right, the corner in 0 ... 2 pad, and 1 where
    mirrored.
    """
    where = dict(generator=generator, device=generator.device)
    return torch.cat([torch.randint(2 * pad + 1, (2, n), **where), torch.randint(2, (1, n), **where)])


def crop(x: Tensor, draws: Tensor, border: Tensor, pad: int = 4, margin: int = 0) -> Tensor:
    """Crop every image, after ``pad`` pixels of border on each side, at its own corner, and mirror those drawn for it.

    Args:
        x: images (n, channels, height, width).
        draws: (3, n), from :func:`draw_crops`, on the device of x.
        border: value of the border, (channels,) or (1,), on the device of x.
        pad: width of the border in pixels.
        margin: 0, or ``pad`` where x has its own border: the crops are then 2 ``pad`` pixels smaller than x.
    """
    n, channels, height, width = x.shape[:2] + tuple(size - 2 * margin for size in x.shape[2:])
    down, right, mirrored = draws
    padded = x
    if not margin:
        padded = border.to(x.dtype).view(1, -1, 1, 1).expand(n, channels, height + 2 * pad, width + 2 * pad).clone()
        padded[:, :, pad : pad + height, pad : pad + width] = x
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # (n, c, 2 pad + 1, 2 pad + 1, h, w), a view
    x = crops[torch.arange(n, device=x.device), :, down, right]  # (n, c, h, w)
    return torch.where(mirrored.bool().view(n, 1, 1, 1), x.flip(-1), x)


def download(name: str, root: str | Path | None = None) -> Path:
    """Fetch a data set through torchvision, unless it is there already, and check it.

    Args:
        name: a key of :data:`fa.train.sources.SETS`.
        root: the data folder; default :func:`root`.

    Returns:
        The folder that its files lie below.

    Raises:
        UserError: an unknown name, a folder that cannot be written, no torchvision, no network (it says which files go
            where), or a damaged file.
    """
    source, folder = _source(name), _folder(root, name)
    if isinstance(source, ImageFolderSource):
        source.check(f"{name} cannot be downloaded", folder)
        return folder
    if name != "digits" and not all(_find(folder / path) for path in source.files):
        try:
            from torchvision import datasets

            (datasets.MNIST if name == "mnist" else datasets.CIFAR10)(folder, download=True)
        except (NotADirectoryError, FileNotFoundError, FileExistsError, PermissionError) as error:
            raise UserError(f"{folder} cannot be written ({_line(error)}); set FA_DATA to another folder") from error
        except (ImportError, OSError, RuntimeError) as error:
            raise UserError(f"{name} could not be downloaded ({_line(error)}); {_by_hand(name, folder)}") from error
    _verified(name, root)
    return folder


def describe(root: str | Path | None = None) -> "pd.DataFrame":
    """One row a data set: ``name``, ``present`` (yes, no or damaged: every md5 is computed for it), ``where``,
    ``images``.

    Args:
        root: the data folder; default :func:`root`.
    """
    import pandas as pd

    rows = [(name, *_state(name, root), source.images) for name, source in SETS.items()]
    return pd.DataFrame(rows, columns=["name", "present", "where", "images"])


def _source(name: str) -> Source | ImageFolderSource:
    if name not in SETS:
        raise unknown("data set", name, SETS)
    return SETS[name]


def _folder(root: str | Path | None, name: str = "") -> Path:
    """What ``Source.files`` are below: the data folder; for digits scikit-learn's package (importing it takes 2 s)."""
    if name != "digits":
        return (home() / Path(root).expanduser() if root else user_folder("FA_DATA", "data")).resolve()
    spec = find_spec("sklearn")
    if spec is None:
        raise UserError("the digits are a file of scikit-learn, which is not installed: pip install scikit-learn")
    return Path(spec.submodule_search_locations[0])


def _find(path: Path) -> Path | None:
    """The file itself or, as torchvision may leave it, its .gz."""
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)


def _verified(name: str, root: str | Path | None) -> list[bytes]:
    """The unpacked contents of every file of a data set, in order, all of them checked before any is returned."""
    folder, contents = _folder(root, name), []
    for path, md5 in SETS[name].files.items():
        if (found := _find(folder / path)) is None:
            raise UserError(f"data set {name}: {folder / path} is not there; {_remedy(name, folder)}")
        try:
            content = found.read_bytes() if found.suffix != ".gz" else gzip.decompress(found.read_bytes())
        except (OSError, EOFError, zlib.error):
            content = b""
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise UserError(
                f"data set {name}: {found} is damaged or not the published file; remove it, "
                f"then {_remedy(name, folder)}"
            )
        contents.append(content)
    return contents


def _state(name: str, root: str | Path | None) -> tuple[str, str]:
    """Whether a data set is here (yes, no or damaged), and the folder of its files."""
    source = SETS[name]
    try:
        folder = _folder(root, name)
    except UserError:
        return "no", ""
    if isinstance(source, ImageFolderSource):
        return source.state(folder), str(folder / source.folder)
    where = str((folder / next(iter(source.files))).parent)
    if not any(_find(folder / path) for path in source.files):
        return "no", where
    try:
        _verified(name, root)
    except UserError:
        return "damaged", where
    return "yes", where


def _remedy(name: str, folder: Path) -> str:
    if name == "digits":
        return "install scikit-learn again: pip install --force-reinstall scikit-learn"
    return f"`python -m fa data {name}` downloads it, or {_by_hand(name, folder)}"


def _by_hand(name: str, folder: Path) -> str:
    paths = [Path(path) for path in SETS[name].files]
    return f"put {', '.join(path.name for path in paths)} (as they are or as .gz) into {folder / paths[0].parent}"


def _line(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".: ")
