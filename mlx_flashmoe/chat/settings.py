"""Settings that can be changed during a chat: how tokens are picked, how long an answer may be, thinking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_flashmoe.errors import RequestError
from mlx_flashmoe.generate import check_counts
from mlx_flashmoe.sampling import picking

NUMBERS: dict[str, type[int] | type[float]] = {
    "temp": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
    "repetition_context_size": int,
    "seed": int,
    "max_tokens": int,
}
SWITCHES = {"on": True, "off": False}


class Settings:
    """The settings of a chat.

    Args:
        sampling: arguments of ``picking``; its defaults for those that are missing.
        max_tokens: tokens of an answer at most; -1: no limit.
        think: ``enable_thinking`` of the chat template; None: its own default.

    Raises:
        RequestError: a value out of range.
    """

    def __init__(
        self, sampling: Mapping[str, Any] | None = None, max_tokens: int = -1, think: bool | None = None
    ) -> None:
        self._sampling = dict(sampling or {})
        self.max_tokens = max_tokens
        self.think = think
        check_counts(max_tokens, None)
        self._sampler, self._processors = picking(**self._sampling)

    @property
    def generation(self) -> dict[str, Any]:
        """Arguments of ``stream_generate``."""
        return {"sampler": self._sampler, "logits_processors": self._processors}

    @property
    def template(self) -> dict[str, bool]:
        """Variables of the chat template."""
        return {} if self.think is None else {"enable_thinking": self.think}

    def set(self, name: str, value: str) -> None:
        """Changes a setting.

        Args:
            name: with hyphens or underscores.

        Raises:
            RequestError: there is no such setting, or the value is not one of its values.
        """
        key = name.replace("-", "_")
        if key == "think":
            if value not in SWITCHES:
                raise RequestError(f"think is on or off, not {value!r}")
            self.think = SWITCHES[value]
            return
        if key not in NUMBERS:
            raise RequestError(f"there is no setting {name}; /set lists them")
        try:
            number = NUMBERS[key](value)
        except ValueError:
            kind = "a whole number" if NUMBERS[key] is int else "a number"
            raise RequestError(f"{_shown(key)} is {kind}, not {value!r}") from None
        if key == "max_tokens":
            check_counts(int(number), None)
            self.max_tokens = int(number)
            return
        sampling = {**self._sampling, key: number}
        self._sampler, self._processors = picking(**sampling)
        self._sampling = sampling

    def rows(self) -> list[tuple[str, str]]:
        """Each setting with its value."""
        values = {**self._sampling, "max_tokens": self.max_tokens}
        numbers = [(_shown(key), _value(values.get(key))) for key in NUMBERS]
        return [*numbers, ("think", _value(self.think))]


def _value(value: float | bool | None) -> str:
    return (
        "not set"
        if value is None
        else str(value)
        if not isinstance(value, bool)
        else "on"
        if value
        else "off"
    )


def _shown(key: str) -> str:
    return key.replace("_", "-")
