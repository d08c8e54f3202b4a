"""Prompts of more tokens than a text encoder takes at once: cut into parts that are encoded one by one.

What is said of tokens leaves out the two that start and end every text. A prompt that fits is left alone.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .texts import check_prompt

if TYPE_CHECKING:
    from torch import Tensor

COMMA_REACH = 20  # tokens that a part may end early for its last comma
_COMMAS = (",", ";", ".", "，", "、", "。")
logger = logging.getLogger(__name__)


def split(pipe: Any, prompt: str) -> list[str]:
    """The prompt in parts that the pipeline's text encoders take whole, at least one: cut between words, after a
    comma where one is near; a word that is too long is cut within. Raises UsageError for a text of more characters than
    anybody means to give."""
    check_prompt("prompt", prompt)
    tokenizer = _tokenizer(pipe)
    if tokenizer is None or _fits(pipe, tokenizer, prompt):
        return [prompt]
    parts: list[str] = []
    words: list[str] = []
    for word in _words(pipe, tokenizer, prompt):
        if words and not _fits(pipe, tokenizer, "".join([*words, word])):
            cut = _comma(pipe, tokenizer, words)
            parts.append("".join(words[:cut]).strip())
            words = words[cut:]
        words.append(word)
        if not _fits(pipe, tokenizer, "".join(words)):  # what followed the comma leaves too little room
            parts.append("".join(words[:-1]).strip())
            words = words[-1:]
    return [*parts, "".join(words).strip()]


def count(pipe: Any, *texts: str) -> int:
    """How many parts the longest has."""
    return max(len(split(pipe, text)) for text in texts)


def encode_parts(pipe: Any, prompts: Sequence[str], negative_prompts: Sequence[str] | None, parts: int) -> dict:
    """Keyword arguments of a call of the pipeline: states (B, parts x tokens, D) of prompts and negative prompts that
    have at most so many parts, the empty prompt filling up; SDXL: and the pooled states of the first part."""
    import torch

    def columns(texts: Sequence[str]) -> list[list[str]]:
        rows = [split(pipe, text) for text in texts]
        return [[row[i] if i < len(row) else "" for row in rows] for i in range(parts)]

    wanted = columns(prompts)
    unwanted = [None] * parts if negative_prompts is None else columns(negative_prompts)
    options = {"device": pipe._execution_device, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.no_grad():
        encoded = [
            pipe.encode_prompt(prompt=each, negative_prompt=other, **options)
            for each, other in zip(wanted, unwanted, strict=True)
        ]
    states, negative_states, *pooled = zip(*encoded, strict=True)
    call: dict[str, Tensor] = {"prompt_embeds": torch.cat(states, 1)}
    call["negative_prompt_embeds"] = torch.cat(negative_states, 1)
    for name, tensors in zip(("pooled_prompt_embeds", "negative_pooled_prompt_embeds"), pooled, strict=False):
        call[name] = tensors[0]
    return call


def warn_of_cut(pipe: Any, prompt: str) -> None:
    """Says once of each prompt which words are beyond what text encoders take at once."""
    tokenizer = _tokenizer(pipe)
    if tokenizer is None or _fits(pipe, tokenizer, prompt):
        return
    words, kept = _words(pipe, tokenizer, prompt), 0
    while _fits(pipe, tokenizer, "".join(words[: kept + 1])):
        kept += 1
    _say_cut(prompt, "".join(words[kept:]).strip(), tokenizer.model_max_length - 2)


@functools.cache
def _say_cut(prompt: str, rest: str, room: int) -> None:
    start, rest = _short(prompt, 60), _short(rest, 300)
    logger.warning("prompt '%s': its first %d tokens alone count here, not: %s", start, room, rest)


def _short(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[:width]}..."


def _tokenizer(pipe: Any) -> Any:
    """SDXL's two have one vocabulary; its refiner has the second alone; without text encoders there is none."""
    return getattr(pipe, "tokenizer", None) or getattr(pipe, "tokenizer_2", None)


def _fits(pipe: Any, tokenizer: Any, text: str) -> bool:
    return _length(pipe, tokenizer, text) <= tokenizer.model_max_length - 2


def _length(pipe: Any, tokenizer: Any, text: str) -> int:
    """Tokens of a text, embeddings of textual inversion by the number of their vectors."""
    if hasattr(pipe, "maybe_convert_prompt"):
        text = pipe.maybe_convert_prompt(text, tokenizer)
    return len(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)


def _words(pipe: Any, tokenizer: Any, text: str) -> list[str]:
    """What a text may be cut into: words, each with the white space after it, and pieces of words that do not fit."""
    words: list[str] = []
    for word in re.findall(r"\s*\S+\s*", text):
        words += [word] if _fits(pipe, tokenizer, word) else _pieces(pipe, tokenizer, word)
    return words


def _pieces(pipe: Any, tokenizer: Any, word: str) -> list[str]:
    """A long word in two or more, each of which fits: between its punctuation and letters if it has both."""
    borders = [match.end() for match in re.finditer(r"\w+|[^\w\s]+", word.rstrip())][:-1]
    middle = min(borders, key=lambda at: abs(at - len(word) / 2), default=len(word.rstrip()) // 2)
    pieces = []
    for piece in (word[:middle], word[middle:]):
        pieces += [piece] if len(piece) == 1 or _fits(pipe, tokenizer, piece) else _pieces(pipe, tokenizer, piece)
    return pieces


def _comma(pipe: Any, tokenizer: Any, words: Sequence[str]) -> int:
    """How many of the words go before the cut."""
    for cut in range(len(words) - 1, 0, -1):
        if _length(pipe, tokenizer, "".join(words[cut:])) > COMMA_REACH:
            break
        if words[cut - 1].rstrip().endswith(_COMMAS):
            return cut
    return len(words)
