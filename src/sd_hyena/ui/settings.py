"""What ``sd-hyena ui`` can be told. Light: imports neither torch nor gradio."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..models.choices import ModelChoices
from ..settings import check_bounds, option

HOST = "127.0.0.1"  # this machine's own, which no other reaches


@dataclass
class UiSettings(ModelChoices):
    """Settings of one ``sd-hyena ui``."""

    model: str = option("demo", "demo, a diffusers folder, a single file, a hub id", short="-m", path=True)
    hyena_dir: str = option("", "folder whose Hyena files (.safetensors) the page offers", short="-y", path=True)
    port: int = option(7860, "of the page's address; 0: any that is free", within=(0, 65535))
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = option(
        "auto", "auto: float16 on a GPU, float32 on the CPU", choices=("auto", "float32", "float16", "bfloat16")
    )
    no_browser: bool = option(False, "print the page's address without opening it")

    def validate(self) -> None:
        """Raises UsageError for the first setting that cannot work."""
        self.check_model_choices(self.model)
        check_bounds(self)
        if self.hyena_dir and not Path(self.hyena_dir).is_dir():
            raise UsageError(f"--hyena_dir {self.hyena_dir}: no such folder")
        self.free_port()

    def free_port(self) -> int:
        """The port, or one that is free. Raises UsageError if it is taken, or may not be used."""
        try:
            with socket.create_server((HOST, self.port)) as server:
                return server.getsockname()[1]
        except OSError as error:
            said = os.strerror(error.errno).lower() if error.errno else str(error)
            raise UsageError(f"--port {self.port}: {said}: give another") from None
