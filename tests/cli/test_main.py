"""The command line itself: help that answers at once, one-line errors, tracebacks only on request."""

import subprocess
import sys

import pytest

from sd_hyena.cli import COMMANDS, main


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys, sd_hyena.cli as c\n"
        "try: c.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: sd-hyena" in done.stdout


def test_module_and_console_command():
    done = subprocess.run([sys.executable, "-m", "sd_hyena", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("sd-hyena 0.")
    done = subprocess.run([sys.executable, "-m", "sd_hyena", "train", "-m", "no-such"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("sd-hyena: model no-such not found")


def test_debug_shows_the_traceback():
    from sd_hyena.errors import UsageError

    with pytest.raises(UsageError):
        main(["train", "-m", "no-such", "--debug"])


def test_unknown_command_and_option(capsys):
    for arguments in (["paint"], ["train", "-m", "demo", "--unknown"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert main([]) == 2
    assert "generate  " in capsys.readouterr().err  # the commands there are


def test_a_kernel_that_there_is_not_is_a_usage_error(monkeypatch, capsys):
    monkeypatch.setenv("SD_HYENA_KERNEL", "cufft")
    assert main(["generate", "-m", "no-such", "-p", "a fox"]) == 2
    assert "SD_HYENA_KERNEL must be one of triton, cpu, plain, got 'cufft'" in capsys.readouterr().err
