"""``sd-hyena ui`` as a user types it."""

import socket
import sys

import pytest

from sd_hyena.cli import main


@pytest.fixture(autouse=True)
def _nothing_heavy(monkeypatch):
    """No model is loaded."""
    monkeypatch.setattr("sd_hyena.models.load_pipeline", lambda *args, **options: pytest.fail("the model was loaded"))


def ui(*words):
    return main(["ui", *map(str, words)])


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        ui("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--model", "--hyena_dir", "--port", "--device", "--dtype", "--no_browser"):
        assert flag in shown


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--hyena_dir", "no/such"], "--hyena_dir no/such: no such folder"),
        (["--port", "65536"], "--port is 65536, but must be from 0 to 65535"),
        (["--port", "0", "-m", "no-such"], "model no-such not found"),
        (["--port", "0", "-m", "demo", "--prediction_type", "x"], "argument --prediction_type: invalid choice"),
    ],
)
def test_usage_errors(capsys, tmp_path, monkeypatch, words, error):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        sys.exit(ui(*words))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert error in said
    assert said.count("\n") == 1


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert ui("--port", port) == 2
    assert capsys.readouterr().err == f"sd-hyena: --port {port}: address already in use: give another\n"
