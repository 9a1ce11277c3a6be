"""Data sets: parsed, checked, split and normalised right; refused in one sentence when a file is missing or wrong."""

import builtins
import gzip
import hashlib
import os
import pickle
import random
import re
import shutil
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fa.errors import UserError
from fa.layers.feedback import generator
from fa.paths import ROOT
from fa.train import data, sources
from fa.train.config import Config
from fa.train.step import Stepper, make_optimizer


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def place(folder: Path, name: str, contents: list[bytes], monkeypatch) -> list[Path]:
    """Write these contents as the files of a data set, and have their checksums expected."""
    source = data.SETS[name]
    paths = [folder / path for path in source.files]
    for path, content in zip(paths, contents, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setitem(data.SETS, name, replace(source, files=dict(zip(source.files, map(md5, contents)))))
    return paths


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """Seven training and three test images in MNIST's format -> (folder, paths, arrays)."""
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 256, (7, 28, 28), np.uint8),
        rng.integers(0, 10, 7, np.uint8),
        rng.integers(0, 256, (3, 28, 28), np.uint8),
        rng.integers(0, 10, 3, np.uint8),
    ]
    return tmp_path, place(tmp_path, "mnist", [idx(a) for a in arrays], monkeypatch), arrays


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """Six batches of ten images in CIFAR-10's format -> (folder, paths, pixels, labels)."""
    rng = np.random.default_rng(1)
    pixels, labels = rng.integers(0, 256, (6, 10, 3072), np.uint8), rng.integers(0, 10, (6, 10))
    contents = [pickle.dumps({b"data": x, b"labels": y.tolist()}) for x, y in zip(pixels, labels)]
    paths = place(tmp_path, "cifar10", contents, monkeypatch)
    return tmp_path, paths, pixels.reshape(60, 3, 32, 32), labels.reshape(60)


# ---- where


def test_root_is_the_repository_s_data_folder_or_fa_data(monkeypatch, tmp_path):
    monkeypatch.delenv("FA_DATA", raising=False)
    assert data.root() == ROOT / "data"
    monkeypatch.setenv("FA_DATA", "")
    assert data.root() == ROOT / "data"
    monkeypatch.setenv("FA_DATA", str(tmp_path))
    assert data.root() == tmp_path.resolve()


def test_relative_root_is_taken_from_the_repository(monkeypatch, small_mnist):
    folder, _, _ = small_mnist
    relative = os.path.relpath(folder.resolve(), ROOT)
    for working in (folder, ROOT, "/"):
        monkeypatch.chdir(working)
        monkeypatch.setenv("FA_DATA", relative)
        assert data.root() == folder.resolve()
        assert len(data.load("mnist").train) == 7
        monkeypatch.setenv("FA_DATA", "not-there")
        assert data.root() == ROOT / "not-there"
        assert len(data.load("mnist", root=relative).train) == 7


# ---- digits


def test_digits_are_scikit_learn_s():
    datasets = pytest.importorskip("sklearn.datasets")
    whole = datasets.load_digits()
    held = random.Random(0).sample(range(1797), 360)
    d = data.load("digits", dtype=torch.float64)
    assert (d.name, d.classes, d.val) == ("digits", 10, None)
    assert d.train.x.shape == (1437, 1, 8, 8) and d.test.x.shape == (360, 1, 8, 8) and len(d.test) == 360
    source = data.SETS["digits"]
    pixels = (d.test.x * source.sd[0] + source.mean[0]) * 16
    assert np.allclose(pixels.squeeze(1), whole.images[held], atol=1e-9)
    assert np.array_equal(d.test.y, whole.target[held])
    assert np.array_equal(d.train.y, np.delete(whole.target, held))


def test_digits_normalisation_is_the_training_split_s():
    x = data.load("digits", dtype=torch.float64).train.x
    source = data.SETS["digits"]
    assert x.mean().item() * source.sd[0] == pytest.approx(0, abs=5e-5)  # the constants are right to 4 digits
    assert x.std(correction=0).item() * source.sd[0] == pytest.approx(source.sd[0], abs=5e-5)


def test_splits_never_change():
    """Pinned: another split would be another data set under every record that is committed."""
    pins = {(1797, 360): "7d1b5e3bf691eb04eba3e1d769a8bc75", (50000, 5000): "4dc11defda8279c3d3a6a162bd17a8d6"}
    for (n, k), pin in pins.items():
        held, kept = sources._held_out(n, k)
        assert md5(np.array(held, "<i4").tobytes()) == pin
        assert sorted([*held, *kept]) == list(range(n))
        state = random.getstate()
        random.seed(0)
        assert held == random.sample(range(n), k)  # as the authors write it
        random.setstate(state)


def test_loading_is_deterministic_and_leaves_the_global_generators_alone():
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    a, b = data.load("digits"), data.load("digits")
    assert torch.equal(a.train.x, b.train.x) and torch.equal(a.test.y, b.test.y)
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])


def test_types_and_frozenness():
    d = data.load("digits")
    assert d.train.x.dtype == torch.float32 and d.train.y.dtype == torch.int64 and d.train.x.is_contiguous()
    with pytest.raises(FrozenInstanceError):
        d.train.x = None
    exact, half = data.load("digits", dtype=torch.float64).test.x, data.load("digits", dtype=torch.bfloat16).test.x
    assert exact.dtype == torch.float64 and torch.allclose(exact, d.test.x.double(), rtol=0, atol=1e-6)
    assert torch.equal(half, d.test.x.bfloat16())  # computed in float32, rounded once


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_device():
    d = data.load("digits", device="cuda")
    assert d.train.x.is_cuda and d.train.y.is_cuda
    assert torch.allclose(d.train.x.cpu(), data.load("digits").train.x, rtol=0, atol=1e-6)
    g = [torch.Generator().manual_seed(1) for _ in range(2)]
    x = d.train.x[:64]
    assert torch.equal(augmented(x, g[0], 2, (0.0,)).cpu(), augmented(x.cpu(), g[1], 2, (0.0,)))


def test_digits_without_scikit_learn(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        data.load("digits")
    assert set(data.describe(root=tmp_path).present) == {"no"}


# ---- the files of MNIST and CIFAR-10


def normalised(pixels: np.ndarray, name: str) -> torch.Tensor:
    source = data.SETS[name]
    mean, sd = (np.array(v).reshape(-1, 1, 1) for v in (source.mean, source.sd))
    return torch.from_numpy((pixels.reshape(len(pixels), len(source.mean), *pixels.shape[-2:]) / 255 - mean) / sd)


def test_mnist_is_parsed(small_mnist):
    folder, _, (x, y, x_test, y_test) = small_mnist
    d = data.load("mnist", root=folder)
    assert d.val is None and d.train.x.shape == (7, 1, 28, 28)
    for split, pixels, labels in ((d.train, x, y), (d.test, x_test, y_test)):
        assert torch.allclose(split.x.double(), normalised(pixels, "mnist"), atol=1e-6)
        assert split.y.tolist() == labels.tolist()


def test_mnist_is_read_from_gz(small_mnist):
    folder, paths, (x, *_) = small_mnist
    for path in paths:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert torch.allclose(data.load("mnist", root=folder).train.x.double(), normalised(x, "mnist"), atol=1e-6)
    packed = paths[0].with_name(paths[0].name + ".gz")
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(UserError, match="not the published file"):
        data.load("mnist", root=folder)
    packed.write_bytes(b"no gzip")
    with pytest.raises(UserError, match="not the published file"):
        data.load("mnist", root=folder)


def test_cifar_is_parsed_and_split_as_the_authors_do(small_cifar):
    folder, _, x, y = small_cifar
    d = data.load("cifar10", root=folder)
    held = random.Random(0).sample(range(50), 5)
    for split, pixels, labels in (
        (d.train, np.delete(x[:50], held, 0), np.delete(y[:50], held)),
        (d.val, x[:50][held], y[:50][held]),
        (d.test, x[50:], y[50:]),
    ):
        assert torch.allclose(split.x.double(), normalised(pixels, "cifar10"), atol=1e-6)
        assert split.y.tolist() == labels.tolist()
    black = torch.tensor(data.SETS["cifar10"].black)
    assert torch.allclose(black.double().view(3, 1, 1), normalised(np.zeros((1, 3, 1, 1)), "cifar10")[0], atol=1e-6)


class Malicious:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return builtins.open, (str(self.path), "w")


@pytest.mark.parametrize("which", [0, 5])
def test_a_pickle_with_a_wrong_checksum_is_never_opened(small_cifar, monkeypatch, which):
    folder, paths, *_ = small_cifar
    trap = folder / "trap"
    content = pickle.dumps(Malicious(trap))
    opened = []
    monkeypatch.setattr(sources.pickle, "loads", lambda *a, **k: opened.append(a))
    paths[which].write_bytes(content)
    with pytest.raises(
        UserError, match=f"{paths[which].name} is damaged or not the published file; .*python -m fa data cifar10"
    ):
        data.load("cifar10", root=folder)
    assert not trap.exists() and not opened  # not even the sound files before it
    monkeypatch.undo()
    pickle.loads(content).close()
    assert trap.exists()  # the trap works


def test_a_changed_byte_is_noticed(small_mnist):
    folder, paths, _ = small_mnist
    for path in paths:
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{path.name} is damaged or not the published file"):
            data.load("mnist", root=folder)
        path.write_bytes(good)
    assert len(data.load("mnist", root=folder).test) == 3


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_missing_files_are_named_with_their_place(tmp_path, name):
    with pytest.raises(UserError) as caught:
        data.load(name, root=tmp_path)
    message = str(caught.value)
    assert f"python -m fa data {name}" in message and "\n" not in message
    assert all(Path(path).name in message for path in data.SETS[name].files)
    assert str(tmp_path / Path(next(iter(data.SETS[name].files))).parent) in message


@pytest.mark.parametrize("function", [data.load, data.download])
def test_an_unknown_name_names_the_known(function):
    with pytest.raises(
        UserError, match="unknown data set 'minst'; did you mean 'mnist'. known: digits, mnist, cifar10"
    ):
        function("minst")


# ---- downloading and describing


def test_download_leaves_alone_what_is_there(small_mnist, monkeypatch):
    folder, paths, _ = small_mnist
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets, "MNIST", lambda *a, **k: pytest.fail("downloaded again"))
    assert data.download("mnist", root=folder) == folder.resolve()
    paths[0].write_bytes(b"other")
    with pytest.raises(UserError, match="not the published file"):
        data.download("mnist", root=folder)


def test_download_fetches_and_checks(small_mnist, monkeypatch):
    folder, paths, _ = small_mnist
    datasets = pytest.importorskip("torchvision.datasets")
    content = paths[3].read_bytes()
    paths[3].unlink()
    asked = []

    def fetch(root, download):
        asked.append((root, download))
        paths[3].write_bytes(content)

    monkeypatch.setattr(datasets, "MNIST", fetch)
    data.download("mnist", root=folder)
    assert asked == [(folder.resolve(), True)]
    paths[3].unlink()
    content = b"something else"
    with pytest.raises(UserError, match="not the published file"):
        data.download("mnist", root=folder)


@pytest.mark.parametrize("error", [OSError("<urlopen error no route>"), RuntimeError("no file x:\nmany lines")])
def test_download_without_a_network_says_which_file_goes_where(tmp_path, monkeypatch, error):
    datasets = pytest.importorskip("torchvision.datasets")

    def fetch(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "CIFAR10", fetch)
    with pytest.raises(UserError) as caught:
        data.download("cifar10", root=tmp_path)
    message = str(caught.value)
    assert "could not be downloaded" in message and "\n" not in message
    assert "data_batch_1" in message and str(tmp_path / "cifar-10-batches-py") in message


def test_describe(small_mnist):
    folder, paths, _ = small_mnist
    table = data.describe(root=folder).set_index("name")
    assert list(table.columns) == ["present", "where", "images"] and list(table.index) == list(data.SETS)
    assert table.present.to_dict() == {
        "digits": "yes",
        "mnist": "yes",
        "cifar10": "no",
        "cifar10-16": "no",
        "cifar10-24": "no",
        "imagenet": "no",
        "tiny-imagenet-20": "no",
    }
    assert table["where"]["cifar10"] == str(folder.resolve() / "cifar-10-batches-py")
    paths[0].write_bytes(b"other")
    assert data.describe(root=folder).set_index("name").present["mnist"] == "damaged"
    paths[0].unlink()
    assert data.describe(root=folder).set_index("name").present["mnist"] == "damaged"


# ---- augmentation


def augmented(x, generator, pad=4, fill=None):
    """A batch cropped and mirrored as the trainer does it; the border is black in normalised CIFAR-10, or ``fill``."""
    border = torch.tensor(data.SETS["cifar10"].black if fill is None else fill, device=x.device)
    return data.crop(x, data.draw_crops(len(x), generator, pad).to(x.device), border, pad)


def one_by_one(x, down, right, mirrored, pad, fill):
    """The same, an image at a time: pad with fill, cut, mirror."""
    out = []
    for image, d, r, m in zip(x.numpy(), down, right, mirrored):
        padded = np.stack([np.pad(channel, pad, constant_values=f) for channel, f in zip(image, fill)])
        cut = padded[:, d : d + image.shape[1], r : r + image.shape[2]]
        out.append(cut[:, :, ::-1] if m else cut)
    return torch.from_numpy(np.stack(out))


@pytest.mark.parametrize("shape, pad", [((40, 3, 32, 32), 4), ((9, 3, 8, 12), 2), ((5, 3, 6, 6), 0), ((0, 3, 8, 8), 4)])
def test_augmentation_equals_the_per_image_reference(shape, pad):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    kept = x.clone()
    g = torch.Generator().manual_seed(7)
    down, right = torch.randint(2 * pad + 1, (2, len(x)), generator=g)
    mirrored = torch.randint(2, (len(x),), generator=g)
    made = augmented(x, torch.Generator().manual_seed(7), pad)
    assert made.shape == x.shape and torch.equal(x, kept)
    if len(x):
        assert torch.equal(made, one_by_one(x, down, right, mirrored, pad, np.float32(data.SETS["cifar10"].black)))


def test_crops_of_24_show_the_images_own_pixels(small_cifar, monkeypatch):
    """Training: a window of 24x24 anywhere in the 32x32 pixels, mirrored or not; evaluation: the middle."""
    folder, *_ = small_cifar
    monkeypatch.setitem(data.SETS, "cifar10-24", replace(data.SETS["cifar10-24"], files=data.SETS["cifar10"].files))
    whole, d = data.load("cifar10", root=folder), data.load("cifar10-24", root=folder)
    assert d.shape == (3, 24, 24) and d.train.x.shape[2:] == (32, 32) and torch.equal(d.train.x, whole.train.x)
    assert torch.equal(d.test.first(4)[0], whole.test.x[:4, :, 4:28, 4:28])
    assert torch.equal(torch.cat([x for x, _ in d.val.batches(2)]), whole.val.x[:, :, 4:28, 4:28])
    draws = data.draw_crops(45, torch.Generator().manual_seed(3))
    source = data.SETS["cifar10-24"]
    made = data.crop(d.train.x, draws, torch.tensor(source.black), source.pad, d.train.margin)
    for image, crop, (down, right, mirrored) in zip(whole.train.x, made, draws.T.tolist()):
        window = image[:, down : down + 24, right : right + 24]
        assert torch.equal(crop, window.flip(-1) if mirrored else window)
    assert {0, 8} <= set(draws[:2].flatten().tolist()) <= set(range(9))


def test_the_trainer_crops_where_it_augments_and_takes_the_middle_else(small_cifar, monkeypatch):
    monkeypatch.setitem(data.SETS, "cifar10-24", replace(data.SETS["cifar10-24"], files=data.SETS["cifar10"].files))
    d, seen = data.load("cifar10-24", root=small_cifar[0]), []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(3 * 24 * 24, 10)

        def forward(self, x):
            seen.append(x)
            return self.fc(x.flatten(1))

    for augment in (False, True):
        config, net = Config("bp", 0, dataset="cifar10-24", batch=9, lr=0.0, augment=augment), Net()
        Stepper(net, make_optimizer(net, config), config, d.train).epoch(0)
        shown = torch.cat(seen)  # (45, 3, 24, 24)
        order = torch.randperm(45, generator=generator(0, "order", 0))
        want = d.train.middle(d.train.x)[order]
        if augment:
            draws = data.draw_crops(45, generator(0, "augment", 0))
            want = data.crop(d.train.x[order], draws, torch.tensor(data.SETS["cifar10-24"].black), 4, 4)
        assert torch.equal(shown, want)
        seen.clear()


def test_augmentation_draws_every_shift_and_both_mirrorings_for_each_image():
    """A picture of its own coordinates: every one of 9 x 9 x 2 views turns up, none much more often than another."""
    n = 20_000
    x = torch.arange(1.0, 65).view(1, 1, 8, 8).expand(n, 1, 8, 8)
    made = augmented(x, torch.Generator().manual_seed(0), fill=(0.0,))
    views, counts = made.flatten(1).unique(dim=0, return_counts=True)
    assert len(views) == 9 * 9 * 2
    expected = n / 162
    assert ((counts - expected) ** 2 / expected).sum() < 161 + 5 * (2 * 161) ** 0.5  # chi square, 5 sd


def test_augmentation_depends_on_the_generator_alone():
    x = torch.randn(16, 3, 32, 32)
    a, b = (torch.Generator().manual_seed(2) for _ in range(2))
    first = augmented(x, a)
    torch.manual_seed(99)
    assert torch.equal(first, augmented(x, b))
    assert not torch.equal(first, augmented(x, a))  # the generator has moved on
    assert torch.equal(augmented(x, a), (augmented(x, b), augmented(x, b))[1])


# ---- photographs on disk


@pytest.fixture
def album(tmp_path, monkeypatch):
    """An album of three classes, 4 + 2 photographs each of 20x14 and 14x20 pixels, all of different colours ->
    (folder, name)."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    rng = np.random.default_rng(0)
    for split, n in (("train", 4), ("val", 2)):
        for c in ("n03", "n01", "n02"):
            (tmp_path / "photos" / split / c).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (14, 20, 3) if i % 2 else (20, 14, 3), np.uint8)
                image.fromarray(pixels).save(tmp_path / "photos" / split / c / f"{c}_{i}.JPEG")
    made = data.ImageFolderSource("twelve", 3, "photos", {"train": 12, "val": 6}, size=8)
    monkeypatch.setitem(data.SETS, "album", made)
    return tmp_path, "album"


def test_photos_are_what_torchvision_makes_of_them(album):
    """Every image of a split once, with the class that ImageFolder gives it: scaled, cut from the middle,
    normalised."""
    folder, name = album
    from torchvision import datasets, transforms

    d = data.load(name, root=folder)
    assert (d.classes, d.test, d.shape, len(d.train), len(d.val)) == (3, None, (3, 8, 8), 12, 6)
    steps = [
        transforms.Resize(9),
        transforms.CenterCrop(8),
        transforms.ToTensor(),
        transforms.Normalize(data.SETS[name].mean, data.SETS[name].sd),
    ]
    for split, part in ((d.train, "train"), (d.val, "val")):
        theirs = datasets.ImageFolder(folder / "photos" / part, transforms.Compose(steps))
        expected = {theirs.imgs[i][0]: theirs[i] for i in range(len(theirs))}
        x, y = split.first(100)
        assert len(x) == len(expected) and x.dtype == torch.float32 and y.dtype == torch.int64
        for path, image, label in zip(split.paths, x, y):
            assert label == expected[path.decode()][1]
            assert torch.allclose(image, expected[path.decode()][0], atol=1e-6)
        batches = list(split.batches(5))
        assert [len(y) for _, y in batches] == [5] * (len(x) // 5) + [len(x) % 5]
        assert torch.equal(torch.cat([x for x, _ in batches]), x) and torch.equal(torch.cat([y for _, y in batches]), y)
    assert d.train.first(100)[1].tolist() != sorted(d.train.first(100)[1].tolist())  # the first are not one class


def test_a_crop_depends_on_seed_epoch_and_image_alone(album):
    folder, name = album
    train = data.load(name, root=folder).train
    index = torch.randperm(12, generator=torch.Generator().manual_seed(1)).view(3, 4)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()

    def views(seed=0, epoch=0, index=index, augment=True):
        """Number of an image -> what was served for it."""
        served = list(train.feed(index, seed, epoch, augment))
        assert [tuple(x.shape) for x, _ in served] == [(index.shape[1], 3, 8, 8)] * len(index)
        labels = torch.cat([y for _, y in served])
        assert labels.tolist() == train.labels[index.flatten()].tolist()
        return dict(zip(index.flatten().tolist(), torch.cat([x for x, _ in served])))

    def same(a, b):
        return [torch.equal(a[i], b[i]) for i in a]

    first = views()
    torch.manual_seed(4)
    assert all(same(first, views(index=torch.arange(12).view(2, 6))))  # another order, another batch
    assert not any(same(first, views(epoch=1))) and not any(same(first, views(seed=1)))
    plain, whole = views(augment=False), train.first(12)[0]
    assert all(torch.equal(plain[i], whole[i]) for i in plain) and not any(same(first, plain))
    torch.manual_seed(3)
    views()
    assert torch.equal(before, torch.random.get_rng_state())  # the global generator is given back
    source = data.SETS[name]
    with_workers = data.DiskSplit(source, folder, "train", workers=2)
    served = torch.cat([x for x, _ in with_workers.feed(index, 0, 0, True)])
    assert all(torch.equal(x, first[i]) for i, x in zip(index.flatten().tolist(), served))


def test_half_of_the_photos_are_mirrored_and_all_are_cropped(album):
    """Under 200 epochs of one image: both mirrorings, and nearly as many different views as epochs."""
    folder, name = album
    train = data.load(name, root=folder).train
    seen = torch.stack([next(train.feed(torch.tensor([[0]]), 0, epoch, True))[0][0] for epoch in range(200)])
    assert len(seen.flatten(1).unique(dim=0)) > 190


def test_an_album_that_is_not_whole_is_refused(album, monkeypatch):
    folder, name = album
    whole = data.SETS[name]
    with pytest.raises(
        UserError,
        match=r"nowhere.photos is not there; put 12 images into .*photos.train and 6 images into .*a folder for each of 3",
    ):
        data.load(name, root=folder / "nowhere")
    assert whole.state(folder) == "yes" and data.download(name, root=folder) == folder.resolve()
    monkeypatch.setitem(data.SETS, name, replace(whole, sha256="0" * 64))
    with pytest.raises(UserError, match="is damaged or not whole"):
        data.load(name, root=folder)
    monkeypatch.setitem(data.SETS, name, replace(whole, sha256=whole.digest(folder)))
    assert len(data.load(name, root=folder).train) == 12
    next((folder / "photos" / "train" / "n01").iterdir()).unlink()
    with pytest.raises(UserError, match="is damaged or not whole; put 12 images into"):
        data.load(name, root=folder)
    assert data.describe(root=folder).set_index("name").present[name] == "damaged"


def test_a_digest_is_of_the_names_of_classes_and_files(album, tmp_path):
    """Wherever they lie; and of a set that is not of photographs it is the published one, once its file is checked."""
    folder, name = album
    whole, there = data.digest(name, folder), shutil.copytree(folder / "photos", tmp_path / "there" / "photos").parent
    assert re.fullmatch("[0-9a-f]{12}", whole) and data.digest(name, there) == whole
    for old, new in (
        (there / "photos" / "train" / "n01", "n00"),
        (next((there / "photos/val/n01").iterdir()), "z.jpeg"),
    ):
        other = old.rename(old.with_name(new))
        assert data.digest(name, there) != whole
        other.rename(old)
    assert data.digest(name, there) == whole != data.digest("digits")
    with pytest.raises(UserError, match="is not there; put 12 images into"):
        data.digest(name, tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not there; `python -m fa data mnist` downloads it"):
        data.digest("mnist", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_A32_a_data_folder_that_cannot_be_made_is_named(tmp_path, name):
    pytest.importorskip("torchvision")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/x cannot be written .*; set FA_DATA to another folder"):
        data.download(name, root=tmp_path / "file" / "x")


@pytest.mark.parametrize("name", ["imagenet", "tiny-imagenet-20"])
def test_photographs_are_not_downloaded(tmp_path, name):
    with pytest.raises(
        UserError, match=f"{name} cannot be downloaded: .* is not there; put .* images into .*{name}.train and"
    ):
        data.download(name, root=tmp_path)


def test_tiny_imagenet_20_where_it_is():
    """Its sha256 is the one that its own page says, and the means are roughly ImageNet's."""
    if data.SETS["tiny-imagenet-20"].state(data.root()) == "no":
        pytest.skip(f"tiny-imagenet-20 is not in {data.root()}")
    pytest.importorskip("torchvision")
    d = data.load("tiny-imagenet-20")
    x, y = d.val.first(500)
    assert d.shape == (3, 32, 32) and torch.bincount(y).tolist() == [25] * 20
    assert x.mean((0, 2, 3)).abs().max() < 0.3 and (x.std((0, 2, 3)) - 1).abs().max() < 0.3


# ---- the real files, where they are


@pytest.mark.parametrize(
    "name, sizes, channels, first",
    [("mnist", (60000, 0, 10000), 1, [5, 0, 4, 1, 9]), ("cifar10", (45000, 5000, 10000), 3, [6, 9, 9, 4, 1])],
)
def test_real_data(name, sizes, channels, first):
    """Counts, mean and spread are those published; some test images equal torchvision's to the bit."""
    source = data.SETS[name]
    if not any(data._find(data.root() / path) for path in source.files):
        pytest.skip(f"{name} is not in {data.root()}")
    d = data.load(name)
    splits = [split for split in (d.train, d.val, d.test) if split is not None]
    assert [len(split) for split in splits] == [n for n in sizes if n]
    for split in splits:
        assert len(split.x) == len(split.y) and split.x.shape[1] == channels and set(split.y.tolist()) == set(range(10))
    assert d.train.x.mean((0, 2, 3)).abs().max() < 2e-3 and (d.train.x.std((0, 2, 3)) - 1).abs().max() < 2e-3
    assert d.train.y[:5].tolist() == first

    torchvision = pytest.importorskip("torchvision")
    steps = torchvision.transforms
    theirs = {"mnist": torchvision.datasets.MNIST, "cifar10": torchvision.datasets.CIFAR10}[name](
        data.root(), train=False, transform=steps.Compose([steps.ToTensor(), steps.Normalize(source.mean, source.sd)])
    )
    for i in range(0, 10000, 997):
        x, y = theirs[i]
        assert torch.equal(d.test.x[i], x) and d.test.y[i] == y
