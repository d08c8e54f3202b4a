"""Skipping, timing in turns, memory, crossovers, comparing with an earlier run."""

import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import run_unet
from out_of_memory import CPU as CPU_LINE
from out_of_memory import GPU

from sd_hyena.benchmark import kinds, measure, memory, report
from sd_hyena.benchmark.image import attention_entry, measure_image
from sd_hyena.benchmark.kinds import Shape
from sd_hyena.benchmark.measure import Limits, Row, crossover, measure_sizes
from sd_hyena.benchmark.timing import Timing, interleaved
from sd_hyena.errors import SdHyenaError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_known():
    """What can run here is found out once; these tests change it."""
    kinds._missing.cache_clear()
    yield
    kinds._missing.cache_clear()


def shape_at(width):
    return Shape(16, 2, width // 8, width // 8, 1, torch.float32, CPU, (8, 8))


def row(width, kind, ms, ratio, **rest):
    return Row(width, width, 1, kind, "hyena", False, timing=Timing(ms, ms, ms, 3), ratio=ratio, **rest)


def test_a_kind_that_would_take_too_long_is_skipped_with_a_line(monkeypatch):
    rows = measure_sizes(shape_at, [64, 128], ["sdp-math", "states"], Limits(2, 0.1, max_seconds=60))
    assert all(r.timing and r.ratio and r.peak_bytes and r.error is not None for r in rows)
    tight = Limits(2, 0.1, max_seconds=1e-6)
    rows = measure_sizes(shape_at, [64, 128], ["sdp-math", "states"], tight)
    assert [bool(r.timing) for r in rows] == [True, True, False, False]
    assert "over the limit" in rows[2].note
    assert report.skipped(rows)[0].startswith("sdp-math at 128 px: skipped")


def test_what_would_not_fit_is_skipped_with_a_line(monkeypatch):
    monkeypatch.setattr(measure, "free_memory", lambda device: 10_000)
    rows = measure_sizes(shape_at, [64], ["naive", "states"], Limits(1, 0))
    assert "GiB are free" in rows[0].note
    assert rows[1].timing


@pytest.mark.reliability(14)
def test_running_out_of_memory_is_a_line(monkeypatch):
    def attend(q, k, v):
        if q.shape[2] > 64:
            raise RuntimeError(CPU_LINE)
        return v

    monkeypatch.setattr("sd_hyena.benchmark.kinds.softmax_attention", attend)
    rows = measure_sizes(shape_at, [128], ["naive", "linear-elu"], Limits(1, 0))
    assert rows[0].note == "skipped: out of memory"
    assert rows[1].timing


@pytest.mark.reliability(14)
@pytest.mark.parametrize("calls", [1, 3])
def test_an_entry_that_runs_out_of_memory_costs_the_others_nothing(unet, monkeypatch, calls):
    """In its check, or while it is timed."""
    entries, failed = [attention_entry("sdpa"), attention_entry("naive")], []

    def generate(steps):
        naive = (
            type(unet.mid_block.attentions[0].transformer_blocks[0].attn1.get_processor()).__name__ == "AttnProcessor"
        )
        failed.append(naive)
        if naive and sum(failed) == calls:
            raise torch.OutOfMemoryError(GPU)
        run_unet(unet)

    pipe = SimpleNamespace(unet=unet, vae_scale_factor=8)
    rows = measure_image(pipe, entries, generate, (128, 128), 1, 2, 1)
    assert [row.note for row in rows] == ["", "skipped: out of memory"]
    assert rows[0].seconds
    assert rows[1].seconds is None
    assert sum(failed) == calls


def test_what_fails_in_a_rival_is_a_line_and_in_ours_a_failure(monkeypatch):
    def fail(*args):
        raise RuntimeError("no kernel")

    monkeypatch.setattr("sd_hyena.benchmark.kinds.softmax_attention", fail)
    rows = measure_sizes(shape_at, [64], ["naive", "linear-elu"], Limits(1, 0))
    assert rows[0].note == "not available: no kernel"
    monkeypatch.setattr("sd_hyena.nn.long.long_conv2d", fail)
    with pytest.raises(RuntimeError, match="no kernel"):
        measure_sizes(shape_at, [64], ["long"], Limits(1, 0))


def test_a_layer_is_tried_on_a_smaller_grid_before_a_long_wait():
    kind, large = measure.KINDS["sdp-math"], shape_at(1024)
    guess = measure.estimate_seconds(kind, large, False)
    assert guess > 0
    assert measure.estimate_seconds(kind, shape_at(256), False) == 0
    rows = measure.measure(large, (1024, 1024), ["sdp-math"], Limits(1, 0, max_seconds=guess / 1000))
    assert "over the limit" in rows[0].note


def test_the_best_attention_is_the_fastest_one():
    rows = measure_sizes(shape_at, [128], ["naive", "sdp-math", "linear-elu"], Limits(5, 0.2))
    best = [r for r in rows if r.best]
    assert len(best) == 1
    assert best[0].family == "attention"
    assert best[0].ratio == 1
    assert all(r.ratio == pytest.approx(best[0].timing.median / r.timing.median) for r in rows)


def test_a_slow_call_is_made_once():
    rows = measure_sizes(shape_at, [64], ["naive", "linear-elu"], Limits(9, 0.1, single_seconds=0))
    assert all(r.timing.repeats == 1 and r.note == "one call, without warm-up" for r in rows)


def test_turns_leave_time_for_the_quick():
    order = []

    def call(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    timings = interleaved({"slow": call("slow", 0.05), "quick": call("quick", 0.001)}, CPU, 20, 0.2)
    assert order[:4] == ["slow", "quick", "slow", "quick"]
    assert 2 <= timings["slow"].repeats <= 4
    assert timings["quick"].repeats == 20
    assert timings["slow"].median > 20 * timings["quick"].median / 10
    assert interleaved({}, CPU, 3, 1) == {}


def test_peak_memory_of_a_call_is_what_it_held_at_once():
    def call():
        first = torch.empty(2**20)
        second = torch.empty(2**20)
        del first
        return torch.empty(2**18), second

    peak, _ = memory.peak_of_call(call, CPU)
    assert peak == 2 * 4 * 2**20


def test_measuring_memory_prints_nothing():
    code = "import torch; from sd_hyena.benchmark.memory import peak_of_call as peak\n"
    code += "peak(lambda: torch.ones(9), torch.device('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_peak_memory_of_a_run_starts_anew():
    peak = memory.PeakOfRun(CPU)
    big = torch.ones(2**26)
    peak.reset()
    with_big = peak.peak()
    del big
    peak.reset()
    assert peak.peak() < with_big - 2**27


@pytest.mark.parametrize("system", ["Windows", "macOS"])
def test_peak_memory_is_known_where_there_is_no_proc(system, monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(memory.Path, "read_text", missing)
    if system == "Windows":
        monkeypatch.setitem(sys.modules, "resource", None)  # importing it fails
        monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(peak_wset=2**30))
        assert memory.PeakOfRun(CPU).peak() == 2**30
    else:
        monkeypatch.setattr(sys, "platform", "darwin")
        usage = SimpleNamespace(ru_maxrss=2**30)  # bytes there, KiB elsewhere
        monkeypatch.setattr("resource.getrusage", lambda who: usage)
        assert memory.PeakOfRun(CPU).peak() == 2**30


def test_crossover():
    rows = [row(w, "x", 1.0, ratio) for w, ratio in ((256, 1.2), (512, 0.9), (768, 1.1), (1024, 3.0))]
    assert crossover(rows, "x") == 768
    assert crossover([row(256, "x", 1.0, 0.5)], "x") is None
    assert report.crossover_lines(rows) == ["x: faster than attention from 768 px"]


def test_tables_show_what_is_not_there():
    rows = [row(256, "x", 4.0, 1.0), row(256, "y", 2.0, 2.0), row(512, "y", 8.0, None)]
    rows.append(Row(512, 512, 1, "z", "peer", False, note="skipped"))
    assert report.size_lines(rows)[1] == [["x", "4.0 (1.00x)", "-"], ["y", "2.0 (2.00x)", "8.0"]]
    assert report.memory_lines(rows)[1] == [["x", "0.0", "-"], ["y", "0.0", "0.0"]]
    assert report.skipped(rows) == ["z at 512 px: skipped"]


def test_comparison_matches_rows_of_the_same_shape():
    old = [row(256, "x", 4.0, 1.0).record(), row(512, "x", 9.0, 2.0).record()]
    new = [row(256, "x", 2.0, 3.0).record(), row(512, "y", 1.0, 1.0).record()]
    assert report.compare_records(old, new) == [["x, 256x256 px", "4.0", "2.0", "2.00x", "1.00x", "3.00x"]]


def test_one_kind_that_fails_need_not_cost_the_others(monkeypatch):
    """A suite notes what is wrong, and measures on."""
    monkeypatch.setattr(kinds, "softmax_attention", lambda q, k, v: 0 * v)
    with pytest.raises(SdHyenaError, match="naive is off by"):
        measure_sizes(shape_at, [64], ["naive", "linear-elu"], Limits(1, 0))
    failures = []
    rows = measure_sizes(shape_at, [64], ["naive", "linear-elu"], Limits(1, 0), failures=failures)
    assert rows[0].timing is None
    assert rows[0].note.startswith("failed: naive is off by")
    assert rows[1].timing is not None
    assert len(failures) == 1
    assert failures[0].startswith("naive at 64 px, batch 1: failed: naive is off by")
