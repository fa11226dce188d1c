"""A fake model that says what it is told to."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

import chat_templates as templates
from fake_engine import EOS, FakeRunner, byte_tokenizer, fake_logprobs, make_scheduler
from headrace.scheduler.messages import RowResult
from headrace.scheduler.scheduler import ScheduledRow, SchedulerOutput
from headrace.server.tokenizer import Tokenizer
from live_app import LiveApp, live_app


class SpeakingRunner(FakeRunner):
    """Choice i of any prompt is answered with text i, the last one where there are fewer."""

    def __init__(self, tokenizer: Tokenizer, *answers: str, max_context_tokens: int = 4096) -> None:
        super().__init__(max_context_tokens)
        self._answers = [(*tokenizer.encode(answer, add_special_tokens=False), EOS) for answer in answers]
        self.vocab_size = 1 + max(EOS, *(token_id for answer in self._answers for token_id in answer))
        self.prompts: set[tuple[int, ...]] = set()

    def _compute(self, output: SchedulerOutput, pending: Mapping[int, int] = MappingProxyType({})) -> list[RowResult]:
        self.prompts |= {row.sequence.request.prompt_token_ids for row in output.rows}
        results = super()._compute(output, pending)
        return [
            self._said(row, result) if row.is_sampled else result
            for row, result in zip(output.rows, results, strict=True)
        ]

    def _said(self, row: ScheduledRow, result: RowResult) -> RowResult:
        request = row.sequence.request
        answer = self._answers[min(request.sampling.choice, len(self._answers) - 1)]
        token_id = answer[row.start + row.num_tokens - len(request.prompt_token_ids)]
        num_top = request.sampling.num_logprobs
        return result._replace(
            token_id=token_id, logprobs=None if num_top is None else fake_logprobs(token_id, num_top)
        )


@asynccontextmanager
async def speaking(answer: str, template: str = templates.QWEN3, **settings: Any) -> AsyncIterator[LiveApp]:
    """A model that answers so, whatever it is asked."""
    tokenizer = byte_tokenizer(template)
    runner, scheduler = SpeakingRunner(tokenizer, answer), make_scheduler(num_blocks=512)
    async with live_app(runner=runner, scheduler=scheduler, tokenizer=tokenizer, **settings) as app:
        yield app
