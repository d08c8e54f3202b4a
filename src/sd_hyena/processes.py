"""The processes of one run, where torchrun, accelerate launch or srun start the same command several times.

Each does its share of the work. What they tell each other goes through torch's key-value store, so that drawing needs
no process group.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import SdHyenaError, UsageError

T = TypeVar("T")
POLL = 0.05  # seconds between two looks at what others have to say
MEETING = 60.0  # seconds that the main process, with its model loaded, waits for the others to come
PULSE, SILENCE = 1.0, 20.0  # seconds: who works says so as often; who says nothing for so long has ended
LOST = "another process of this run has ended, and so does this one; what is written stays (train: --resume)"
_PORTS = 61440, 4096  # the first, and how many: above those that Linux gives out by itself
_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe", re.IGNORECASE)
_said: Counter[str] = Counter()
_groups = itertools.count()
_opening = threading.Lock()


@dataclass(frozen=True)
class Place:
    """One of ``count`` processes; ``local`` numbers those on one machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that locks, reads what all need, and speaks."""
        return self.rank == 0

    def has(self, number: int) -> bool:
        """Whether the item of this number is this process's to do."""
        return number % self.count == self.rank


ALONE = Place()


def here() -> Place:
    """This process's place, as torchrun or srun gave it. Raises UsageError for variables that make no sense."""
    given = os.environ
    try:
        if "RANK" not in given and int(given.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
            given.update(_from_slurm(given))
        if "WORLD_SIZE" not in given:
            return ALONE
        place = Place(*(int(given.get(name) or 0) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        sensible = 0 <= place.rank < place.count and place.local >= 0
        if not sensible or (place.count > 1 and not (given["MASTER_ADDR"] and int(given["MASTER_PORT"]))):
            raise ValueError
    except (KeyError, ValueError):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        found = ", ".join(f"{name} {given[name]!r}" if name in given else f"no {name}" for name in names)
        raise UsageError(f"the environment is not that of one of several processes: {found}") from None
    return place


def _from_slurm(given: Mapping[str, str]) -> dict[str, str]:
    """torch's variables for a task of srun's. A batch script itself is no task, though it has a SLURM_PROCID; nor is
    what a task starts by torchrun, which has torch's already."""
    first = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\])?([^,]*)", given["SLURM_STEP_NODELIST"])
    if first is None:
        raise ValueError
    start, size = _PORTS
    port = start + (int(given["SLURM_JOB_ID"]) + 997 * int(given["SLURM_STEP_ID"])) % size
    return {
        "RANK": given["SLURM_PROCID"],
        "WORLD_SIZE": given["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": given["SLURM_LOCALID"],
        "MASTER_ADDR": "".join(part or "" for part in first.groups()),
        "MASTER_PORT": str(port),
    }


@contextlib.contextmanager
def speaking(alone: bool) -> Iterator[None]:
    """Standard output is the main process's within the block; the others' goes nowhere. Raises UsageError if the work
    is for one process ``alone`` and there are more."""
    place = here()
    if alone and place.count > 1:
        raise UsageError(f"this command runs in one process, not in {place.count}: start it by itself")
    if place.count > 1 and _has_agent():
        _store()  # while it is there: who is left when the others are gone would wait for it
    with contextlib.ExitStack() as stack:
        if not (place.is_main or _has_agent()):  # torchrun's agent itself ends who is left
            stack.enter_context(_pulse(f"pulse/{place.rank}"))
        if not place.is_main:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


def first_to_say(line: str) -> bool:
    """Whether no other process of this run has said the same, as often: for what all of them come to find. Where they
    cannot ask each other, the main one speaks."""
    try:
        place = here()
    except UsageError:
        return True
    if place.count == 1:
        return True
    if not (_has_agent() or _opened.cache_info().currsize):
        return place.is_main or line.endswith(LOST)
    _said[line] += 1
    key = hashlib.sha256(f"{line}\n{_said[line]}".encode(errors="replace")).hexdigest()
    try:
        return _store().add(f"said/{key}", 1) == 1
    except RuntimeError:  # better twice than not at all
        return True


def lost(error: Exception) -> bool:
    """Whether an error is torch's word for another process of this run that has ended."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or here().count == 1:
        return False
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
    )


class Group:
    """How the processes of a run share a piece of work. All make one, in the same order; items are JSON."""

    def __init__(self, place: Place) -> None:
        self.place, self._number, self._words = place, next(_groups), itertools.count()

    def agree(self, make: Callable[[], T], last: bool = False) -> T:
        """What ``make`` returns in the main process, which alone calls it; the others wait for it.

        ``last``: the main process waits until all have it, or its store might end with it before they have.
        """
        if self.place.count == 1:
            return make()
        key = f"{self._number}/main/{next(self._words)}"
        if self.place.is_main:
            value = make()
            _store().set(key, json.dumps(value))
            until = time.monotonic() + SILENCE * last
            while time.monotonic() < until and _store().add(f"{key}/heard", 0) < self.place.count - 1:
                time.sleep(POLL)
            return value
        while not _store().check([key]):
            time.sleep(POLL)
        value = json.loads(_store().get(key))
        _store().add(f"{key}/heard", 1)
        return value

    def gather(self, own: Iterable[T]) -> Iterator[T]:
        """In the main process, its own items and the others', as they come; the others give theirs and get none."""
        mine, others = f"{self._number}/{self.place.rank}", range(1, self.place.count)
        if not self.place.is_main:
            for number, item in enumerate(itertools.chain(own, [None])):
                _store().set(f"{mine}/{number}", json.dumps(item))
            return
        heard = dict.fromkeys(others, 0)
        pulses: dict[int, tuple[int, float]] = {}
        for item in own:
            yield item
            yield from self._news(heard)
        while heard:
            yield from self._news(heard)
            for rank in heard:
                beats, now = _store().add(f"pulse/{rank}", 0), time.monotonic()
                if pulses.setdefault(rank, (beats, now))[0] != beats:
                    pulses[rank] = beats, now
                if now - pulses[rank][1] > SILENCE and not _has_agent():
                    raise SdHyenaError(LOST)
            time.sleep(POLL)

    def _news(self, heard: dict[int, int]) -> Iterator[Any]:
        """What others have said since; who has said all leaves ``heard``."""
        for rank in list(heard):
            while rank in heard and _store().check([key := f"{self._number}/{rank}/{heard[rank]}"]):
                heard[rank] += 1
                item = json.loads(_store().get(key))
                if item is None:
                    del heard[rank]
                else:
                    yield item


@contextlib.contextmanager
def _pulse(key: str) -> Iterator[None]:
    """Counts up within the block, whatever this process does, once the main process keeps a store."""
    over = threading.Event()

    def beat() -> None:
        with contextlib.suppress(RuntimeError):  # the main process has ended
            store = _store()
            while not over.wait(PULSE):
                store.add(key, 1)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2 * PULSE)  # it may wait for a store that never comes


def _has_agent() -> bool:
    """Whether torchrun's agent keeps a store for the processes that it started."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store() -> Any:
    """The run's store: the agent's, that of the process group, or one that the main process keeps. Raises SdHyenaError
    if others do not come to that one."""
    with _opening:
        return _opened()


@functools.cache
def _opened() -> Any:
    from torch import distributed

    place = here()
    keeps = place.is_main and not _has_agent() and not distributed.is_initialized()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(host, port, is_master=keeps, wait_for_workers=False)
    store = distributed.PrefixStore(f"sd-hyena/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    if not place.is_main:
        store.add("joined", 1)
    elif keeps:  # or it might end before a late one has found it, who would wait for it to come
        _meet(store, place.count - 1)
    return store


def _meet(store: Any, others: int) -> None:
    start = time.monotonic()
    while (joined := store.add("joined", 0)) < others:
        if time.monotonic() - start > MEETING:
            raise SdHyenaError(f"{joined + 1} of {others + 1} processes have come within {MEETING:g} s: this one ends")
        time.sleep(POLL)
