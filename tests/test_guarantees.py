"""What ``docs/guarantees.md`` promises about equal numbers: that each line has its test, and the lines that no other file tests."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import fa
from fa.results import executors
from fa.train import loop
from fa.train.config import Config

PAGE = (fa.ROOT / "docs" / "guarantees.md").read_text()
MLP = Config("pfa", 0, "init=xavier implicit=true", "digits", hidden="16,16", epochs=3, batch=64, lr=0.05,
             first_weight_decay=0.1)  # fmt: skip


def test_every_guarantee_names_tests_that_are_there():
    lines = [line.split("|")[3] for line in PAGE.splitlines() if line.startswith("| ")][1:]
    named = re.findall(r"\[(test_\w+)\]\(\.\./(tests/\w+\.py)\)", PAGE)
    assert len(named) >= 13
    for test, path in named:
        assert f"def {test}(" in (fa.ROOT / path).read_text(), f"{path} has no {test}"
    assert [line.strip() for line in lines if "test_" not in line] == ["nothing", "nothing in the tests"]


ELSEWHERE = """
import json, sys, torch
sys.path.insert(0, {tests!r})
from test_guarantees import MLP
from fa.train import loop
print(json.dumps([torch.backends.cpu.get_cpu_capability(), loop.fingerprint(MLP), loop.train(MLP)["value"].tolist()]))
"""


@pytest.mark.slow
def test_another_cpu_gives_the_fingerprint_and_nearly_the_table():
    """Another CPU: this one without its vector instructions, as far as torch, oneDNN and MKL can be told to."""
    plain = dict(ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41", MKL_ENABLE_INSTRUCTIONS="SSE4_2")
    code = ELSEWHERE.format(tests=os.path.dirname(__file__))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | plain, capture_output=True, text=True, check=True
    )
    capability, fingerprint, values = json.loads(done.stdout.splitlines()[-1])
    here, numbers = loop.train(MLP), np.array(values, dtype=float)
    assert capability == "DEFAULT" != torch.backends.cpu.get_cpu_capability()
    assert fingerprint == loop.fingerprint(MLP)
    assert np.isfinite(numbers).sum() == np.isfinite(here.value).sum() > 50
    assert not np.array_equal(numbers, here.value)  # else the line of the table says too little
    assert np.nanmax(np.abs(numbers - here.value)) < 0.3  # one of 360 images, or .3 degrees


def test_workers_are_told_to_be_deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        with executors.processes() as new:
            assert new().submit(torch.are_deterministic_algorithms_enabled).result()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("together", [1, 2])
def test_a_gpu_repeats_itself_when_it_is_told_to(together, monkeypatch):
    """Alone and in a stack."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    configs = [replace(MLP, rule="pfa", model="resnet8", hidden="", lr=0.01, seed=seed) for seed in range(together)]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (loop.train_runs([loop.Run(c) for c in configs], "cuda") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, second):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
