"""Which of a file's layers go where in a UNet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .arguments import given_words
from .errors import UsageError
from .hyena_file import HyenaFile
from .targets import Target, check_fit, select


def choose_layers(
    available: Mapping[str, Target], file: HyenaFile, targets: str | Iterable[str] | None
) -> dict[str, str]:
    """Stored name -> target name, by what a UNet has (``available``) and what is asked for.

    Raises UsageError if the choice makes no sense for this file, or a layer does not fit this UNet.
    """
    chosen = _choose(available, file, targets)
    for stored, name in chosen.items():
        check_layer(available, file, stored, name)
    return chosen


def check_layer(available: Mapping[str, Target], file: HyenaFile, stored: str, name: str) -> None:
    """Raises UsageError unless the file's layer ``stored`` fits at target ``name``."""
    config = file.layers[stored].config
    try:
        check_fit(available, name, config)
    except UsageError as error:
        raise UsageError(f"{file.label}: {error}") from None
    heads = available[name].heads
    if "feature_map" in config.entry.options and config.attention_heads != heads:
        raise UsageError(
            f"{file.label}: layer {name} has {heads} attention heads, but the operator was taught by one with "
            f"{config.attention_heads}: it belongs to another architecture"
        )


def names_of(available: Mapping[str, Target], words: list[str]) -> list[str]:
    """What a list of names and group words selects."""
    return [target.name for target in select(available, ",".join(words))] if words else []


def _choose(available: Mapping[str, Target], file: HyenaFile, targets: str | Iterable[str] | None) -> dict[str, str]:
    words = None if targets is None else given_words(targets, "targets")
    if words == []:
        raise UsageError(f"{file.label}: targets names no layer: leave it out for all that the file holds")
    if "" in file.layers:
        if words is None:
            raise UsageError(f"{file.label}: does not say which layer it holds: name it with a target such as IN01")
        names = names_of(available, words)
        if len(names) != 1:
            raise UsageError(f"{file.label}: holds one layer, but target {','.join(words)!r} selects {len(names)}")
        return {"": names[0]}
    if words is None:
        return {name: name for name in file.layers}
    wanted = names_of(available, words)
    group = any(word.strip().lower() in ("all", "high") for word in words)
    missing = [name for name in wanted if name not in file.layers]
    if (missing and not group) or len(missing) == len(wanted):
        raise UsageError(f"{file.label}: holds no layer {missing[0]}; it has {', '.join(file.layers)}")
    return {name: name for name in wanted if name in file.layers}
