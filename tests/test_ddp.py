"""Ranks that train one run together: two gloo processes give what one process gives, and go on when one is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa
import oracles
from fa import commands
from fa.provenance import environment
from fa.results import records
from fa.results.store import RunFolder
from fa.train import data, ddp, loop, meeting
from fa.train.config import Config
from fa.train.ddp import ONE_PROCESS, Ranks


@contextmanager
def two(rank: int, folder: str) -> Iterator[None]:
    """This process is one of two."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    yield
    ddp.leave()


# ----------------------------------------------------------------------------------------------------------- gradients

OPTIONS = {"primitives": dict(amp=1e-3, null=1e-3, sparse=1e-3, decay=1e-3, self_=1e-3)}
CASES = {rule: (rule, OPTIONS.get(rule, {})) for rule in fa.RULES} | {
    "wm, noise": ("wm", dict(input="normal")),
    "ia, noise": ("ia", dict(input="uniform", activation=True)),
    "aa, sum": ("aa", dict(positions="sum", center=True)),
    "pfa, implicit": ("pfa", dict(implicit=True)),
    "pfa, sparse": ("pfa", dict(density=0.5)),
    "fa, track": ("fa", dict(norm="track")),
    "kp, clamp": ("kp", dict(clamp_forward=True)),
    "frozen, part": ("frozen", dict(every=1, part=0.5)),
    "dfa, block": ("dfa", dict(tap="block", blocks="Block")),
}
Tensors = dict[str, torch.Tensor]


class Block(nn.Sequential):
    """What ``tap="block"`` cuts."""


def steps(ranks: Ranks, name: str, dtype: torch.dtype) -> list[Tensors]:
    """The gradients of three steps on this rank's part of a batch, and what the network holds after them; the network
    has convolutions and linear layers."""
    x, y = (t.chunk(ranks.size)[ranks.rank] for t in (oracles.randn(8, 2, 8, 8, dtype=dtype), torch.arange(8) % 3))
    maps = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(), nn.Flatten()]
    net = nn.Sequential(*maps, Block(nn.Linear(54, 12), nn.ReLU()), nn.Linear(12, 3))
    rule, options = CASES[name]
    fa.convert(oracles.fixed_weights(net).to(dtype), rule, seed=1, **options)
    forward, seen = ranks.wrap(net, net), []
    opt = torch.optim.SGD(fa.param_groups(net, 0.1, weight_decay=1e-2), momentum=0.9)
    for _ in range(3):
        F.cross_entropy(forward(x), y).backward()
        seen.append({n: p.grad.clone() for n, p in net.named_parameters()})
        opt.step()
        opt.zero_grad()
    return [*seen, {n: t.clone() for n, t in net.state_dict().items() if isinstance(t, torch.Tensor)}]


def many_steps(rank: int, folder: str) -> None:
    with two(rank, folder):
        found = {(n, d): steps(Ranks(rank, 2), n, d) for n in CASES for d in (torch.float64, torch.float32)}
        torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, torch.dtype], list[Tensors]]]:
    """What each of two ranks found, for every case and dtype."""
    folder = tmp_path_factory.mktemp("gradients")
    torch.multiprocessing.spawn(many_steps, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow  # it starts processes
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_have_the_gradients_of_one_process_with_the_whole_batch(name: str, gradients: list) -> None:
    """To 1e-12 in float64, over three steps, feedback that is redrawn, refreshed or learned from noise included; to
    1e-6 in float32."""
    learned = {n for n in gradients[0][name, torch.float64][0] if ".feedback." in n}
    assert bool(learned) == bool(fa.RULES[CASES[name][0]].learned)
    for dtype, within in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        one, mine, other = steps(ONE_PROCESS, name, dtype), *(found[name, dtype] for found in gradients)
        assert all(torch.equal(a[n], b[n]) for a, b in zip(mine, other, strict=True) for n in a)
        compared = list(zip(one, mine, strict=True))[: 4 if dtype == torch.float64 else 1]  # then the weights differ
        for want, got in compared:
            assert got.keys() == want.keys()
            apart = {n: oracles.apart(got[n].double(), want[n].double()) for n in want if want[n].is_floating_point()}
            assert all(value <= within for value in apart.values()), (dtype, apart)


# ---------------------------------------------------------------------------------------------------------- whole runs

RESNET = Config(
    "pfa", 0, "init=xavier implicit=true", "digits", model="resnet8", hidden="", epochs=1, batch=64, lr=0.01,
    first_weight_decay=0.05, augment=True,
)  # fmt: skip
RUNS = {
    "lenet": (Config("brsf", 0, "", "digits", model="lenet", hidden="", epochs=2, lr=0.05, augment=True), False),
    "noise": (Config("wm", 0, "input=normal", "digits", hidden="32", epochs=1, lr=0.01, first_steps="3"), False),
    "resnet": (RESNET, True),
    "resnet, local": (RESNET, False),
    "photographs": (RESNET.vary(dataset="tiny-imagenet-20", batch=50), True),
}
WITHIN = {  # largest difference to the run of one process
    "lenet": 1e-4,
    "noise": 0.05,
    "resnet": 1e-3,
}


def whole_runs(rank: int, folder: str, names: list[str]) -> None:
    with two(rank, folder):
        for name in names:
            config, sync = RUNS[name]
            ranks = Ranks(rank, 2, sync=sync)
            if rank:
                loop.follow(ranks)
                continue
            table = loop.train_runs([loop.Run(config)], ranks=ranks)[0]
            ranks.lead(None)
            table.to_pickle(f"{folder}/{name}.pkl")


def differences(table: pd.DataFrame, other: pd.DataFrame) -> pd.Series:
    """metric -> largest difference."""
    pd.testing.assert_frame_equal(table.drop(columns="value"), other.drop(columns="value"))
    return (table.value - other.value).abs().groupby(table.metric).max()


@pytest.mark.slow
def test_a_run_of_two_ranks_has_the_table_of_one_process(tmp_path: Path) -> None:
    """In float32, to rounding that grows with the steps; crops, redraws, noise and measurements within the first epoch
    included. Batch norm is that of the whole batch where it is shared, and the status says which it was."""
    names = [n for n in RUNS if n != "photographs"]
    torch.multiprocessing.spawn(whole_runs, (str(tmp_path), names), nprocs=2)
    one = {n: loop.train(RUNS[n][0]) for n in names if n != "resnet, local"}
    two = {n: pd.read_pickle(tmp_path / f"{n}.pkl") for n in names}
    for name in one:
        apart = differences(two[name], one[name])
        assert apart.max() <= WITHIN[name], f"{name}\n{apart}"
        assert {"ranks": 2, "batch_norm": "of the batch"}.items() <= two[name].attrs["status"].items()
    assert "ranks" not in one["resnet"].attrs["status"]
    local = two["resnet, local"]
    assert local.attrs["status"]["batch_norm"] == "of a rank"
    assert differences(local, one["resnet"]).angle_deg > 10 * WITHIN["resnet"]


@pytest.mark.slow
def test_a_run_on_photographs_has_the_table_of_one_process(tmp_path: Path) -> None:
    """ResNet-8, one epoch: loss within 1e-4, accuracies within 1 of 500 images, gradient angles, which turn on single
    units, within 2 degrees, all else within 0.05 of its unit."""
    pytest.importorskip("torchvision")
    if data.SETS["tiny-imagenet-20"].state(data.root()) != "yes":
        pytest.skip("the photographs of tiny-imagenet-20 are not in the data folder")
    torch.multiprocessing.spawn(whole_runs, (str(tmp_path), ["photographs"]), nprocs=2)
    apart = differences(pd.read_pickle(tmp_path / "photographs.pkl"), loop.train(RUNS["photographs"][0]))
    assert apart.train_loss <= 1e-4 and apart.val_accuracy <= 0.2001 and apart.grad_angle_global_deg <= 2, apart
    assert apart.drop(["val_accuracy", "grad_angle_global_deg"]).max() <= 0.05, apart


def test_a_run_whose_batch_norm_saw_a_part_of_the_batch_is_no_record(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FA_RUNS", str(tmp_path))
    folder, run = RunFolder(RESNET), loop.Run(RESNET, ranks=2, local_norm=True, rows=[[0, "", None, "train_loss", 1.0]])
    table = run.table(state="finished")
    folder.finish(table, table.attrs["status"])
    with pytest.raises(fa.UserError, match=r"2 ranks, whose batch norm saw part of the batch.*--sync-batch-norm"):
        records._merge("p3_fig4", "paper", [RESNET], [RESNET])


# ----------------------------------------------------------------------------------------------------------- torchrun

MORTAL = """
import os, signal, sys
from pathlib import Path
from fa.__main__ import main
from fa.train import loop, step
loop.CHECKPOINT_EVERY, taken, take = 0.0, 0, step.Stepper.step
def mortal(self):
    global taken
    take(self)
    taken += 1
    victim = Path(os.environ["VICTIM"])  # the file's name is that of the rank, which dies once
    if os.environ["RANK"] == victim.name and taken == 30 and victim.exists():
        victim.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
step.Stepper.step = mortal
sys.exit(main(sys.argv[1:]))
"""
COMMAND = "run p3_fig2 --mode quick --rules pfa --seeds 1 --epochs 3 --device cpu".split()


class Torchrun:
    """Calls of torchrun with ranks of which one can die, each with a run store of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "mortal.py").write_text(MORTAL)

    def __call__(self, store: str, victim: int | None, *options: str, ranks: int = 2) -> subprocess.CompletedProcess:
        """Train; with a ``victim``, this rank is killed after 30 steps, within the second epoch."""
        file = self.folder / store / str(victim)
        file.parent.mkdir(exist_ok=True)
        if victim is not None:
            file.touch()
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options]
        env = os.environ | {"FA_RUNS": str(self.folder / store / "runs"), "VICTIM": str(file), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *launch, str(self.folder / "mortal.py"), *COMMAND]
        return subprocess.run(command, cwd=fa.ROOT, env=env, capture_output=True, text=True)

    def run(self, store: str) -> Path:
        """The folder of the run."""
        return next((self.folder / store / "runs").glob("*/status.json")).parent


@pytest.mark.slow
def test_a_rank_that_is_killed_changes_nothing(tmp_path: Path) -> None:
    """torchrun starts the ranks again, or the same command is called again: both go on from the checkpoint, to the
    table of ranks that nobody killed, bit for bit. One process may go on with what two ranks began."""
    torchrun = Torchrun(tmp_path)
    done = torchrun("whole", None)
    assert done.returncode == 0 and done.stdout.startswith("1 of 1 runs are finished"), done.stderr
    assert done.stdout.count("\n") == 2 and done.stderr.count("1 of 1 runs to train") == 1  # rank 1 says nothing
    whole = (torchrun.run("whole") / "metrics.csv").read_bytes()
    assert json.loads((torchrun.run("whole") / "status.json").read_text())["ranks"] == 2

    done = torchrun("restarted", 1, "--max-restarts", "1")
    assert done.returncode == 0 and "exitcode: -9" in done.stderr, done.stderr
    assert (torchrun.run("restarted") / "metrics.csv").read_bytes() == whole

    for store, ranks in (("again", 2), ("alone", 1)):
        assert torchrun(store, 0).returncode != 0
        assert len(list((tmp_path / store / "runs").glob("*/checkpoint.pt"))) == 1
        assert torchrun(store, None, ranks=ranks).returncode == 0
    assert (torchrun.run("again") / "metrics.csv").read_bytes() == whole
    alone = torchrun.run("alone")
    assert json.loads((alone / "status.json").read_text())["ranks"] == 2
    values = [pd.read_csv(path / "metrics.csv").value for path in (torchrun.run("whole"), alone)]
    assert 0 < (values[0] - values[1]).abs().max() < 0.5


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_one_sentence(tmp_path: Path) -> None:
    done = Torchrun(tmp_path)("three", None, ranks=3)
    said = [line for line in done.stderr.splitlines() if line.startswith("fa: ")]
    assert said == ["fa: 3 ranks cannot share a batch of 64 images evenly; give torchrun a number that divides 64"], (
        done.stderr
    )
    assert done.returncode != 0 and not list((tmp_path / "three" / "runs").glob("*"))


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment that torchrun gives rank 0 of 4."""
    told = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=4, LOCAL_WORLD_SIZE=4, MASTER_ADDR="127.0.0.1", MASTER_PORT=1)
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(meeting, "JOIN", timedelta(seconds=1))
    return monkeypatch


@pytest.mark.parametrize("options, said", [
    (["--together", "3"], "leave --together 3 out, or torchrun"),
    (["--workers", "2"], "leave --workers 2 out, or torchrun"),
    (["--executor", "dask://127.0.0.1:1"], "leave --executor dask://127.0.0.1:1 out, or torchrun"),
    (["--device", "cuda:1"], "leave --device cuda:1 out, or torchrun"),
    (["--device", "cuda"], "4 ranks need 4 CUDA devices, and there are 2; give torchrun --nproc-per-node 2"),
])  # fmt: skip
def test_what_does_not_go_with_ranks_is_one_sentence(options: list[str], said: str, rank, capfd) -> None:
    from fa.__main__ import main

    rank.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["run", "p3_fig2", "--mode", "quick", *options]) == 2
    out, err = capfd.readouterr()
    assert not out and err.startswith("fa: ") and err.endswith(f"{said}\n") and err.count("\n") == 1
    rank.setenv("LOCAL_RANK", "1")
    rank.setenv("RANK", "1")
    rank.setattr(meeting, "PATIENCE", 0.0)
    assert main(["run", "p3_fig2", "--mode", "quick", *options]) == 2 and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("options, said", [
    (["--syncbn"], "unrecognized arguments: --syncbn; "),
    (["--mode", "quick", "--device", "cuda:7"], "device 'cuda:7' is not there"),
    (["--mode", "quick", "--workers", "none"], "workers='none' is not a positive number"),
])  # fmt: skip
def test_a_slip_before_the_ranks_have_joined_is_said_by_the_first_of_a_machine(options, said, rank, capfd) -> None:
    """Of two machines with two ranks each. The others wait, for torchrun would end the first one with them."""
    from fa.__main__ import main

    waited: list[float] = []
    rank.setattr(meeting.time, "sleep", waited.append)
    for number in range(4):
        rank.setenv("RANK", str(number))
        rank.setenv("LOCAL_RANK", str(number % 2))
        assert main(["run", "p3_fig2", *options]) == 2
        out, err = capfd.readouterr()
        assert not out and (not err if number % 2 else err.startswith(f"fa: {said}") and err.count("\n") == 1)
    assert waited == [meeting.PATIENCE] * 2


def test_a_rank_that_leaves_a_sentence_to_another_may_be_ended(rank) -> None:
    from fa.__main__ import main

    def terminated(_: float) -> None:
        raise KeyboardInterrupt("terminated")

    rank.setattr(meeting.time, "sleep", terminated)
    rank.setenv("LOCAL_RANK", "1")
    assert main(["run", "p3_fig2", "--syncbn"]) == 2


@pytest.mark.parametrize("told, said", [
    (dict(WORLD_SIZE="many"), "WORLD_SIZE='many' is no number, as torchrun would set it; call torchrun, or unset it"),
    (dict(LOCAL_RANK="-1"), "LOCAL_RANK='-1' is no number, as torchrun would set it; call torchrun, or unset it"),
    (dict(RANK="4"), "RANK=4 is not below WORLD_SIZE=4; call torchrun, which sets both, or unset them"),
])  # fmt: skip
def test_nonsense_in_the_variables_of_torchrun_is_a_sentence(told: dict[str, str], said: str, rank, capfd) -> None:
    from fa.__main__ import main

    for name, value in told.items():
        rank.setenv(name, value)
    assert main(["run", "p3_fig2", "--mode", "quick"]) == 2
    assert capfd.readouterr() == ("", f"fa: {said}\n")


# ------------------------------------------------------------------------------------------------------------- meeting


@dataclass
class Node:
    """A rank on a machine of its own, and what it has there.

    Args:
        host: name of the machine.
        software: what :func:`fa.provenance.software` finds.
        machine: what :func:`fa.provenance.environment` finds.
        cuda: whether there is a CUDA device.
        data: the data folder; where there is one, the ranks compare data sets in place of a command.
        restarts: what torchrun's agent there has counted.
        join: seconds that the rank waits for the others.
        network: name of the network interface ("": the machine's own choice).
        dies: whether the rank is killed when it looks at its data.
        options: of ``fa run``.
    """

    host: str
    software: dict[str, str] = field(default_factory=lambda: {"torch": "2.11.0"})
    machine: dict[str, str] = field(default_factory=lambda: {"cpu": "slow"})
    cuda: bool = False
    data: str = ""
    restarts: int = 0
    join: int = 60
    network: str = ""
    dies: bool = False
    options: tuple[str, ...] = ()


FOLDERS = data.ImageFolderSource("two photographs", 2, "two", {"train": 2})


def node(rank: int, size: int, port: int, node: Node, said: str) -> None:
    """Be a rank, as torchrun's agent would start it, until it ends; ``said``: the file of its output."""
    sys.stdout = sys.stderr = open(said, "w", buffering=1)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", FA_DATA=node.data,
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
                       TORCHELASTIC_RESTART_COUNT=str(node.restarts))  # fmt: skip
    ddp.socket.gethostname, ddp.software, ddp.environment = (
        (lambda: node.host),
        (lambda: node.software),
        lambda: node.machine,
    )
    meeting.JOIN, meeting.PATIENCE = timedelta(seconds=node.join), 1.0
    torch.cuda.is_available, torch.cuda.device_count, torch.cuda.set_device = (
        lambda: node.cuda, lambda: int(node.cuda), lambda _: None,
    )  # fmt: skip
    if node.network:
        os.environ["GLOO_SOCKET_IFNAME"] = node.network
    if not node.data:
        from fa.__main__ import main

        sys.exit(main(["run", "p3_fig2", "--mode", "quick", "--dry-run", *node.options]))
    data.SETS["two"] = FOLDERS
    if node.dies:
        data.digest = lambda name: os.kill(os.getpid(), signal.SIGKILL)
    try:
        with ddp.joined("cpu", False) as ranks:
            ranks.check_data(["digits", "two"]) if rank == 0 else loop.follow(ranks)
            print([m["cpu"] for m in ranks.machines])
    except fa.UserError as error:
        sys.exit(f"fa: {error}")


class Nodes:
    """Ranks that have one store, which outlives them as torchrun's does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload(["fa.__main__", "fa.experiments", "fa.results.runs", "pytest"])
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start(self, rank: int, of: Node, size: int = 2) -> BaseProcess:
        said = str(self.folder / f"{of.host}.said")
        process = self.context.Process(target=node, args=(rank, size, self.store.port, of, said), daemon=True)
        process.start()
        return process

    def end(self, process: BaseProcess, of: Node) -> tuple[int, str]:
        """Its exit status, and its output."""
        process.join(120)
        status = process.exitcode
        process.kill()
        assert status is not None, "it hangs"
        return status, (self.folder / f"{of.host}.said").read_text()

    def __call__(self, *of: Node) -> list[tuple[int, str]]:
        """Exit status and output of each rank."""
        started = [self.start(rank, own, len(of)) for rank, own in enumerate(of)]
        return [self.end(process, own) for process, own in zip(started, of)]


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path)


NEWER = {"torch": "2.12.0"}
MORE = "; make them alike, and call again on every machine\n"


@pytest.mark.parametrize("second, said", [
    (Node("b", software=NEWER), "torch is 2.11.0 on a (rank 0) and 2.12.0 on b (rank 1)"),
    (Node("b", cuda=True), "device is cpu on a (rank 0) and cuda on b (rank 1)"),
    (Node("b", options=("--sync-batch-norm",)), "--sync-batch-norm is False on a (rank 0) and True on b (rank 1)"),
])  # fmt: skip
def test_ranks_that_differ_end_with_a_sentence_of_rank_0(second: Node, said: str, nodes: Nodes) -> None:
    (status, output), other = nodes(Node("a"), second)
    assert (status, output) == (2, f"fa: ranks that train together must be alike, but {said}{MORE}")
    assert other == (2, "")


def photographs(folder: Path, *names: str) -> str:
    for name in names:
        (folder / "two" / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "two" / "train" / name).touch()
    return str(folder)


def test_ranks_compare_the_files_of_a_data_set(nodes: Nodes, tmp_path: Path) -> None:
    """Labels follow the names of classes, so that another name is another task."""
    here = photographs(tmp_path / "here", "cat/1.jpeg", "dog/1.jpeg")
    there = photographs(tmp_path / "there", "cat/1.jpeg", "eel/1.jpeg")
    (status, output), other = nodes(Node("a", data=here), Node("b", data=there))
    assert status == 1 and other == (1, "")
    assert re.fullmatch(
        r"fa: ranks that train together must be alike, but data set two, digest of its files is [0-9a-f]{12} on a "
        rf"\(rank 0\) and [0-9a-f]{{12}} on b \(rank 1\){MORE}", output
    )  # fmt: skip
    (status, output), other = nodes(Node("a", data=here), Node("b", data=str(tmp_path / "nowhere")))
    assert status == 1 and other == (1, "")
    assert output.startswith(f"fa: on b (rank 1): data set two: {tmp_path}/nowhere/two is not there; put ")


def test_ranks_that_are_alike_meet_and_know_all_machines(nodes: Nodes, tmp_path: Path) -> None:
    """However often torchrun's agents have started them, which each agent counts by itself; and again in one store."""
    folders = [photographs(tmp_path / name, "cat/1.jpeg", "dog/1.jpeg") for name in "abc"]
    for _ in range(2):
        found = nodes(
            Node("a", data=folders[0]),
            Node("b", data=folders[1], machine={"cpu": "fast"}, restarts=1),
            Node("c", data=folders[2], restarts=2),
        )
        assert found == [(0, "['slow', 'fast']\n")] * 3


def test_ranks_that_do_not_meet_say_so(nodes: Nodes) -> None:
    lonely = Node("a", join=1)
    status, output = nodes.end(nodes.start(0, lonely), lonely)
    assert status == 2 and output == (
        f"fa: the 2 ranks have not met at 127.0.0.1:{nodes.store.port} within 0 minutes; "
        "stop torchrun on every machine, and start it again on each\n"
    )


def test_ranks_without_a_network_to_each_other_say_so(nodes: Nodes) -> None:
    for rank, (status, output) in enumerate(nodes(Node("a", network="none"), Node("b", network="none"))):
        assert status == 2 and output.count("\n") == 1
        assert output.startswith(f"fa: rank {rank} on {'ab'[rank]} cannot reach the others (")
        assert "; name a network that joins them in GLOO_SOCKET_IFNAME, stop torchrun on every" in output


def test_a_rank_that_dies_before_a_run_is_one_sentence(nodes: Nodes, tmp_path: Path) -> None:
    here = photographs(tmp_path / "here", "cat/1.jpeg", "dog/1.jpeg")
    (status, output), other = nodes(Node("a", data=here), Node("b", data=here, dies=True))
    assert other == (-signal.SIGKILL, "") and status == 1
    assert output.startswith("fa: a rank is gone (") and output.endswith("); call again to go on\n")


def test_a_rank_that_is_gone_is_not_met() -> None:
    """A list with a rank that has died is not confirmed, and the same machines meet again under another word."""
    store, found = torch.distributed.HashStore(), {}

    def meet(rank: int, turn: int) -> threading.Thread:
        def met() -> None:
            found[turn, rank] = meeting.meet(store, rank, 2, {"host": "ab"[rank]})

        thread = threading.Thread(target=met, daemon=True)
        thread.start()
        return thread

    store.set("rank 1", json.dumps({"host": "dead", "identity": "0"}))  # signed, and died
    first = meet(0, 1)
    while not store.check(["list"]) or b"dead" not in store.get("list"):
        first.join(0.01)
    assert first.is_alive()
    for thread in (meet(1, 1), first):
        thread.join(60)
    for thread in [meet(rank, 2) for rank in (1, 0)]:  # both again, in the same store
        thread.join(60)
    for turn in (1, 2):
        assert found[turn, 0] == found[turn, 1] and [of["host"] for of in found[turn, 0][1]] == ["a", "b"]
    assert found[1, 0][0] != found[2, 0][0]


def test_a_run_names_the_machines_of_all_ranks() -> None:
    config = Config("fa", 0, "", "digits", hidden="8", epochs=1)
    other = {"cpu": "another one", "gpu": ""}
    table = loop.train_runs([loop.Run(config)], ranks=Ranks(machines=(environment(), other)))[0]
    assert table is not None and table.attrs["status"]["earlier"] == [other]


# ------------------------------------------------------------------------------------------------- without several ranks


def test_the_command_that_goes_on_has_the_machines_of_torchrun(rank) -> None:
    assert commands.launched() == ("torchrun --standalone --nproc-per-node 4 -m fa", 1)
    rank.setenv("WORLD_SIZE", "8")
    rank.setenv("MASTER_ADDR", "first")
    place = "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint first:29400"
    assert commands.launched() == (f"torchrun {place} --nproc-per-node 4 -m fa", 2)
    rank.delenv("MASTER_PORT")
    assert commands.launched() == ("python -m fa", 1)


def test_without_torchrun_there_is_one_process(monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # a job scheduler's, say
    with ddp.joined("cpu", False, workers="2") as ranks:
        assert ranks is ONE_PROCESS and not torch.distributed.is_initialized()
    x = torch.arange(6.0)
    assert ranks.mean(x) is x and ranks.share(x) is x and torch.equal(ranks.part(x), x)
