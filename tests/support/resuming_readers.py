"""Readers that come back to a stream, wherever they are told, from behind the last event that they have seen."""

import json
from contextlib import suppress
from typing import Any

import httpx


class Reader:
    """What an EventSource sees of a stream over any number of connections."""

    def __init__(self, created: dict[str, Any]) -> None:
        self.created = created
        self.events: list[dict[str, str]] = []

    def follow(self, url: str, last_event_id: str | None = None) -> None:
        """Read until the connection ends, however it does."""
        seen = last_event_id or next((event["id"] for event in reversed(self.events) if "id" in event), "")
        headers = {"accept": "text/event-stream", **({"last-event-id": seen} if seen else {})}
        events_url = url + self.created["events_url"]
        with suppress(httpx.TransportError), httpx.stream("GET", events_url, headers=headers, timeout=60) as answer:
            assert answer.status_code in (200, 204), answer.read()
            event: dict[str, str] = {}
            for line in answer.iter_lines():
                if line and not line.startswith(":"):
                    name, _, value = line.partition(": ")
                    event[name] = value
                elif event:  # whole: what is torn off counts as not seen
                    if "event" in event:
                        self.events.append(event)
                    event = {}

    @property
    def text(self) -> str:
        return "".join(json.loads(event["data"])["text"] for event in self.events if event["event"] == "token")


class ResponseReader(Reader):
    """The same of a response that is made in the background."""

    def follow(self, url: str, last_event_id: str | None = None) -> None:
        seen = int(last_event_id or (self.events[-1]["id"] if self.events else -1))
        query = {"stream": "true", **({"starting_after": str(seen)} if seen >= 0 else {})}
        path = f"{url}/v1/responses/{self.created['id']}"
        with suppress(httpx.TransportError), httpx.stream("GET", path, params=query, timeout=60) as answer:
            assert answer.status_code == 200, answer.read()
            value = ""
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    value = line.removeprefix("data: ")
                elif not line and value:  # whole
                    data = json.loads(value)
                    self.events.append({"event": data["type"], "id": str(data["sequence_number"]), "data": value})
                    value = ""

    @property
    def text(self) -> str:
        deltas = (event for event in self.events if event["event"] == "response.output_text.delta")
        return "".join(json.loads(event["data"])["delta"] for event in deltas)
