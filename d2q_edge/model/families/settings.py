"""Read settings of a config.json, which is untrusted input, with checks of their types and ranges."""

import sys
from collections.abc import Mapping
from typing import Any

from d2q_edge.errors import D2QError


class Settings:
    """The content of a config.json; all methods raise D2QError for an invalid value."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def _int(self, key: str, *, default: int | None = None, maximum: int = 2**31 - 1) -> int:
        value = default if self.config.get(key) is None else self.config[key]
        if value is None:
            raise D2QError(f"config.json has no {key}")
        if type(value) is not int or not 0 < value <= maximum:
            raise D2QError(f"config.json: {key} must be a whole number from 1 to {maximum}, not {value!r}")
        return value

    def _float(self, key: str, *, default: float) -> float:
        return positive_float(key, default if self.config.get(key) is None else self.config[key])

    def _flag(self, key: str, *, default: bool = False) -> bool:
        value = default if self.config.get(key) is None else self.config[key]
        if not isinstance(value, bool):
            raise D2QError(f"config.json: {key} must be true or false, not {value!r}")
        return value


def positive_float(key: str, value: object) -> float:
    """Return a setting as a float; raise D2QError if it isn't a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise D2QError(f"config.json: {key} must be a positive number, not {value!r}")
    return float(value)
