"""Requests made from a server's OpenAPI document by schemathesis, and what was wrong with the answers.

Runs in a process of its own, as clients do.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass, field

import httpx
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, events, from_schema
from schemathesis.engine.recorder import ScenarioRecorder

from headrace.server import answers
from requirements import IS_LONG

# Per operation, beside some thousand at the edges; in `make test-all` other ones each time.
NUM_EXAMPLES = int(os.environ.get("TESTS_EXAMPLES") or (300 if IS_LONG else 5))
# What JSON Schema cannot say: what is a grammar, how many tokens a text has and a model takes, how two values or
# parameters of a query compare, that a number is written without a point, what is a picture, and what was named before.
BEYOND_SCHEMA = re.compile(
    "must be below|exceed|the context of|tokens are more than|the prompt is empty|are too many"
    "|as many as text_2|differs from|prompts times n|log probabilities are asked for|valid integer"
    "|base64|the image|Too many fields"
    r'|"param":"(guided_[a-z]+|structured_outputs\.[a-z_]+|response_format(\.json_schema\.schema)?|ignore_eos)"'
    r'|"param":"(text\.format(\.schema)?|tools\[[0-9]+\](\.function)?\.parameters)"|is there twice|is no tool\'s name'
    "|does not reason|output_config.format|output_format|format: "
    "|there is no echo|prompt: Field required|names no stream|in the future|not an event id of this stream"
    "|the last message|has more than 64 names|only a background response|in include"
)


@dataclass
class Outcome:
    """What was sent, and every answer that is not as the document has it."""

    num_right: int = 0
    num_wrong: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, recorder: ScenarioRecorder) -> None:
        for id, interaction in recorder.interactions.items():
            if interaction.response is not None:
                self.statuses[interaction.response.status_code] += 1
            if id in recorder.cases and (meta := recorder.cases[id].value.meta) is not None:
                self.num_wrong += meta.generation.mode.is_negative
                self.num_right += meta.generation.mode.is_positive
        for id, checks in recorder.checks.items():
            for check in checks:
                if check.status is not Status.FAILURE or check.failure_info is None:
                    continue
                case, response = recorder.cases[id].value, recorder.interactions[id].response
                text = "" if response is None else response.text
                failure = check.failure_info.failure
                if check.name == "positive_data_acceptance" and BEYOND_SCHEMA.search(text):
                    continue
                if case.media_type == "multipart/form-data" and "`type`" in failure.message:
                    continue  # a form has nothing but texts, and an empty one or an empty list is no field at all
                self.faults.append(f"{failure.title}: {failure.message}\n{text[:300]}\n{case.as_curl_command()[:1000]}")


def try_everything(url: str, secret: str) -> Outcome:
    """Call all operations of a server."""
    config = SchemathesisConfig.from_dict(
        {
            # GET /v1/stream wants to be asked for events, and no parameter may be called `accept`.
            "headers": {"Authorization": f"Bearer {secret}", "Accept": "text/event-stream, */*"},
            "generation": {
                "max-examples": NUM_EXAMPLES,
                "deterministic": not IS_LONG,
                "database": "none",
            },
            "base-url": url,
            "continue-on-failure": True,
            "suppress-health-check": ["all"],
            "checks": {
                # A deadline that a request asks for is none of the server's errors.
                "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "504"]},
                # What was cancelled can still be read.
                "use_after_free": {"enabled": False},
            },
        }
    )
    document = httpx.get(f"{url}/openapi.json", headers={"x-api-key": secret}).json()
    for operation in (operation for item in document["paths"].values() for operation in item.values()):
        # Behind the first request with a key all others are another one, and would be told so and no more.
        operation["parameters"] = [each for each in operation["parameters"] if each["name"] != "Idempotency-Key"]
    for name, schema in document["components"]["schemas"].items():
        # What is not in the document may come one day, but should not be there today.
        if hasattr(answers, name) and name != answers.Error.__name__:
            schema["additionalProperties"] = False
    api = schemathesis.openapi.from_dict(document, config=config)
    outcome = Outcome()
    for event in from_schema(api).execute():
        assert not isinstance(event, events.NonFatalError | events.FatalError | events.Interrupted), event
        if isinstance(event, events.ScenarioFinished):
            outcome.add(event.recorder)
    return outcome
