"""Memory counted on fakes is what the shapes say."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.nightly
def test_memory_of_training_is_counted(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import memory

    weights, teaching, kept, update = memory.measure("sd15", 2, 3, torch.float32)
    assert weights == 859_520_964 * 4 / 1e9  # SD1.5's UNet
    assert kept == 3 * 5 * 2 * (2 * 64 * 64 * 320) * 4 / 1e9  # passes, layers, inputs and outputs
    assert teaching > kept / 3
    assert update > kept / 3
    monkeypatch.setattr(sys, "argv", ["memory.py", "--models", "sd15", "--batch_size", "1", "--dtype", "bfloat16"])
    memory.main()
    assert torch.get_default_dtype() == torch.float32
    assert capsys.readouterr().out.splitlines()[2].startswith("| sd15, 512 px | 1.7 |")
