"""Which backend takes which case, and that it says so."""

import logging
from pathlib import Path

import pytest
import torch

from sd_hyena.errors import UsageError
from sd_hyena.ops import dispatch, environment

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    for cached in (dispatch._choose, dispatch.log):
        cached.cache_clear()
    yield
    for cached in (dispatch._choose, dispatch.log):
        cached.cache_clear()


@pytest.fixture
def compiled(monkeypatch):
    """As on a machine where kernels run on the GPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(
        dispatch.kernels().launch, "refuses", lambda device: "" if device.type == "cuda" else "not on a CPU"
    )


def case(device=CUDA, dtype=torch.float16, grid=(64, 64), radius=None, mean=False):
    return dispatch.Case(device, dtype, grid, radius or (grid[0] - 1, grid[1] - 1), mean)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "flash"),
        ({"dtype": torch.bfloat16}, "flash"),
        ({"grid": (128, 96)}, "flash"),
        ({"grid": (129, 16)}, "columns"),
        ({"grid": (512, 512)}, "columns"),
        ({"grid": (600, 64)}, "gemm"),
        ({"dtype": torch.float32}, "fft"),
        ({"dtype": torch.float64}, "fft"),
        ({"mean": True}, "flash"),
        ({"mean": True, "radius": (3, 3)}, "fft"),
        ({"device": CPU}, "fft"),
    ],
)
def test_the_first_that_does_not_refuse(compiled, changes, name):
    assert dispatch.choose(case(**changes)).name == name


def test_without_triton_matrix_products(monkeypatch):
    monkeypatch.setattr(dispatch, "kernels", lambda: None)
    assert dispatch.choose(case()).name == "gemm"
    assert dispatch.choose(case(dtype=torch.float32)).name == "fft"


def test_a_name_in_the_environment_wins_and_what_it_cannot_take_is_said(compiled, monkeypatch, caplog):
    monkeypatch.setenv(environment.KERNEL, "columns")
    with caplog.at_level(logging.INFO):
        assert dispatch.choose(case()).name == "columns"
        assert dispatch.choose(case(dtype=torch.float32)).name == "fft"
    assert "by columns, as SD_HYENA_KERNEL asks" in caplog.text
    assert "SD_HYENA_KERNEL=columns is passed over: multiplies in float16: not for float32" in caplog.text
    monkeypatch.setenv(environment.KERNEL, "cufft")
    with pytest.raises(UsageError, match="must be one of flash, columns, gemm, fft, got 'cufft'"):
        dispatch.choose(case())


def test_on_a_cpu_kernels_are_for_those_who_ask(monkeypatch):
    """Triton's interpreter would take minutes for what takes milliseconds."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if dispatch.kernels().launch.refuses(CPU):
        pytest.skip("Triton compiles")
    assert dispatch.choose(case(device=CPU)).name == "fft"
    monkeypatch.setenv(environment.KERNEL, "flash")
    assert dispatch.choose(case(device=CPU)).name == "flash"


def test_the_names_that_can_be_asked_for_are_those_there_are():
    assert tuple(backend.name for backend in dispatch.BACKENDS) == environment.KERNELS


def test_a_choice_is_logged_once_and_not_on_a_cpu(compiled, caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            dispatch.choose(case())
            dispatch.choose(case(device=CPU))
    assert [r.message for r in caplog.records] == [
        "long convolutions on a 64 x 64 grid by flash: the whole convolution of a plane in one kernel (cuda, float16)"
    ]


def test_the_documented_table_is_the_code(compiled):
    assert "\n".join(dispatch.table()) in DOCS.read_text()


@pytest.mark.parametrize(("capability", "reason"), [((8, 0), ""), ((9, 0), ""), ((7, 5), "compute capability 7.5")])
def test_gpus_older_than_the_kernels_are_refused(capability, reason, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    launch = dispatch.kernels().launch
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    launch.refuses.cache_clear()
    said = launch.refuses(CUDA)
    launch.refuses.cache_clear()
    assert reason in said
    assert bool(said) == bool(reason)
