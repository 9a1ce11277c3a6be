"""What a disk, a crash or a hand has damaged: a sentence, no code run, and the checkpoint before it where there is
one."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_train import TINY

import fa
from fa import __main__ as command
from fa import citations, experiments
from fa.paths import read_csv, read_json
from fa.results import claims, records
from fa.results.store import CHECKPOINTS, RunFolder, locked, read_sidecar
from fa.train import loop, photos


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FA_BUILD", str(tmp_path / "build"))
    return tmp_path


def checked(payload: bytes) -> bytes:
    """A checkpoint whose checksum is right."""
    return hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.mark,)


@pytest.mark.parametrize("wrap", [lambda h: h, lambda h: {"epoch": 1, "rows": [h], "net": {}, "optimizer": {}}])
def test_a_hostile_checkpoint_runs_nothing(store: Path, wrap) -> None:
    folder, mark = RunFolder(TINY), store / "ran"
    folder.save({"epoch": 0})
    folder.path.joinpath("checkpoint.pt").write_bytes(checked(pickled(wrap(Hostile(mark)))))
    with pytest.raises(fa.UserError, match="checkpoint.pt is no checkpoint .UnpicklingError.*delete"):
        loop.train(TINY, folder=folder)
    assert not mark.exists()


@pytest.mark.parametrize("value", [5, {}, {"epoch": "1"}, {"epoch": 1}, {"epoch": 1, "net": {}, "optimizer": {}}])
def test_a_checkpoint_of_another_kind_is_a_sentence(value: object) -> None:
    folder = RunFolder(TINY)
    folder.save({"epoch": 0})
    folder.path.joinpath("checkpoint.pt").write_bytes(checked(pickled(value)))
    with pytest.raises(fa.UserError, match="is no checkpoint|of another run"):
        loop.train(TINY, folder=folder)


def test_the_checkpoint_before_a_damaged_one_is_used(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    config = replace(TINY, epochs=3)
    want, folder, begun = loop.train(config), RunFolder(config), []
    real = loop.Stepper.begin
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", -1.0)
    monkeypatch.setattr(loop.Stepper, "begin", lambda self, epoch: begun.append(epoch) or real(self, epoch))
    loop.train(config, folder=folder)
    whole = {name: (folder.path / name).read_bytes() for name in CHECKPOINTS}
    for damaged in (b"", whole["checkpoint.pt"][:-9], checked(b"not a pickle")):
        (folder.path / "checkpoint.pt").write_bytes(damaged)
        (folder.path / "checkpoint.old.pt").write_bytes(whole["checkpoint.old.pt"])
        begun.clear()
        pd.testing.assert_frame_equal(loop.train(config, folder=folder), want, check_exact=True)
        assert begun == [1, 2] and "goes on from the checkpoint before it" in capsys.readouterr().err


def test_a_table_of_a_run_has_a_checksum(store: Path) -> None:
    config = replace(TINY, epochs=1)
    folder, table = RunFolder(config), loop.train(config)
    folder.finish(table, table.attrs["status"])
    path = folder.path / "metrics.csv"
    content = path.read_text()
    path.write_text(content.replace("train_loss,", "train_loss,1"))
    with pytest.raises(
        fa.UserError, match="metrics.csv does not match its checksum; delete .* to train that run again"
    ):
        folder.table()
    path.write_text(content)
    assert len(folder.table()) == len(table)


@pytest.fixture
def finished(store: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Path:
    """A run store with one run, and its quick record."""
    config = replace(TINY, rule="bp", options="", epochs=1)
    monkeypatch.setattr(experiments, "plan", lambda *args, **kwargs: [config])
    assert command.main(["run", "p3_fig2", "--mode", "quick", "--workers", "1", "--device", "cpu"]) == 0
    assert command.main(["collect", "p3_fig2", "--mode", "quick"]) == 0
    return store


COMMANDS = (["collect", "p3_fig2"], ["run", "p3_fig2", "--dry-run"], ["run", "p3_fig2"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_files_that_are_truncated_or_flipped_are_a_sentence(data: st.DataObject, finished: Path, capsys) -> None:
    """No file of a finished run or of a record ends a command in anything but its result or a sentence."""
    paths = sorted(p for p in finished.rglob("*") if p.is_file() and p.name != "lock")
    path = data.draw(st.sampled_from(paths))
    content = path.read_bytes()
    at = data.draw(st.integers(0, max(len(content) - 1, 0)))
    how = data.draw(st.sampled_from(["cut", "flip", "garbage", "JSON"]))
    flipped = (
        content[:at] + bytes([content[at] ^ 1 << data.draw(st.integers(0, 7))]) + content[at + 1 :] if content else b"x"
    )
    damaged = {"cut": content[:at], "flip": flipped, "garbage": data.draw(st.binary(max_size=99)), "JSON": b'{"a": 1}'}
    path.write_bytes(damaged[how])
    capsys.readouterr()
    try:
        for arguments in COMMANDS:
            status = command.main([*arguments, "--mode", "quick"])
            err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fa:")]
            assert status == 2 and len(err) == 1 or status == 0 and not err
        try:
            records.read("p3_fig2", "quick")
        except fa.UserError:
            pass
    finally:
        path.write_bytes(content)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode), st.recursive(
    st.none() | st.integers() | st.text(max_size=5), lambda s: st.lists(s) | st.dictionaries(st.text(max_size=5), s)
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_readers_give_a_table_or_a_sentence(content: bytes, store: Path) -> None:
    path = store / "file"
    path.write_bytes(content)
    for reader in (read_json, read_csv, lambda p: read_json(p, sha256=str)):
        try:
            reader(path)
        except fa.UserError as error:
            assert str(path) in str(error) and "restore it" in str(error)


def test_a_table_of_claims_that_cannot_be_read(tmp_path: Path) -> None:
    for content in (b"", b"\xff\xfe,\n", b'"open'):
        (tmp_path / "p3_fig2.csv").write_bytes(content)
        with pytest.raises(fa.UserError, match="p3_fig2.csv"):
            claims.load(tmp_path)


def test_a_damaged_sidecar_names_itself(finished: Path) -> None:
    path = finished / "build" / "quick" / "p3_fig2.json"
    for content in ("", "[]", '{"sha256": 1}', path.read_text().replace('"configs"', '"confics"')):
        path.write_text(content)
        with pytest.raises(fa.UserError, match="p3_fig2.json .*(restore it|remove it)"):
            records.read("p3_fig2", "quick")


@pytest.mark.parametrize("change", [
    lambda about, run: about["status"].pop(run), lambda about, run: about["status"].update({run: {}}),
    lambda about, run: about["configs"].update({run: 5}), lambda about, run: about["environments"].append(None),
    lambda about, run: about["status"][run].update(seconds="3"),
])  # fmt: skip
def test_a_sidecar_that_lacks_a_part_of_a_run_is_a_sentence(change, store: Path) -> None:
    path, run = store / "p3_fig2.json", "0123456789ab"
    status = {run: {"state": "finished", "seconds": 1.5}}
    about = {"sha256": "", "configs": {run: {"rule": "bp"}}, "status": status, "environments": [{}]}
    path.write_text(json.dumps(about))
    assert read_sidecar(path) == about
    change(about, run)
    path.write_text(json.dumps(about))
    with pytest.raises(fa.UserError, match="p3_fig2.json is damaged: it lacks the recipe, the status or the machine"):
        read_sidecar(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b"a: [", b"title: x"])
def test_a_damaged_citation_file_is_a_sentence(content: bytes, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "CITATION.cff").write_bytes(content)
    monkeypatch.setattr(citations, "ROOT", tmp_path)
    with pytest.raises(fa.UserError, match="CITATION.cff (cannot be read|lacks)"):
        citations.citation.__wrapped__()


@pytest.fixture
def photographs(tmp_path: Path) -> photos.ImageFolderSource:
    """A set of six, in this folder, of which the last one is damaged."""
    pytest.importorskip("torchvision")
    from PIL import Image

    for i in range(6):
        path = tmp_path / "set" / "train" / "cat" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)
    path.write_bytes(b"")
    return photos.ImageFolderSource("photographs", 1, "set", {"train": 6}, size=8)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_photograph_is_a_sentence_whoever_decodes_it(workers: int, photographs, tmp_path: Path) -> None:
    with pytest.raises(fa.UserError) as caught:
        list(photos.DiskSplit(photographs, tmp_path, "train", workers=workers).batches(2))
    path = tmp_path / "set" / "train" / "cat" / "5.png"
    assert str(caught.value) == f"photograph {path} is damaged (UnidentifiedImageError); restore it"


def test_a_daemon_that_may_start_no_process_says_how_it_may(photographs, tmp_path: Path, monkeypatch) -> None:
    """So are the workers of Dask, unless they are told."""
    monkeypatch.setattr(photos, "current_process", lambda: SimpleNamespace(daemon=True))
    split = photos.DiskSplit(photographs, tmp_path, "train", workers=1)
    with pytest.raises(fa.UserError, match="for it is a daemon; .* DASK_DISTRIBUTED__WORKER__DAEMON=False dask worker"):
        list(split.batches(2))
    split.workers = 0
    with pytest.raises(fa.UserError, match="5.png is damaged"):
        list(split.batches(2))


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """It outlives by a moment the run that is killed, or for ever a loader that hangs."""
    from multiprocessing import get_context

    begun, over = get_context("fork").Event(), get_context("fork").Event()
    with locked(tmp_path / "lock", tmp_path) as mine:
        child = get_context("fork").Process(target=lambda: begun.set() or over.wait())
        child.start()
        assert mine and begun.wait(60)
        with locked(tmp_path / "lock", tmp_path, wait=False) as again:
            assert not again
    try:
        with locked(tmp_path / "lock", tmp_path, wait=False) as free:
            assert free
    finally:
        over.set()
        child.join()


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0", b"BM" + bytes(40)])
def test_a_damaged_photograph_is_named(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    import numpy as np

    path = tmp_path / "cat.jpeg"
    path.write_bytes(content)
    images = photos.DecodedImages(np.array([str(path).encode()]), np.array([0]), 8, None)
    with pytest.raises(fa.UserError, match="photograph .*cat.jpeg is damaged"):
        images[0]
