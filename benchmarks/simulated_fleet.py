"""Replicas, routers and users on one virtual clock.

Each replica is a whole simulated server: the production scheduler, admission and engine client. A thousand users to a
replica talk with it: a conversation begins with one of a few instructions, each turn has all before it as its prompt,
and between turns its user thinks; lengths are the Azure conversation trace's. Routers choose by `routing`'s policies;
they ask each replica for its gauges once in every interval, one after the other. The same seed has the same users ask
the same, whatever the policy.
Counted are the turns that are asked in the window behind the warm-up; then nobody asks any more, and when all of those
have their first tokens everybody leaves. A refused user thinks as after an answer and asks again.
"""

import gc
import itertools
import math
import random
import time
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from headrace.benchmarks.arrivals import Arrival, read_trace
from headrace.benchmarks.routing import POLICIES, Gauges, Policy
from headrace.benchmarks.simulated_server import (
    END_TOKEN,
    CostModel,
    EventQueue,
    Job,
    Life,
    ServerSettings,
    SimulatedServer,
)
from headrace.scheduler.config import SchedulingPolicy
from headrace.scheduler.messages import GenerationRequest, SamplingParams, Tier
from headrace.scheduler.sequence import Sequence as EngineSequence
from headrace.server.replica_routing import BYTES_PER_TOKEN, PIECE_TOKENS, PromptKey, ReplicaLoad

_TRACE = Path(__file__).parent / "traces" / "azure_2023_conversation.csv"
_NUM_ARRIVALS = 2000
_LENGTH_SCALE = 0.25
USERS_PER_REPLICA = 1000
# A conversation's turns, in the mean of a geometric distribution, and the thought before the next one: lognormal.
_MEAN_TURNS = 4.0
_THOUGHT_MEDIAN_S, _THOUGHT_SIGMA = 20.0, 1.0
_MAX_CONVERSATION_TOKENS = 2048
# Instructions, the first the most used (Zipf), of 32 to 512 tokens.
_NUM_INSTRUCTIONS = 64
_INSTRUCTION_TOKENS = (32, 64, 128, 256, 512)
_MAX_TOKENS = 1024
# A prompt's own tokens: which conversation it is, then the same text in all.
_TEXT = tuple(ord("a") + (i * 3 + i // 5) % 26 for i in range(2**14))
_FIRST_OWN_TOKEN = 10_000
_SETTINGS = ServerSettings(
    num_blocks=8192,
    max_num_batched_tokens=1024,
    policy=SchedulingPolicy(itl_targets_s=dict.fromkeys(Tier, 0.15)),
    ttft_targets_s=(0.5, 2.0, 30.0),
)
PIECES_PER_REPLICA = _SETTINGS.num_blocks * _SETTINGS.block_size // PIECE_TOKENS
# As of a large model whose weights take their time to read, whoever decodes beside: batches are wide, steps are few.
_COSTS = CostModel(3e-2, 2e-4, 5e-4, 2e-7, 2e-8)
WARM_UP_S, WINDOW_S = 5.0, 2.0
# First tokens that are missing at a window's end are waited for so much longer, again and again.
_GRACE_S = 0.5
# Who was answered so lately is in a replica's cache when a run begins.
_CACHED_S = 60.0


@dataclass(frozen=True, slots=True)
class Setting:
    """Of a run. `rate_per_s` are turns asked per replica, were none refused; `window_s` comes after `warm_up_s`.
    `num_fleets` of them, each with users of its own, are counted as one."""

    policy: str
    num_replicas: int
    rate_per_s: float = 5.0
    interval_s: float = 1.0
    counts_sent: bool = True
    num_routers: int = 1
    num_fleets: int = 1
    warm_up_s: float = WARM_UP_S
    window_s: float = WINDOW_S
    seed: int = 1

    @property
    def end_s(self) -> float:
        return self.warm_up_s + self.window_s

    @property
    def cycle_s(self) -> float:
        """From one conversation of a user to the next, in the mean."""
        return USERS_PER_REPLICA * _MEAN_TURNS / self.rate_per_s

    @property
    def thinking_s(self) -> float:
        """Of that, in thoughts between turns."""
        return (_MEAN_TURNS - 1) * _THOUGHT_MEDIAN_S * math.exp(_THOUGHT_SIGMA**2 / 2)

    @property
    def away_s(self) -> float:
        return self.cycle_s - self.thinking_s


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a run. Turns and times are those of the window; `imbalance` is the standard deviation over replicas of their
    output tokens, over the mean; `num_streams` is how many are open at a replica in the mean. `cpu_s` is what the run
    took here."""

    setting: Setting
    num_users_seen: int
    num_turns: int
    refused_share: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p99_s: float
    hit_share: float
    tokens_per_s: float  # of a replica
    imbalance: float
    num_streams: float
    cpu_s: float

    @property
    def turns_per_s(self) -> float:
        """That a replica is asked, those that it refuses included."""
        setting = self.setting
        return self.num_turns / (setting.window_s * setting.num_replicas * setting.num_fleets)


@dataclass(frozen=True, slots=True)
class Turn(Job):
    """A request of a conversation: its group's instruction and all said before are the prompt's beginning."""

    conversation: int = 0

    def prompt(self) -> tuple[int, ...]:
        num_own = self.num_prompt_tokens - self.num_shared_tokens
        instruction = (1000 + self.group,) * self.num_shared_tokens
        return (*instruction, _FIRST_OWN_TOKEN + self.conversation, *_TEXT[1:num_own])

    def token(self, index: int) -> int:
        if index >= self.num_answer_tokens:
            return END_TOKEN
        return _TEXT[self.num_prompt_tokens - self.num_shared_tokens + index]

    def key(self) -> PromptKey:
        """The prompt as routers know it. A number stands for a hash: the instruction's, or the conversation's."""
        num_pieces = self.num_prompt_tokens // PIECE_TOKENS
        num_shared = min(num_pieces, self.num_shared_tokens // PIECE_TOKENS)
        shared = (-1 - self.group * 2**8 - i for i in range(num_shared))
        own = (self.conversation * 2**8 + i for i in range(num_shared, num_pieces))
        pieces = tuple(number.to_bytes(8, signed=True) for number in (*shared, *own))
        return PromptKey(self.num_prompt_tokens * BYTES_PER_TOKEN, pieces)


class _Drawn(NamedTuple):
    """What a user's turn is like: its message, where the conversation begins with it and where it goes on, its answer,
    whether another turn follows, and after how long; else after how long another conversation."""

    num_first_tokens: int
    num_next_tokens: int
    num_answer_tokens: int
    goes_on: bool
    thought_s: float
    away_s: float


@dataclass(slots=True)
class _User:
    """Somebody who is in a conversation, or about to begin one. `num_tokens` are those of the conversation so far."""

    number: int
    drawn: _Drawn
    num_asked: int = 0
    num_conversations: int = 0
    num_tokens: int = 0


@dataclass(slots=True)
class _Tally:
    """What is counted of a run; `tokens` are of each replica."""

    num_seen: int = 0
    num_turns: int = 0
    num_refused: int = 0
    ttfts_s: "array[float]" = field(default_factory=lambda: array("f"))
    gaps_s: "array[float]" = field(default_factory=lambda: array("f"))
    stream_s: float = 0.0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    tokens: list[int] = field(default_factory=list)


class Fleet:
    """The replicas, the routers and the users of a run."""

    def __init__(self, setting: Setting, tally: _Tally) -> None:
        self.setting = setting
        self._tally = tally
        self._queue = EventQueue()
        # A refusal's advice on when to come back, which nobody here follows, is drawn by everybody's generator.
        random.seed(setting.seed)
        self.servers = [
            SimulatedServer(
                _SETTINGS,
                _COSTS,
                queue=self._queue,
                on_published=partial(self._note_published, replica),
            )
            for replica in range(setting.num_replicas)
        ]
        self._draws = random.Random(setting.seed)
        self._gauges = [
            Gauges(setting.num_replicas, counts_sent=setting.counts_sent) for _ in range(setting.num_routers)
        ]
        self._turn_numbers, self._reports = itertools.count(), itertools.count(1)
        for gauges in self._gauges:
            for replica in range(setting.num_replicas):
                self._hear(gauges, replica)
        self._policies = [
            POLICIES[setting.policy](gauges, random.Random(setting.seed * 1000 + i))
            for i, gauges in enumerate(self._gauges)
        ]
        self._asked: dict[int, tuple[_User, Policy]] = {}  # by the turn that is being answered
        self._seen: set[int] = set()
        self._num_tokens = [0] * setting.num_replicas

    def play(self) -> None:
        """Play the run to its end, at which nothing is left of it."""
        setting, queue = self.setting, self._queue
        for i, gauges in enumerate(self._gauges):
            for replica in range(setting.num_replicas):
                place = (replica + i / setting.num_routers) / setting.num_replicas
                queue.at(place * setting.interval_s, partial(self._ask_gauges, gauges, replica))
        for user, at_s in self._first_turns():
            queue.at(at_s, partial(self._ask, user))
        queue.run(setting.warm_up_s)
        before = [server.client.load for server in self.servers]
        queue.run(setting.end_s)
        after = [server.client.load for server in self.servers]
        until_s = setting.end_s
        while any(self._is_awaited(life) for server in self.servers for life in server.lives):
            until_s += _GRACE_S
            queue.run(until_s)
        for replica, server in enumerate(self.servers):
            for life in list(server.lives):
                self._leave(replica, life)
        queue.run()
        for server in self.servers:
            load = server.scheduler.load()
            assert not server.scheduler.has_work
            assert not server.lives
            assert load.num_free_blocks == load.num_total_blocks
        tally = self._tally
        tally.num_seen += len(self._seen)
        tally.num_prefix_queries += sum(load.num_prefix_queries for load in after)
        tally.num_prefix_queries -= sum(load.num_prefix_queries for load in before)
        tally.num_prefix_hits += sum(load.num_prefix_hits for load in after)
        tally.num_prefix_hits -= sum(load.num_prefix_hits for load in before)
        tally.tokens += self._num_tokens

    def _first_turns(self) -> Iterator[tuple[_User, float]]:
        """Who comes before the end, and when first: each user is found thinking within a conversation, or away."""
        setting = self.setting
        draws = np.random.default_rng(setting.seed)
        num_users = setting.num_replicas * USERS_PER_REPLICA
        is_thinking = draws.random(num_users) < setting.thinking_s / setting.cycle_s
        # Who is found within a thought is rather in a long one; what is left of it is any part.
        thought_s = _THOUGHT_MEDIAN_S * draws.lognormal(_THOUGHT_SIGMA**2, _THOUGHT_SIGMA, num_users)
        left_s = thought_s * draws.random(num_users)
        away_s = draws.exponential(setting.away_s, num_users)
        num_past = np.where(is_thinking, draws.geometric(1 / _MEAN_TURNS, num_users), 0)
        first_s = np.where(is_thinking, left_s, away_s)
        # Those come first that were answered first, whose blocks are the next to go.
        coming = np.flatnonzero(first_s < setting.end_s)
        for number in coming[np.argsort((left_s - thought_s)[coming])].tolist():
            user = _User(number, _draw(setting, number, 0))
            for _ in range(num_past[number]):
                turn = self._next_turn(user)
                self._note_answered(user, turn)
                self._go_on(user)
            if user.num_tokens and thought_s[number] - left_s[number] < _CACHED_S:
                self._put_into_cache(turn)
            yield user, float(first_s[number])

    def _put_into_cache(self, turn: Turn) -> None:
        """Have some replica know a turn as if it had answered it, and one of the routers that it has."""
        replica = self._draws.randrange(self.setting.num_replicas)
        pool = self.servers[replica].scheduler._pool
        answer = tuple(turn.token(i) for i in range(turn.num_answer_tokens))
        request = GenerationRequest(-1, turn.prompt(), SamplingParams(), 0.0, output_token_ids=answer)
        sequence = EngineSequence(request)
        block_ids = pool.allocate(len(sequence.token_ids) // _SETTINGS.block_size)
        for index, block_id in enumerate(block_ids):
            pool.register(block_id, sequence.block_hash(index, _SETTINGS.block_size))
        pool.free(block_ids)
        self._policies[turn.number % len(self._policies)].note_cached(replica, turn.key())

    def _next_turn(self, user: _User) -> Turn:
        instruction = _instruction_of(user.number)
        num_shared = _INSTRUCTION_TOKENS[instruction % len(_INSTRUCTION_TOKENS)]
        drawn = user.drawn
        num_tokens = user.num_tokens + drawn.num_next_tokens if user.num_tokens else num_shared + drawn.num_first_tokens
        return Turn(
            next(self._turn_numbers),
            self._queue.now,
            num_tokens,
            drawn.num_answer_tokens,
            _MAX_TOKENS,
            group=instruction,
            num_shared_tokens=num_shared,
            conversation=user.number * 2**10 + user.num_conversations,
        )

    def _ask(self, user: _User) -> None:
        setting, now = self.setting, self._queue.now
        if now >= setting.end_s:
            return
        turn = self._next_turn(user)
        policy = self._policies[self._draws.randrange(setting.num_routers)]
        replica = policy.choose(turn.number, turn.key())
        life = self.servers[replica].submit(turn)
        if now >= setting.warm_up_s:
            self._seen.add(user.number)
            self._tally.num_turns += 1
            self._tally.num_refused += life.refusal is not None
        if life.refusal is None:
            self._asked[turn.number] = user, policy
            return
        policy.note_over(turn.number, replica)
        self.servers[replica].forget(life)
        self._queue.at(now + user.drawn.thought_s, partial(self._ask, user))
        self._go_on(user)

    def _go_on(self, user: _User) -> None:
        """Draw what a user asks next."""
        user.num_asked += 1
        user.drawn = _draw(self.setting, user.number, user.num_asked)

    def _note_answered(self, user: _User, turn: Turn) -> None:
        user.num_tokens = turn.num_prompt_tokens + turn.num_answer_tokens
        if user.num_tokens > _MAX_CONVERSATION_TOKENS:
            self._end_conversation(user)

    def _end_conversation(self, user: _User) -> None:
        user.num_conversations += 1
        user.num_tokens = 0

    def _note_published(self, replica: int, lives: list[Life]) -> None:
        for life in lives:
            assert life.generation is not None
            if life.generation.is_over:
                self._note_end(replica, life)
                self.servers[replica].forget(life)

    def _is_awaited(self, life: Life) -> bool:
        return not life.token_s and life.job.at_s >= self.setting.warm_up_s

    def _leave(self, replica: int, life: Life) -> None:
        """Have a user leave who is being answered."""
        server = self.servers[replica]
        assert life.generation is not None
        server.client.cancel(life.generation)
        self._count(replica, life)
        server.lives.remove(life)
        del self._asked[life.job.number]

    def _count(self, replica: int, life: Life) -> None:
        """Count an answer, whole or in part."""
        setting, turn, tokens_s = self.setting, life.job, life.token_s
        if not tokens_s:
            return
        first = bisect_left(tokens_s, setting.warm_up_s)
        self._num_tokens[replica] += bisect_left(tokens_s, setting.end_s) - first
        self._tally.stream_s += max(0.0, min(tokens_s[-1], setting.end_s) - max(turn.at_s, setting.warm_up_s))
        if setting.warm_up_s <= turn.at_s:
            self._tally.ttfts_s.append(tokens_s[0] - turn.at_s)
            self._tally.gaps_s.extend(later - earlier for earlier, later in itertools.pairwise(tokens_s))

    def _note_end(self, replica: int, life: Life) -> None:
        turn = life.job
        assert isinstance(turn, Turn)
        self._count(replica, life)
        user, policy = self._asked.pop(turn.number)
        policy.note_over(turn.number, replica)
        drawn = user.drawn
        self._note_answered(user, turn)
        if not drawn.goes_on:
            self._end_conversation(user)
        wait_s = drawn.thought_s if drawn.goes_on else drawn.away_s
        self._queue.at(self._queue.now + wait_s, partial(self._ask, user))
        self._go_on(user)

    def _ask_gauges(self, gauges: Gauges, replica: int) -> None:
        self._hear(gauges, replica)
        if self._queue.now < self.setting.end_s:
            self._queue.at(self._queue.now + self.setting.interval_s, partial(self._ask_gauges, gauges, replica))

    def _hear(self, gauges: Gauges, replica: int) -> None:
        client = self.servers[replica].client
        load, wait_s = client.load, client.predicted_ttft_s(Tier.STANDARD)
        num_tokens = load.num_total_blocks * _SETTINGS.block_size
        told = ReplicaLoad(next(self._reports), wait_s, load.prefill_tokens_per_s, num_tokens)
        gauges.hear(replica, load.num_running + client.num_waiting, told)


def _draw(setting: Setting, user: int, num_asked: int) -> _Drawn:
    """The same under every policy."""
    draws = random.Random((setting.seed * 2**40 + user) * 2**16 + num_asked)
    arrivals = _arrivals()
    return _Drawn(
        num_first_tokens=draws.choice(arrivals).prompt_tokens,
        num_next_tokens=draws.choice(arrivals).output_tokens,  # what follows is as long as what is answered
        num_answer_tokens=draws.choice(arrivals).output_tokens,
        goes_on=draws.random() >= 1 / _MEAN_TURNS,
        thought_s=draws.lognormvariate(math.log(_THOUGHT_MEDIAN_S), _THOUGHT_SIGMA),
        away_s=draws.expovariate(1 / setting.away_s),
    )


@cache
def _arrivals() -> list[Arrival]:
    return read_trace(_TRACE, _NUM_ARRIVALS, _LENGTH_SCALE)


@cache
def _shares() -> list[float]:
    """Of instructions, running totals."""
    weights = [1 / (1 + i) for i in range(_NUM_INSTRUCTIONS)]
    return list(itertools.accumulate(weight / sum(weights) for weight in weights))


def _instruction_of(user: int) -> int:
    # Multiples of an irrational number are spread evenly (Weyl).
    return min(bisect_left(_shares(), user * 0.6180339887498949 % 1), _NUM_INSTRUCTIONS - 1)


def _percentile(samples: Sequence[float], percentile: float) -> float:
    return float(np.percentile(np.asarray(samples), percentile)) if len(samples) else float("nan")


def play(setting: Setting) -> Figures:
    """Play one run."""
    began_s = time.process_time()
    tally = _Tally()
    gc.disable()  # there is nothing to find before a fleet's end, and looking takes long
    try:
        for number in range(setting.num_fleets):
            Fleet(replace(setting, seed=setting.seed * 1000 + number), tally).play()
            gc.collect()
    finally:
        gc.enable()
    tokens = np.array(tally.tokens, np.float64).reshape(setting.num_fleets, setting.num_replicas)
    return Figures(
        setting,
        num_users_seen=tally.num_seen,
        num_turns=tally.num_turns,
        refused_share=tally.num_refused / max(1, tally.num_turns),
        ttft_p50_s=_percentile(tally.ttfts_s, 50),
        ttft_p99_s=_percentile(tally.ttfts_s, 99),
        itl_p99_s=_percentile(tally.gaps_s, 99),
        hit_share=tally.num_prefix_hits / max(1, tally.num_prefix_queries),
        tokens_per_s=float(tokens.mean()) / setting.window_s,
        imbalance=float((tokens.std(axis=1) / np.maximum(1.0, tokens.mean(axis=1))).mean()),
        num_streams=tally.stream_s / setting.window_s / tokens.size,
        cpu_s=time.process_time() - began_s,
    )
