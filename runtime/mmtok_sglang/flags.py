"""Fields of the settings that are --mmtok-* flags: each is declared once, where its value is kept."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["Flag", "Help", "flags_of"]


@dataclass(frozen=True, slots=True)
class Help:
    """Makes a dataclass field a flag of the field's name: `seed: Annotated[int, Help("...")] = 0`.

    Args:
        text: What --help says of it, in argparse's writing: a percent sign is doubled.
    """

    text: str


@dataclass(frozen=True, slots=True)
class Flag:
    """One --mmtok-* flag.

    Args:
        name: Its name, with underscores, as in `mmtok_NAME` of SGLang's ServerArgs.
        type: What its value is parsed as: text for what is made of text.
        help: What --help says of it.
    """

    name: str
    type: Any
    help: str


def flags_of(owner: type) -> Iterator[Flag]:
    """Gives the flags that a dataclass declares."""
    for name, hint in get_type_hints(owner, include_extras=True).items():
        if get_origin(hint) is Annotated:
            kept, shown = get_args(hint)
            yield Flag(name, _parsed(kept), f"MMTok: {' '.join(shown.text.split())}")


def _parsed(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [each for each in get_args(hint) if each is not type(None)]
        hint = kinds[0] if len(kinds) == 1 else str
    return hint if get_origin(hint) is Literal or hint in (bool, int, float, str) else str
