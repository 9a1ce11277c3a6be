"""Killed anywhere, or on a full disk, a campaign ends with the record of an undisturbed one; a job whose worker is
killed is done by another. ``python tests/harness.py`` says what became of each kill."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from pathlib import Path

import harness
import pytest

import fa
from fa.results import executors


@pytest.fixture(scope="module")
def lives() -> Iterator[harness.Harness]:
    with harness.harness() as made:
        yield made


def test_killed_at_a_write(lives: harness.Harness) -> None:
    """At every seventh operation on the disk, in checkpoint, table, status, record and merge."""
    wrong = {k: said for k in range(1, lives.operations + 1, 7) if (said := lives.killed_at(k))}
    assert not wrong and lives.operations > 35


@pytest.mark.slow
def test_killed_at_a_random_moment_alone_and_in_pairs(lives: harness.Harness) -> None:
    a, b, c, d = lives.moments(4)
    assert not lives.killed_after(a) and not lives.killed_after(b) and not lives.killed_after(c, d)


@pytest.mark.slow
def test_a_disk_that_is_full_from_a_write_on(lives: harness.Harness) -> None:
    """One sentence, status 2, and the last good state: with room again, the campaign goes on."""
    assert not {k: said for k in range(3, lives.operations + 1, 9) if (said := lives.full_at(k))}


@pytest.mark.slow
def test_killed_at_every_write_and_at_fifty_random_moments(capsys: pytest.CaptureFixture[str]) -> None:
    status = harness.main(["50"])
    assert status == 0, capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ a small disk


COMMAND = "run p3_fig2 --mode quick --rules fa --seeds 1 --epochs 1 --workers 1 --device cpu".split()


def fa_(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fa", *arguments]
    return subprocess.run(command, cwd=fa.ROOT, env=os.environ | env, capture_output=True, text=True)


def test_a_file_that_may_grow_no_further(tmp_path: Path) -> None:
    """The system's own limit, as of a quota: what it cannot hold is not there, in part either."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400)); import sys; from fa.__main__ import main; sys.exit(main({COMMAND}))"
    env = os.environ | {"FA_RUNS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=fa.ROOT, env=env, capture_output=True, text=True)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 400
    told = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and told.startswith("fa: ") and "cannot be written (File too large)" in told
    assert "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} <= {"config.json", "lock", "progress.csv"}


@pytest.mark.slow
def test_a_small_file_system_that_fills_up(tmp_path: Path) -> None:
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path]).returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        (tmp_path / "filler").write_bytes(bytes(52 << 10))
        done = fa_(*COMMAND, FA_RUNS=str(tmp_path))
        told = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and "cannot be written (No space left on device)" in told, done.stderr
        assert "Traceback" not in done.stderr and not list(tmp_path.rglob("*.part"))
        (tmp_path / "filler").unlink()
        assert "1 of 1 runs are finished" in fa_(*COMMAND, FA_RUNS=str(tmp_path)).stdout
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# ----------------------------------------------------------------------------------------------------- dying workers


class Worker(Executor):
    """Does a job at once, or dies of it."""

    def __init__(self, deadly: list[str]) -> None:
        self.deadly = deadly

    def submit(self, fn, /, *args, **kwargs) -> Future:
        future: Future = Future()
        if "idle" in self.deadly:
            self.deadly.remove("idle")
            raise BrokenExecutor("A child process terminated abruptly")
        if args[0] in self.deadly:
            self.deadly.remove(args[0])
            future.set_exception(BrokenExecutor("terminated abruptly"))
        else:
            future.set_result(fn(*args))
        return future


@pytest.mark.parametrize(
    "deadly, done, again",
    [
        (["idle"], "abc", ""),  # killed while it had nothing to do
        (["b"], "abc", "b"),
        (["b", "b"], "ac", "b"),  # the second attempt is the last one
        (["a", "b", "idle"], "abc", "ab"),
    ],
)
def test_a_job_is_taken_up_by_another_worker(deadly: list[str], done: str, again: str) -> None:
    said, ended = [], {}
    new = lambda: Worker(deadly)  # noqa: E731
    for job, result, why in executors.each(str.upper, "abc", new, 2, 2, lambda job, why: said.append((job, why))):
        ended[job] = result or why
    assert ended == {job: job.upper() if job in done else "it was killed" for job in "abc"}
    assert sorted(said) == [(job, "it was killed") for job in again]


def test_jobs_that_their_scheduler_cancels_end_in_a_sentence() -> None:
    class Gone(Worker):
        def submit(self, fn, /, *args, **kwargs) -> Future:
            future: Future = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future

    with pytest.raises(fa.UserError, match="their scheduler went away; finished runs are kept"):
        list(executors.each(str.upper, "abc", lambda: Gone([]), 2))


def test_workers_that_cannot_even_start_end_in_a_sentence() -> None:
    with pytest.raises(fa.UserError, match="killed as they start"):
        list(executors.each(str.upper, "abc", lambda: Worker(["idle"]), 1))
