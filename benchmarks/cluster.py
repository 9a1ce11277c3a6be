"""What a campaign through Dask costs beside one through this machine's own processes: runs that sleep for a second.

``python benchmarks/cluster.py [--runs 200] [--seconds 1] [--workers 4] [--out results/cluster.json]`` starts a
scheduler and workers on the loopback (the extra ``cluster``), then runs the same campaign through either, the pool
first. The pool's time includes the start of its processes, as every campaign's does; Dask's workers are up before. A
run's files are written as any run's are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tests")]

import pandas as pd  # noqa: E402

from fa.provenance import environment  # noqa: E402
from fa.results import cluster as executors  # noqa: E402
from fa.results import runs  # noqa: E402
from fa.train.config import identity  # noqa: E402


@dataclass(frozen=True)
class Sleep:
    """A run that sleeps.

    Args:
        seed: its number.
        seconds: that it sleeps.
        rule: none; the machinery asks for one.
    """

    seed: int
    seconds: float
    rule: str = "bp"

    run = property(identity)

    def table(self) -> pd.DataFrame:
        """One row."""
        time.sleep(self.seconds)
        columns = ["epoch", "layer", "depth", "metric", "value"]
        return pd.DataFrame([[0, "", None, "slept", self.seconds]], columns=columns)


def timed(configs: list[Any], store: Path, workers: int, executor: Any = None) -> float:
    """Wall seconds of a campaign in a run store of its own."""
    os.environ["FA_RUNS"] = str(store)
    begin = time.monotonic()
    summary = runs.run(configs, workers=workers, device="cpu", progress=False, executor=executor)
    seconds = time.monotonic() - begin
    assert (summary.done, summary.failed) == (len(configs), []), summary
    return seconds


def main() -> None:
    """Run both, and print and write the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cluster.json")
    args = parser.parse_args()
    from cluster import Sleep as Known  # under the module's name, by which workers find it
    from cluster_harness import Harness

    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path[:3], os.environ.get("PYTHONPATH", "")]))
    configs = [Known(i, args.seconds) for i in range(args.runs)]
    ideal = args.runs * args.seconds / args.workers
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        found = {"ideal": ideal, "pool": timed(configs, where / "pool", args.workers)}
        with Harness(where).cluster(places=[0] * args.workers) as (address, _, _):
            os.environ["FA_RUNS"] = str(where / "dask")
            (where / "dask").mkdir()
            with executors.opened(address, where / "dask") as executor:
                found["dask"] = timed(configs, where / "dask", args.workers, executor)
    found["dask over pool"] = found["dask"] / found["pool"]
    for name, value in found.items():
        print(f"{name:16s} {value:.3f}")
    about = {"runs": args.runs, "seconds": args.seconds, "workers": args.workers, **environment()}
    args.out.write_text(json.dumps({"measured": found, **about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
