"""YAML from files that anyone may have written: plain values of bounded size, or one class of error."""

from __future__ import annotations

from typing import Any

import yaml

#: More values than any config has, and deeper ones. Aliases count as what they stand for: nine lines of them can stand
#: for a billion values, which whoever prints or checks them would have to walk through.
MOST_VALUES, DEEPEST = 100_000, 100
#: Digits of an integer; more than Python prints, and no setting has them.
MOST_DIGITS = 4000


def read_yaml(text: str, loader: type = yaml.SafeLoader) -> Any:
    """The value of one YAML document. Raises ValueError in words for anything else, and for one that is too large."""
    try:
        value = yaml.load(text, loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())[:500]) from None
    except RecursionError:
        raise ValueError(f"values lie deeper in each other than {DEEPEST}") from None
    except (TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        # PyYAML's own readers of !!int, !!bool, !!timestamp and their like trip over what is none.
        raise ValueError(f"a value is not of the kind it looks like ({type(error).__name__}: {error})") from None
    _check(value)
    return value


def _check(value: Any) -> None:
    """Raises ValueError for a value that is too large, too deep or inside itself."""
    waiting, seen = [(value, 0)], 0
    while waiting:
        found, depth = waiting.pop()
        seen += 1
        if isinstance(found, int) and found.bit_length() > 3 * MOST_DIGITS:
            raise ValueError(f"an integer has more than {MOST_DIGITS} digits")
        inside = [*found, *found.values()] if isinstance(found, dict) else found
        if not isinstance(inside, (list, tuple, set)):
            continue
        if inside and depth >= DEEPEST:
            raise ValueError(f"values lie deeper in each other than {DEEPEST}, or one holds itself")
        if seen + len(waiting) + len(inside) > MOST_VALUES:
            raise ValueError(f"it stands for more than {MOST_VALUES} values: write lists out instead of using aliases")
        waiting += [(part, depth + 1) for part in inside]
