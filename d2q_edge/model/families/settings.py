"""Read settings of a config.json, which is untrusted input, with checks of their types and ranges."""

import math
from collections.abc import Mapping
from typing import Any

from d2q_edge.errors import D2QError


class Settings:
    """The content of a config.json; all methods raise D2QError for an invalid value."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def _int(self, key: str, *, default: int | None = None, maximum: int = 2**31 - 1) -> int:
        value = self.config.get(key)
        if value is None:
            value = default
        if value is None:
            raise D2QError(f"config.json has no {key}")
        if type(value) is not int or not 0 < value <= maximum:
            raise D2QError(f"config.json: {key} must be a whole number from 1 to {maximum}, not {value!r}")
        return value

    def _float(self, key: str, *, default: float) -> float:
        value = self.config.get(key)
        return positive_float(key, default if value is None else value)

    def _flag(self, key: str, *, default: bool = False) -> bool:
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise D2QError(f"config.json: {key} must be true or false, not {value!r}")
        return value


def positive_float(key: str, value: object) -> float:
    """Return a setting as a float.

    Raises:
        D2QError: it isn't a finite number above zero.
    """
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < float(value) < math.inf:
            return float(value)
    except OverflowError:
        pass
    raise D2QError(f"config.json: {key} must be a positive number, not {value!r}")
