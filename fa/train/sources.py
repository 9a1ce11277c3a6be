"""The data sets: their published files with checksums, how these are parsed and split, and the constants of the
normalisation.

:mod:`fa.train.data` documents them, finds and checks the files, and loads them.
"""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fa.train.photos import ImageFolderSource

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]  # split -> images (n, [channels,] height, width) uint8, labels (n,)


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
        pad: largest shift of a training image in pixels, where a recipe augments (default 4: p3's, for 32x32).
        margin: pixels of the files' images that are cut off on each side (default 0). A shifted image shows them;
            otherwise the border is black.
        train: number of training images, for plans made where the files are not (default 45,000: CIFAR-10's).
    """

    images: str
    classes: int
    top: float
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    files: dict[str, str]
    parse: Callable[[list[bytes]], Arrays]
    pad: int = 4
    margin: int = 0
    train: int = 45_000

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

    whole = _cifar10(files).items()  # x (n, 3, 32, 32) uint8 -> (n, 3, 16, 16); quarters of whole numbers are exact
    return {split: (x.reshape(-1, 3, 16, 2, 16, 2).mean((3, 5), dtype=np.float32), y) for split, (x, y) in whole}


DIGITS = {"datasets/data/digits.csv": "a0339c30a8a5312a1b6f9e5c719dcce5"}
MNIST = {
    "MNIST/raw/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "MNIST/raw/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "MNIST/raw/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "MNIST/raw/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
CIFAR10 = {
    "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
    "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
    "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
}
"""Path below the data folder -> md5 of the contents."""

GREY, RGB = ((0.1307,), (0.3081,)), ((0.4914, 0.4821, 0.4465), (0.2470, 0.2435, 0.2616))  # p3's (mean, sd)

SETS: dict[str, Source | ImageFolderSource] = {
    "digits": Source("8x8 grey: 1,437 train, 360 test", 10, 16, (0.3052,), (0.3760,), DIGITS, _digits, train=1437),
    "mnist": Source("28x28 grey: 60,000 train, 10,000 test", 10, 255, *GREY, MNIST, _mnist, train=60_000),
    "cifar10": Source("32x32 RGB: 45,000 train, 5,000 validation, 10,000 test", 10, 255, *RGB, CIFAR10, _cifar10),
    "cifar10-16": Source("16x16 RGB: means of 2x2 pixels of cifar10", 10, 255, *RGB, CIFAR10, _cifar10_16, 2),
    "cifar10-24": Source("24x24 RGB: crops of cifar10", 10, 255, *RGB, CIFAR10, _cifar10, margin=4),
    "imagenet": ImageFolderSource("ILSVRC 2012 photographs: 1,281,167 train, 50,000 validation", 1000, "imagenet",
                                  {"train": 1_281_167, "val": 50_000}),
    "tiny-imagenet-20": ImageFolderSource("64x64 photographs: 2,000 train, 500 validation", 20, "tiny-imagenet-20",
                                          {"train": 2000, "val": 500}, size=32,
                                          sha256="85687d6c5c1b3d7cc2ae9beb6c663187236ffd8c0451e41057c2202762a8a7da"),
}  # fmt: skip
"""Name -> :class:`Source`, or of photographs on disk :class:`fa.train.photos.ImageFolderSource`, of every data set
that :func:`fa.train.data.load` knows.
"""
