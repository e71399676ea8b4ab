"""Responses that were given, kept in memory for requests that continue them."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from mlx_flashmoe.server.errors import ApiError

MOST_RESPONSES = 1000
MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Stored:
    """A response and its conversation.

    Attributes:
        response: as the API gave it.
        items: input items of the whole conversation before it.
        size: of both, in bytes of JSON.
    """

    response: dict[str, Any]
    items: list[dict[str, Any]]
    size: int


class ResponseStore:
    """The newest responses. The one that was not asked for for the longest time goes first.

    Used on the event loop's thread only.
    """

    def __init__(self, most_responses: int = MOST_RESPONSES, most_bytes: int = MOST_BYTES) -> None:
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self._most_responses, self._most_bytes = most_responses, most_bytes
        self._bytes = 0

    def put(self, response: dict[str, Any], items: list[dict[str, Any]]) -> None:
        """Keeps a response, and the conversation that led to it, as far as there is room."""
        size = len(json.dumps(response)) + len(json.dumps(items))
        self._stored[response["id"]] = Stored(response, items, size)
        self._bytes += size
        while len(self._stored) > self._most_responses or self._bytes > self._most_bytes:
            self._bytes -= self._stored.popitem(last=False)[1].size

    def get(self, response_id: str) -> Stored:
        """Raises ApiError, status 404, for a response that is not kept, or not any more."""
        if response_id not in self._stored:
            raise ApiError(
                404,
                f"the response {response_id[:100]!r} is not stored here, or not any more: send the whole conversation "
                "as input",
                code="response_not_found",
            )
        self._stored.move_to_end(response_id)
        return self._stored[response_id]

    def delete(self, response_id: str) -> None:
        """Raises ApiError, status 404."""
        self._bytes -= self.get(response_id).size
        del self._stored[response_id]

    def resolved(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Items with those that references name in their places.

        Raises:
            ApiError: status 404; an item is not stored.
        """
        if not any(item.get("type") == "item_reference" for item in items):
            return items
        known = {i.get("id"): i for s in self._stored.values() for i in [*s.items, *s.response["output"]]}
        out = []
        for item in items:
            if item.get("type") == "item_reference":
                if item.get("id") not in known:
                    name = str(item.get("id"))[:100]
                    raise ApiError(
                        404, f"the item {name!r} is not stored here, or not any more: send it whole"
                    )
                item = known[item["id"]]
            out.append(item)
        return out
