"""argparse with values that may begin with a dash, and flags that may be written with dashes or underscores."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from ..processes import first_to_say
from ..texts import one_line


class Parser(argparse.ArgumentParser):
    """Reads ``--some-name`` as ``--some_name``, or any beginning of it that no other flag shares; the word after a
    flag that takes a value is that value, unless it is a flag itself, or ``--``."""

    def __init__(self, **options: Any) -> None:
        self.flags: dict[str, argparse.Action] = {}
        self.has_commands = False
        super().__init__(allow_abbrev=False, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        action = super().add_argument(*names, **options)
        self.flags |= dict.fromkeys(action.option_strings, action)
        return action

    def add_subparsers(self, **options: Any) -> Any:
        self.has_commands = True
        return super().add_subparsers(**options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        return super().parse_known_args(None if args is None else self.joined(args), namespace)

    def error(self, message: str) -> NoReturn:
        """One line, and exit status 2."""
        line = f"sd-hyena: {one_line(message, 80)} (see {self.prog} --help)\n"
        self.exit(2, line if first_to_say(line) else None)

    def joined(self, words: Sequence[str]) -> list[str]:
        """The words with flags by their names, and each of their values in one word with its flag."""
        result: list[str] = []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if word == "--" or (self.has_commands and not word.startswith("-")):  # what follows is the command's
                return [*result, word, *rest]
            name, equals, value = word.partition("=")
            flag = self._flag(name) if name.startswith("--") else name
            action = self.flags.get(flag)
            if action is None:
                result.append(word)
                continue
            takes_next = action.nargs is None and not equals and rest and self._is_value(rest[0])
            if takes_next:
                equals, value = "=", rest.pop(0)
            if equals and value == "--":  # older versions of argparse take it out
                self.error(f"argument {flag}: -- is no value")
            result.append(flag + equals + value)
        return result

    def _is_value(self, word: str) -> bool:
        name = word.partition("=")[0]
        return word != "--" and name not in self.flags and _canonical(name) not in self.flags

    def _flag(self, name: str) -> str:
        """The whole name of a flag that is meant by ``name``, or ``name`` itself."""
        canonical = _canonical(name)
        if canonical in self.flags:
            return canonical
        found = [flag for flag in self.flags if flag.startswith(canonical)] if len(name) > 2 else []
        if len(found) > 1:
            self.error(f"ambiguous option: {name} could match {', '.join(found)}")
        return found[0] if found else name


def _canonical(name: str) -> str:
    return "--" + name[2:].replace("-", "_") if name.startswith("--") else name
