"""Data sets as tensors on the device, checked and normalised once, so that a training loop only has to index them.

================ ===================== ======================== ===================== =======================
name             images                train / val / test       normalised with       from
================ ===================== ======================== ===================== =======================
digits           8x8 grey, 10 classes  1,437 / - / 360          training split (ours) scikit-learn's package
mnist            28x28 grey, 10        60,000 / - / 10,000      0.1307, 0.3081 (p3)   ``MNIST/raw``
cifar10          32x32 RGB, 10         45,000 / 5,000 / 10,000  per channel (p3)      ``cifar-10-batches-py``
cifar10-16       16x16 RGB, 10         45,000 / 5,000 / 10,000  as cifar10            the same files
imagenet         224x224 RGB, 1,000    1,281,167 / 50,000 / -   ImageNet's (p3)       ``imagenet/{train,val}``
tiny-imagenet-20 32x32 RGB, 20         2,000 / 500 / -          ImageNet's            ``tiny-imagenet-20``
================ ===================== ======================== ===================== =======================

Every file is checked by its md5 *before* any is parsed, for CIFAR-10's are pickles and a pickle can run anything.
Nothing is downloaded unless :func:`download` is called. The last two are photographs that stay on disk
(:mod:`fa.train.photos`): their images are counted, and those of tiny-imagenet-20 checked by their sha256.

Sources: normalisation, CIFAR-10's split and its augmentation are Li & Benna 2024 (authors' code ``datasets/mnist.py``,
``datasets/cifar.py``); the split of digits is ours; tiny-imagenet-20 is every tenth class of Tiny ImageNet (Le & Yang
2015), 100 + 25 images each, scaled to half their size, so that accuracies on it compare with nobody's.
"""

import gzip
import hashlib
import io
import os
import pickle
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fa.errors import UserError
from fa.paths import ROOT
from fa.train.photos import DiskSplit, ImageFolderSource

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "SETS",
    "ImageFolderSource",
    "Data",
    "DiskSplit",
    "Source",
    "Split",
    "augment",
    "describe",
    "download",
    "load",
    "root",
]

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]  # split -> images (n, [channels,] height, width) uint8, labels (n,)


@dataclass(frozen=True)
class Split:
    """Images ``x`` (n, channels, height, width), normalised, and their classes ``y`` (n,), int64, on the device."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def first(self, n: int) -> tuple[Tensor, Tensor]:
        """The first ``n`` images and their classes, as they are."""
        return self.x[:n], self.y[:n]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images and their classes in order, ``size`` at a time, as they are."""
        return zip(self.x.split(size), self.y.split(size))


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


@dataclass(frozen=True)
class Source:
    """How one data set is found, checked, read and normalised: an entry of :data:`SETS`.

    Args:
        images: what it holds, in words.
        classes: number of classes.
        top: the value of a white pixel in the files.
        mean, sd: per channel, of pixels scaled to [0, 1].
        files: path below the data folder -> md5 of the contents (of the unpacked ones, where the file is a ``.gz``).
        parse: the contents of those files, in that order -> the arrays of each split.
    """

    images: str
    classes: int
    top: float
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    files: dict[str, str]
    parse: Callable[[list[bytes]], Arrays]

    @property
    def black(self) -> tuple[float, ...]:
        """The normalised value of a black pixel, per channel: what p3 pads with."""
        return tuple(-mean / sd for mean, sd in zip(self.mean, self.sd))


def _held_out(n: int, k: int) -> tuple[list[int], np.ndarray]:
    """k of n indices, the same for every seed of a run, and the others in order (as authors' ``datasets/cifar.py``)."""
    held = random.Random(0).sample(range(n), k)
    return held, np.delete(np.arange(n), held)


def _digits(files: list[bytes]) -> Arrays:
    table = np.loadtxt(io.BytesIO(files[0]), delimiter=",", dtype=np.uint8)  # (1797, 64 pixels + label)
    x, y = table[:, :-1].reshape(-1, 8, 8), table[:, -1]
    held, kept = _held_out(len(y), 360)
    return {"train": (x[kept], y[kept]), "test": (x[held], y[held])}


def _idx(file: bytes) -> np.ndarray:
    """MNIST's own format: 2 zero bytes, type (8: uint8), number of dimensions, their big-endian sizes, the values."""
    sizes = np.frombuffer(file, ">i4", file[3], offset=4)
    return np.frombuffer(file, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)


def _mnist(files: list[bytes]) -> Arrays:
    x, y, x_test, y_test = map(_idx, files)
    return {"train": (x, y), "test": (x_test, y_test)}


def _cifar10(files: list[bytes]) -> Arrays:
    batches = [pickle.loads(file, encoding="bytes") for file in files]  # md5 checked by the caller
    x = [batch[b"data"].reshape(-1, 3, 32, 32) for batch in batches]
    y = [np.array(batch[b"labels"]) for batch in batches]
    x_train, y_train = np.concatenate(x[:-1]), np.concatenate(y[:-1])
    held, kept = _held_out(len(y_train), len(y_train) // 10)
    return {"train": (x_train[kept], y_train[kept]), "val": (x_train[held], y_train[held]), "test": (x[-1], y[-1])}


def _cifar10_16(files: list[bytes]) -> Arrays:
    """CIFAR-10 with each block of 2x2 pixels averaged, so that a step of a convolutional network costs a quarter."""

    def halved(
        x: np.ndarray,
    ) -> np.ndarray:  # (n, 3, 32, 32) uint8 -> (n, 3, 16, 16); quarters of whole numbers are exact
        return x.reshape(-1, 3, 16, 2, 16, 2).mean((3, 5), dtype=np.float32)

    return {split: (halved(x), y) for split, (x, y) in _cifar10(files).items()}


CIFAR10_FILES = {
    "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
    "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
    "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
}


SETS: dict[str, Source | ImageFolderSource] = {
    "digits": Source(
        "8x8 grey: 1,437 train, 360 test",
        10,
        16,
        (0.3052,),
        (0.3760,),
        {"datasets/data/digits.csv": "a0339c30a8a5312a1b6f9e5c719dcce5"},
        _digits,
    ),
    "mnist": Source(
        "28x28 grey: 60,000 train, 10,000 test",
        10,
        255,
        (0.1307,),
        (0.3081,),
        {
            "MNIST/raw/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "MNIST/raw/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "MNIST/raw/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "MNIST/raw/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
        _mnist,
    ),
    "cifar10": Source(
        "32x32 RGB: 45,000 train, 5,000 validation, 10,000 test",
        10,
        255,
        (0.4914, 0.4821, 0.4465),
        (0.2470, 0.2435, 0.2616),
        CIFAR10_FILES,
        _cifar10,
    ),
    "cifar10-16": Source(
        "16x16 RGB, means of 2x2 pixels of cifar10: 45,000 train, 5,000 validation, 10,000 test",
        10,
        255,
        (0.4914, 0.4821, 0.4465),
        (0.2470, 0.2435, 0.2616),
        CIFAR10_FILES,
        _cifar10_16,
    ),
    "imagenet": ImageFolderSource(
        "ILSVRC 2012 photographs: 1,281,167 train, 50,000 validation",
        1000,
        "imagenet",
        {"train": 1_281_167, "val": 50_000},
    ),
    "tiny-imagenet-20": ImageFolderSource(
        "64x64 photographs: 2,000 train, 500 validation",
        20,
        "tiny-imagenet-20",
        {"train": 2000, "val": 500},
        size=32,
        sha256="85687d6c5c1b3d7cc2ae9beb6c663187236ffd8c0451e41057c2202762a8a7da",
    ),
}
"""Name -> :class:`Source` or, of photographs on disk, :class:`fa.train.photos.ImageFolderSource` of every data set that :func:`load` knows."""


def root() -> Path:
    """The data folder: ``$FA_DATA``, or ``data`` in the repository.

    A relative ``$FA_DATA`` is taken from :data:`fa.ROOT`, whatever the working folder is.
    """
    return _folder(None)


def load(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, root: str | Path | None = None
) -> Data:
    """Read a data set from its own files, check them, and put it on the device, normalised.

    .. math:: x = (pixel / top - mean) / sd

    computed in float32 (float64 for ``dtype=float64``); to the bit what torchvision's ``ToTensor``, ``Normalize`` give.

    Args:
        name: a key of :data:`SETS`.
        device: where the tensors shall live.
        dtype: floating type of the images.
        root: the data folder; default :func:`root`. A relative one is taken from :data:`fa.ROOT`.

    Raises:
        UserError: an unknown name, a file that is not there, or one whose md5 is wrong; nothing has been parsed then.

    Photographs (:mod:`fa.train.photos`) stay on disk, and are put on the device a batch at a time.
    """
    source = _source(name)
    if isinstance(source, ImageFolderSource):
        return _photos(name, source, device, dtype, _folder(root))
    splits = source.parse(_verified(name, root))
    wide = torch.promote_types(dtype, torch.float32)
    mean, sd = (torch.tensor(v, dtype=wide, device=device).view(-1, 1, 1) for v in (source.mean, source.sd))

    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        x = torch.tensor(images, device=device).to(wide)  # uint8 travels, floats are made on the device
        x = x if x.ndim == 4 else x[:, None]  # (n, h, w) -> (n, 1, h, w)
        return Split(x.div_(source.top).sub_(mean).div_(sd).to(dtype), torch.tensor(labels, device=device).long())

    made = {part: split(*arrays) for part, arrays in splits.items()}
    return Data(name, source.classes, made["train"], made.get("val"), made.get("test"))


def _photos(name: str, album: ImageFolderSource, device: str | torch.device, dtype: torch.dtype, folder: Path) -> Data:
    if (state := album.state(folder)) != "yes":
        why = {
            "no": "is not there",
            "incomplete": f"is not whole ({_counts(album, folder)})",
            "damaged": "does not have the published sha256",
        }[state]
        raise UserError(f"data set {name}: {folder / album.folder} {why}; {album.remedy(folder)}")
    train, val = (
        DiskSplit(album.samples(folder, part), album.size, album.mean, album.sd, device, dtype)
        for part in ("train", "val")
    )
    return Data(name, album.classes, train, val, None)


def _counts(album: ImageFolderSource, folder: Path) -> str:
    found = {part: album.samples(folder, part) for part in album.counts}
    return ", ".join(
        f"{part}: {len(of):,} images of {len({label for _, label in of})} classes" for part, of in found.items()
    )


def augment(x: Tensor, generator: torch.Generator, pad: int = 4, fill: Sequence[float] | None = None) -> Tensor:
    """Shift every image by up to ``pad`` pixels each way and mirror half of them: random crop and horizontal flip.

    The whole batch at once on its device, every image with a draw of its own. The same state of the generator gives the
    same result; a CPU generator gives it on every device.

    Args:
        x: images (n, channels, height, width); left as they are.
        generator: draws shifts and mirrorings; on the CPU or on the device of ``x``.
        pad: largest shift in pixels (default 4: p3's).
        fill: value of the border per channel; default: black in normalised CIFAR-10, for the paper pads before it
            normalises. For another data set, ``fa.data.SETS[name].black``.

    Returns:
        A new tensor of the shape of x.

    Raises:
        UserError: as many fill values as channels (or one) are needed.

    Source: Li & Benna 2024, authors' code ``datasets/cifar.py`` (flip, crop 32 with padding 4).
    """
    fill = SETS["cifar10"].black if fill is None else fill
    if len(fill) not in (1, x.shape[1]):
        raise UserError(
            f"augment: fill has {len(fill)} values for {x.shape[1]} channels; "
            "pass fill=fa.data.SETS[name].black for the data set at hand"
        )
    return crop(x, draw_crops(len(x), generator, pad).to(x.device), torch.tensor(fill, device=x.device), pad)


def pad_of(shape: Sequence[int]) -> int:
    """Width of the border that training images (channels, height, width) are cropped from: an eighth of the height, p3's 4 of 32."""
    return max(shape[-2] // 8, 1)


def draw_crops(n: int, generator: torch.Generator, pad: int = 4) -> Tensor:
    """What :func:`crop` shall do to n images: (3, n), int64: down and right, the corner in 0 ... 2 pad, and 1 where mirrored."""
    where = dict(generator=generator, device=generator.device)
    return torch.cat([torch.randint(2 * pad + 1, (2, n), **where), torch.randint(2, (1, n), **where)])


def crop(x: Tensor, draws: Tensor, border: Tensor, pad: int = 4) -> Tensor:
    """Crop every image, after ``pad`` pixels of border on each side, at its own corner, and mirror those drawn for it.

    Args:
        x: images (n, channels, height, width).
        draws: (3, n), from :func:`draw_crops`, on the device of x.
        border: value of the border, (channels,) or (1,), on the device of x.
        pad: width of the border in pixels.
    """
    n, channels, height, width = x.shape
    down, right, mirrored = draws
    padded = border.to(x.dtype).view(1, -1, 1, 1).expand(n, channels, height + 2 * pad, width + 2 * pad).clone()
    padded[:, :, pad : pad + height, pad : pad + width] = x
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # (n, c, 2 pad + 1, 2 pad + 1, h, w), a view
    x = crops[torch.arange(n, device=x.device), :, down, right]  # (n, c, h, w)
    return torch.where(mirrored.bool().view(n, 1, 1, 1), x.flip(-1), x)


def download(name: str, root: str | Path | None = None) -> Path:
    """Fetch a data set through torchvision, unless it is there already, and check it.

    Args:
        name: a key of :data:`SETS`.
        root: the data folder; default :func:`root`.

    Returns:
        The folder that its files lie below.

    Raises:
        UserError: an unknown name, no torchvision, no network (it says which files go where), or a damaged file.
    """
    source, folder = _source(name), _folder(root, name)
    if isinstance(source, ImageFolderSource):
        if source.state(folder) != "yes":
            raise UserError(f"{name} cannot be downloaded from here; {source.remedy(folder)}")
        return folder
    if name != "digits" and not all(_find(folder / path) for path in source.files):
        try:
            from torchvision import datasets

            {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[name](folder, download=True)
        except (ImportError, OSError, RuntimeError) as error:
            raise UserError(f"{name} could not be downloaded ({_line(error)}); {_by_hand(name, folder)}") from error
    _verified(name, root)
    return folder


def describe(root: str | Path | None = None) -> "pd.DataFrame":
    """One row a data set: ``name``, ``present``, ``where``, ``images``.

    ``present`` is yes, no, incomplete or damaged; every md5 is computed for it, and the images of ImageNet are counted.

    Args:
        root: the data folder; default :func:`root`.
    """
    import pandas as pd

    rows = [(name, *_state(name, root), source.images) for name, source in SETS.items()]
    return pd.DataFrame(rows, columns=["name", "present", "where", "images"])


def _source(name: str) -> Source | ImageFolderSource:
    if name not in SETS:
        raise UserError(f"unknown data set {name!r}; known: {', '.join(SETS)}")
    return SETS[name]


def _folder(root: str | Path | None, name: str = "") -> Path:
    """What ``Source.files`` are below: the data folder; for digits scikit-learn's package (importing it takes 2 s)."""
    if name != "digits":
        return (ROOT / Path(root or os.environ.get("FA_DATA") or "data").expanduser()).resolve()
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
    for path, md5 in _source(name).files.items():
        if (found := _find(folder / path)) is None:
            raise UserError(f"data set {name}: {folder / path} is not there; {_remedy(name, folder)}")
        try:
            content = found.read_bytes() if found.suffix != ".gz" else gzip.decompress(found.read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(
                f"data set {name}: {found} cannot be read ({_line(error)}); remove it, then {_remedy(name, folder)}"
            ) from error
        if (own := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
            raise UserError(
                f"data set {name}: {found} is not the published file (md5 {own}, not {md5}); remove it, "
                f"then {_remedy(name, folder)}"
            )
        contents.append(content)
    return contents


def _state(name: str, root: str | Path | None) -> tuple[str, str]:
    """In a word, whether a data set can be loaded, and the folder of its files."""
    if isinstance(album := SETS[name], ImageFolderSource):
        folder = _folder(root)
        return album.state(folder), str(folder / album.folder)
    try:
        folder = _folder(root, name)
        found = [_find(folder / path) is not None for path in _source(name).files]
        where = str((folder / next(iter(SETS[name].files))).parent)
        if not all(found):
            return "incomplete" if any(found) else "no", where
    except UserError:
        return "no", ""
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
