"""The page as a user starts it, in a process of its own."""

import os
import re
import signal
import subprocess
import sys

import pytest

# The command line, but whatever it looks up or connects to elsewhere is told.
WATCHED = """
import socket, sys
from sd_hyena.cli import main

def watched(real, place):
    def call(*args, **options):
        host = args[place][0] if isinstance(args[place], tuple) else args[place]
        if host not in ("127.0.0.1", "localhost"):
            print(f"asked for {host}", file=sys.stderr, flush=True)
        return real(*args, **options)
    return call

socket.getaddrinfo = watched(socket.getaddrinfo, 0)
for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, watched(getattr(socket.socket, name), 1))
sys.exit(main(sys.argv[1:]))
"""


class Served:
    """``sd-hyena ui -m demo`` with more options, once its address is known; its temporary files go to ``folder``."""

    def __init__(self, folder, *options):
        command = [sys.executable, "-c", WATCHED, "ui", "-m", "demo", "--port", "0", "--no_browser", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder)}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.address = ""
        for line in self.process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                self.address = found[0]
                break
        if not self.address:
            pytest.fail(self.process.stderr.read())

    def end(self, number=signal.SIGINT):
        """Its exit status, and what it has said to standard error."""
        self.process.send_signal(number)
        try:
            _, error = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, error


@pytest.fixture(scope="session")
def start():
    """Starts another one; whoever does ends it."""
    return Served


@pytest.fixture(scope="session")
def hyena_dir(tmp_path_factory):
    """A folder with a Hyena file of two layers, and one that is none."""
    from sd_hyena.cli import main
    from sd_hyena.sources import STUDENT_FILE

    folder = tmp_path_factory.mktemp("hyena")
    assert main(["convert", str(STUDENT_FILE), "-t", "IN01,M00", "--out", str(folder / "two.safetensors")]) == 0
    (folder / "broken.safetensors").write_bytes(b"\0" * 64)
    return folder


@pytest.fixture(scope="session")
def served(hyena_dir, tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("served"), "--hyena_dir", str(hyena_dir))
    yield served
    status, error = served.end()
    assert status == 130
    assert error.endswith("sd-hyena: stopped by SIGINT: the page is closed\n")  # gradio may have said something before
    assert "asked for" not in error


@pytest.fixture(scope="session")
def address(served):
    return served.address
