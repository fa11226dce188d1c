"""What lm-evaluation-harness sends to have texts scored gets it Hugging Face's log-likelihoods."""

from pathlib import Path
from typing import Any

import pytest

from asgi_client import call
from fake_engine import EOS, byte_tokenizer
from headrace.scheduler.config import EngineConfig
from headrace.scheduler.model_loader import load_engine
from live_app import live_app
from scored_model import loglikelihood, write_scored_model
from tiny_models import generate_with_hugging_face

pytestmark = pytest.mark.anyio

TEXTS = [
    ("The mill", " wheel turns"),
    ("The water of the headrace fills the buckets, ", "one after the other, until the wheel turns by their weight."),
    ("\U0001f30a", "é"),
    ("a", "b"),
    ("Question: what is 17 + 25?\nAnswer:", " 42"),
    ("Question: what is 17 + 25?\nAnswer:", " 17"),
]
PAIRS = [([*context.encode()], [*continuation.encode()]) for context, continuation in TEXTS]
# A text that is scored from its first token on, behind the token that stands before all texts; and no text at all.
PAIRS += [([EOS], [*b"the whole of it"]), ([EOS], [EOS, EOS])]


async def test_token_id_prompts_are_scored_as_hugging_face_scores_them(tmp_path: Path) -> None:
    model = write_scored_model(tmp_path)
    generated = ((byte, generate_with_hugging_face(model, [byte], 3)) for byte in b"abcdefgh")
    likeliest = next(([byte], answer) for byte, answer in generated if EOS not in answer)
    pairs = [*PAIRS, likeliest]
    expected = [loglikelihood(model, *pair) for pair in pairs]
    scheduler, runner = load_engine(EngineConfig(tmp_path, dtype="float32", kv_cache_bytes=1 << 22))
    engine: Any = runner
    async with live_app(runner=engine, scheduler=scheduler, tokenizer=byte_tokenizer()) as app:
        body = {
            "model": "fake",
            "prompt": [context + continuation for context, continuation in pairs],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        }
        answer = (await call(app.asgi, "POST", "/v1/completions", body)).json()
        scored = (await call(app.asgi, "POST", "/v1/completions", body | {"max_tokens": 0})).json()
    reasons = {choice["finish_reason"] for choice in answer["choices"]}
    assert reasons == {"stop", "length"}, "some answers are over before they begin"
    for (context, continuation), (total, is_greedy), choice, alone in zip(
        pairs, expected, answer["choices"], scored["choices"], strict=True
    ):
        own, top = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        assert len(own) == len(context) + len(continuation) + 1
        assert own[0] is None
        # As the harness reads it.
        own, top = own[len(context) : -1], top[len(context) : -1]
        assert sum(own) == pytest.approx(total, abs=1e-3)
        assert all(value == max(best.values()) for value, best in zip(own, top, strict=True)) == is_greedy
        assert alone["logprobs"]["token_logprobs"][len(context) :] == pytest.approx(own, abs=1e-3)
    assert expected[-1][1]
