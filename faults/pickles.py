"""Malicious pickles under every name and in every place that reads one; a payload that runs leaves a file."""

from __future__ import annotations

import io
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from . import child
from .judge import files_in
from .report import Report

COUNT = 80
LIMIT = 10.0  # seconds for one file
RAN = "ran"  # the file that a payload makes
CODE = f"open({RAN!r}, 'w').close()"
SHELL = f"touch {RAN}"


class Calls:
    """Unpickled as the result of ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


class Named:
    """A function by a name that need not exist here, called likewise."""

    def __init__(self, module: str, name: str, *arguments: Any) -> None:
        self.module, self.name, self.arguments = module, name, arguments


def payloads() -> dict[str, Any]:
    """What a pickle can be told to call, by how."""
    named: dict[str, tuple[str, str, tuple[Any, ...]]] = {
        "os.system": ("os", "system", (SHELL,)),
        "posix.system": ("posix", "system", (SHELL,)),
        "nt.system": ("nt", "system", (SHELL,)),
        "eval": ("builtins", "eval", (CODE,)),
        "exec": ("builtins", "exec", (CODE,)),
        "exec of Python 2": ("__builtin__", "exec", (CODE,)),
        "open": ("builtins", "open", (RAN, "w")),
        "io.open": ("io", "open", (RAN, "w")),
        "io.FileIO": ("io", "FileIO", (RAN, "w")),
        "subprocess.Popen": ("subprocess", "Popen", (["touch", RAN],)),
        "subprocess.getoutput": ("subprocess", "getoutput", (SHELL,)),
        "os.mkdir": ("os", "mkdir", (RAN,)),
        "pathlib.Path.touch": ("pathlib", "Path.touch", (Path(RAN),)),
        "os.open": ("os", "open", (RAN, 65)),
        "shutil.copy": ("shutil", "copy", ("/etc/hostname", RAN)),
        "pty.spawn": ("pty", "spawn", (["touch", RAN],)),
        "timeit.timeit": ("timeit", "timeit", (CODE, "pass")),
        "cProfile.run": ("cProfile", "run", (CODE,)),
        "runpy.run_path": ("runpy", "run_path", ("payload.py",)),
        "pickle.loads": ("pickle", "loads", (pickle.dumps(Calls(eval, CODE)),)),
        "torch.load": ("torch.serialization", "load", ("payload.pt",)),
        "torch.save": ("torch", "save", (1, RAN)),
        "torch.hub.load": ("torch.hub", "load", (".", "payload")),
        "torch.UntypedStorage.from_file": ("torch", "UntypedStorage.from_file", (RAN, True, 8)),
        "torch.storage._load_from_bytes": ("torch.storage", "_load_from_bytes", (pickle.dumps(Calls(eval, CODE)),)),
        "numpy.load": ("numpy", "load", ("payload.npy", None, True)),
        "numpy.memmap": ("numpy", "memmap", (RAN, "uint8", "w+", 0, (8,))),
        "numpy.testing.runstring": ("numpy.testing._private.utils", "runstring", (CODE, {})),
        "code.InteractiveInterpreter": ("code", "InteractiveInterpreter.runcode", (None, CODE)),
        "logging.FileHandler": ("logging", "FileHandler", (RAN,)),
        "zipfile.ZipFile": ("zipfile", "ZipFile", (RAN, "w")),
        "sqlite3.connect": ("sqlite3", "connect", (RAN,)),
        "tempfile.NamedTemporaryFile": ("tempfile", "NamedTemporaryFile", ("w", -1, None, None, "", RAN, ".", False)),
        "ctypes.CDLL": ("ctypes", "CDLL", ("./payload.so",)),
        "importlib.import_module": ("importlib", "import_module", ("payload",)),
        "sd_hyena.files.write_new": ("sd_hyena.files", "write_new", (Path(RAN), b"")),
        "transformers": ("transformers.dynamic_module_utils", "get_class_in_module", ("x", "payload.py")),
        "os._exit": ("os", "_exit", (0,)),
        "sys.exit": ("sys", "exit", (0,)),
        "os.abort": ("os", "abort", ()),
        "time.sleep": ("time", "sleep", (1000,)),
        "bytearray": ("builtins", "bytearray", (1 << 40,)),
        "collections.deque": ("collections", "deque", ((), 1 << 62)),
    }
    return {what: Named(module, name, *arguments) for what, (module, name, arguments) in named.items()}


_PYTHONS: Any = vars(pickle)["_Pickler"]  # the one that can be extended


class Pickler(_PYTHONS):
    """Writes :class:`Named` by its name, whether there is such a thing or not."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(obj, Named):
            super().save(obj, save_persistent_id)
            return
        if self.proto >= 4:
            super().save(obj.module)
            super().save(obj.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        super().save(obj.arguments)
        self.write(pickle.REDUCE)


def pickled(content: Any, protocol: int) -> bytes:
    file = io.BytesIO()
    Pickler(file, protocol).dump(content)
    return file.getvalue()


def forms() -> dict[str, Callable[[Any, int], bytes]]:
    """How a payload lies in a file."""
    return {
        "alone": pickled,
        "in a state_dict": lambda load, protocol: pickled({"state_dict": {"a": load}}, protocol),
        "as a key": lambda load, protocol: pickled({load: 1}, protocol),
        "beside weights": lambda load, protocol: pickled({"state_dict": {}, "callbacks": [load]}, protocol),
        "as torch writes it": lambda load, protocol: zipped(pickled({"a": load}, protocol)),
        "stored after others": lambda load, protocol: zipped(
            pickled([[{}], (load,)], protocol), "x/data.pkl", "x/version"
        ),
        "with INST": lambda load, protocol: b"(S'" + SHELL.encode() + b"'\nios\nsystem\n.",
        "with OBJ": lambda load, protocol: b"(cos\nsystem\nX\x09\x00\x00\x00" + SHELL.encode()[:9] + b"o.",
        "twice": lambda load, protocol: pickled({}, protocol) + pickled(load, protocol),
        "as torch wrote it": lambda load, protocol: (
            b"".join(pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
            + pickled({"a": load}, 2)
            + pickled([], 2)
        ),
    }


def zipped(data: bytes, name: str = "archive/data.pkl", *others: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, data)
        for other in others or ("archive/version",):
            archive.writestr(other, "3\n")
    return file.getvalue()


def run(report: Report, scale: float, seed: int) -> None:
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        folder = Path(place)
        for number in report.numbers(COUNT * scale):
            what, wrong = one_trial(report.random(number), number, folder)
            report.verdict((1, 3), f"pickles: {what}", wrong, report.again(number))


def one_trial(random: Random, number: int, folder: Path) -> tuple[str, str]:
    """Plants a pickle in a folder and has a command read it."""
    loads = payloads()
    what = sorted(loads)[number % len(loads)]
    form, write = random.choice(sorted(forms().items()))
    data = write(loads[what], random.choice((0, 1, 2, 3, 4, 5)))
    there = Path(tempfile.mkdtemp(dir=folder))
    plant(there)
    argv, path = place(there, data, random)
    before = files_in(there)
    ending = child.call(child.command(argv, load=False), LIMIT, cwd=there)
    if (there / RAN).exists():
        return f"{what} {form}", f"its payload ran, by {argv[0]}"
    writes = ["out/*", "log/*"]
    names = {"limit": LIMIT, "names": [path.name, argv[0]], "refused": True, "writes": writes}
    wrong = child.judged(ending, files_before=before, files_after=files_in(there), **names)
    return f"payloads {form}", wrong and f"{what} by {argv[0]}: {wrong}"


def plant(there: Path) -> None:
    """What some payloads need to run: they would, if they were let."""
    (there / "payload.py").write_text(CODE + "\n")
    (there / "payload.pt").write_bytes(zipped(pickled(Calls(eval, CODE), 2)))
    (there / "payload.npy").write_bytes(pickled(Calls(eval, CODE), 2))


def place(there: Path, data: bytes, random: Random) -> tuple[list[str], Path]:
    """Writes a pickle where a command reads weights; that command, and the path."""
    name = random.choice(("x.ckpt", "x.pt", "x.bin", "x.pth", "x.safetensors", "x"))
    path = there / name
    argv = random.choice(
        (
            ["info", name],
            ["convert", name, "-o", "new.safetensors"],
            ["generate", "-m", "demo", "-p", "x", "-y", name, "-o", "out"],
            ["generate", "-m", name, "-p", "x", "-o", "out"],
            ["targets", "-m", name],
            ["train", "-m", name, "-o", "out", "-l", "log"],
            ["train", "-m", "demo", "-p", name, "-o", "out", "-l", "log"],
            ["evaluate", "-m", name, "-y", "demo"],
        )
    )
    path.write_bytes(data)
    return argv, path
