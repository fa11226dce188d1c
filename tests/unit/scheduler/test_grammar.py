"""What may follow in a grammar, what grammars are refused, and that a slow one holds up its own sequence alone."""

import gc
import json
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import fake_engine
from fake_engine import EOS, VOCAB_SIZE, byte_tokenizer, make_scheduler, next_allowed, run
from headrace.scheduler import grammar as grammar_module
from headrace.scheduler.grammar import (
    Following,
    Grammar,
    GrammarCompiler,
    GrammarError,
    GrammarState,
    advance,
    wait,
)
from headrace.scheduler.messages import (
    FinishReason,
    GenerationRequest,
    GrammarKind,
    SamplingParams,
    SequenceOutput,
)
from headrace.scheduler.scheduler import Scheduler

JSON, REGEX, LARK = GrammarKind.JSON_SCHEMA, GrammarKind.REGEX, GrammarKind.LARK


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    compiler = byte_tokenizer().grammar_compiler(VOCAB_SIZE)
    yield compiler
    compiler.close()


def bits(mask: npt.NDArray[np.uint32]) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def after(grammar: Grammar, text: str | bytes) -> GrammarState:
    state = grammar.begin()
    if text:
        advance([(state, tuple(text.encode() if isinstance(text, str) else text))])
        wait([state])
    assert state.is_ready
    return state


@pytest.mark.parametrize(
    ("kind", "text", "so_far", "following", "may_end"),
    [
        (REGEX, "(ab|ac)d?", "", "a", False),
        (REGEX, "(ab|ac)d?", "a", "bc", False),
        (REGEX, "(ab|ac)d?", "ac", "d", True),
        (REGEX, "(ab|ac)d?", "acd", "", True),
        (REGEX, "", "", "", True),
        (LARK, 'start: "yes" | "yet" | "no"', "", "yn", False),
        (LARK, 'start: "yes" | "yet" | "no"', "ye", "st", False),
        (LARK, 'start: "(" start ")" | "x"', "((", "(x", False),
        (LARK, 'start: "(" start ")" | "x"', "((x))", "", True),
        (LARK, 'root ::= "a" [0-9]+', "a1", "0123456789", True),
        (JSON, '{"enum": ["left", "leg", 3]}', '"le', "fg", False),
        (JSON, '{"type": "boolean"}', "", "tf", False),
        (JSON, '{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}', '{"a":1}', "", True),
    ],
)
def test_what_may_follow_is_what_the_grammar_says(
    compiler: GrammarCompiler, kind: GrammarKind, text: str, so_far: str, following: str, may_end: bool
) -> None:
    state = after(compiler.compile(kind, text), so_far)
    assert state.error is None
    assert len(state.mask) == -(-VOCAB_SIZE // 32)
    assert bits(state.mask) == {*following.encode(), *([EOS] if may_end else [])}
    assert state.is_over == (not following)


def test_a_character_of_several_bytes_may_be_cut_between_tokens(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(LARK, 'start: "é" | "è"')
    assert bits(grammar.first.mask) == {0xC3}
    assert bits(after(grammar, b"\xc3").mask) == {0xA9, 0xA8}


def test_a_special_token_is_no_text_however_free_the_grammar_is(compiler: GrammarCompiler) -> None:
    assert bits(after(compiler.compile(REGEX, "(.|\n)*"), "x").mask) >= set(range(1, 128)) | {EOS}
    assert EOS not in bits(compiler.compile(REGEX, "(.|\n)+").first.mask)
    with pytest.raises(GrammarError):
        compiler.compile(LARK, "start: <|nothing|>")


@pytest.mark.parametrize(
    ("kind", "text", "whole"),
    [
        (JSON, '{"const": "a<|end|>b<call>"}', '"a<|end|>b<call>"'),
        (REGEX, "<call>[0-9]<\\|end\\|>", "<call>1<|end|>"),
        (LARK, 'start: "<|end|>" | "<call>"', "<|end|>"),
        (LARK, '%llguidance {"no_forcing": false}\nstart: "<|end|>"', "<|end|>"),
        (LARK, 'root ::= "<|end|>"', "<|end|>"),
    ],
)
def test_text_that_a_special_token_is_written_as_stays_text(kind: GrammarKind, text: str, whole: str) -> None:
    """A special token would be missing in the answer, or end it."""
    compiler = byte_tokenizer(special_tokens=("<call>",)).grammar_compiler(VOCAB_SIZE + 1)
    grammar = compiler.compile(kind, text)
    for end, char in enumerate(whole.encode()):
        allowed = bits(after(grammar, whole.encode()[:end]).mask)
        assert char in allowed
        assert max(allowed) < EOS
    assert after(grammar, whole).is_over
    compiler.close()


@pytest.mark.parametrize(
    ("schema", "so_far", "char", "is_allowed"),
    [
        ({"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}, '{"\\', "u", False),
        ({"patternProperties": {"^a": {"type": "integer"}}}, '{"\\', "u", False),
        ({"type": "object"}, '{"\\', "n", True),
        ({"const": "\x01"}, '"\\', "u", True),
        ({"const": "\x7f"}, '"\\', "u", True),
        ({"type": "string", "pattern": "^\\x01$"}, '"\\', "u", True),
    ],
)
def test_a_name_can_be_written_in_one_way_only(
    compiler: GrammarCompiler, schema: dict[str, Any], so_far: str, char: str, is_allowed: bool
) -> None:
    """With another spelling it would get past what the schema says of it."""
    for text in (json.dumps(schema), json.dumps(schema, ensure_ascii=False)):
        assert (ord(char) in bits(after(compiler.compile(JSON, text), so_far).mask)) == is_allowed


def test_what_must_end_is_what_no_other_token_may_follow(compiler: GrammarCompiler) -> None:
    state = after(compiler.compile(REGEX, "[ab]?c"), "a")
    assert state.must_end(np.array([ord("c"), EOS]))
    assert not state.must_end(np.array([ord("b"), EOS]))
    assert not state.must_end(np.array([], np.int64))
    assert after(compiler.compile(REGEX, "a"), "a").must_end(np.array([EOS]))


def test_a_states_tokens_are_its_own(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(REGEX, "a(b|c(d|e))")
    first, second = after(grammar, "a"), after(grammar, "ac")
    assert bits(grammar.first.mask) == {ord("a")}
    assert bits(first.mask) == {*b"bc"}
    assert bits(second.mask) == {*b"de"}


def test_a_token_that_the_grammar_does_not_have_there_is_an_error(compiler: GrammarCompiler) -> None:
    state = after(compiler.compile(REGEX, "ab"), "ax")
    assert state.error is not None
    advance([(state, (ord("b"),))])
    assert state.is_ready
    assert state.error is not None


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (JSON, '{"type": "object", "if": {}}', '"if"'),
        (JSON, '{"not": {}}', '"not"'),
        (JSON, '{"type": "array", "uniqueItems": true}', '"uniqueItems"'),
        (JSON, '{"type": "array", "contains": {}}', '"contains"'),
        (JSON, '{"type": "object", "x-guidance": {"lenient": true}, "not": {}}', '"not"'),
        (JSON, '{"type": "strin"}', "strin"),
        (JSON, '{"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}', "oneOf"),
        (JSON, '{"type": "string", "format": "colour"}', "colour"),
        (JSON, '{"type": "string", "pattern": "(?=a)b"}', "look-ahead"),
        (JSON, '{"allOf": [{"type": "string"}, {"type": "integer"}]}', "incompatible"),
        (JSON, '{"$ref": "http://127.0.0.1:9/schema"}', "127.0.0.1"),
        (JSON, '{"$ref": "#/$defs/none"}', "none"),
        (JSON, "{", ""),
        (JSON, "[]", ""),
        (JSON, "true", ""),
        # llguidance would make other numbers of these, and take a name that comes twice for two.
        (JSON, '{"const": 1234567890123456789}', '"const"'),
        (JSON, '{"items": {"enum": [1, {"a": [9007199254740993]}]}}', '"enum"'),
        (JSON, '{"$defs": {"a": {"minimum": 9007199254740993}}, "$ref": "#/$defs/a"}', '"minimum"'),
        (JSON, '{"anyOf": [{"type": "object", "minProperties": 2}]}', '"minProperties"'),
        (JSON, '{"properties": {"a": {}}, "required": ["a"], "minProperties": 3}', '"minProperties"'),
        (REGEX, "a[", "unclosed"),
        (REGEX, "(?<=a)b", "look-"),
        (REGEX, "\ud800", ""),
        (LARK, "start: nobody", "nobody"),
        (LARK, "begin: /a/", "start"),
        (LARK, 'root ::= "a" nobody', ""),
        (LARK, '{"grammars": [', ""),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(
    compiler: GrammarCompiler, kind: GrammarKind, text: str, said: str
) -> None:
    with pytest.raises(GrammarError) as refused:
        compiler.compile(kind, text)
    assert said in str(refused.value)
    assert 0 < len(str(refused.value)) <= 500
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (REGEX, "(" * 5000 + "a" + ")" * 5000),
        (REGEX, "(((((a{1,99}){1,99}){1,99}){1,99}){1,99})"),
        (REGEX, "(a|b)*a(a|b){4000}"),
        (LARK, 'start: "' + "a" * 120_000 + '"'),
        (LARK, "start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
        (LARK, "start: start start | start start start | /a/\n"),
        (JSON, '{"items":' * 2000 + "{}" + "}" * 2000),
        (JSON, json.dumps({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {}]}}, "$ref": "#/$defs/a"})),
        (JSON, json.dumps({"type": "string", "minLength": 10**9})),
        (JSON, json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 10**8})),
        (JSON, json.dumps({"type": "integer", "minimum": 3, "maximum": 10**300, "multipleOf": 7919})),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_what_would_take_too_long_or_too_much_is_refused_or_bounded(
    compiler: GrammarCompiler, kind: GrammarKind, text: str
) -> None:
    """Whatever is asked for, each of an answer's steps ends within the bounds, and so does the answer."""
    try:
        state = after(compiler.compile(kind, text), "")
    except GrammarError:
        return
    token_id = 0
    for _ in range(50):
        if state.error is not None or state.is_over:
            break
        token_id = next_allowed(state.mask, (token_id * 31 + 7) % EOS)
        advance([(state, (token_id,))])
        wait([state])
        assert state.is_ready


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [2**53, 2**53 + 2, 1e22, True]},
        {"type": "object", "properties": {"minimum": {"type": "integer", "default": 2**53 + 1}}},
        {"type": "object", "minProperties": 1},
        {"type": "object", "properties": {"a": {}}, "required": ["a"], "minProperties": 2},
        {"const": {"minProperties": 7}},
    ],
)
def test_what_llguidance_holds_to_is_taken(compiler: GrammarCompiler, schema: dict[str, Any]) -> None:
    assert compiler.compile(JSON, json.dumps(schema)).first.mask.any()


def test_a_schema_whose_alternatives_multiply_counts_for_more_than_its_text(compiler: GrammarCompiler) -> None:
    def one_of(name: str) -> dict[str, Any]:
        each = {"type": "object", "required": [name]}
        return {"anyOf": [each | {"properties": {name: {"const": i}}} for i in range(7)]}

    schemas = [one_of(name) for name in "abcd"]
    side_by_side = compiler.compile(JSON, json.dumps({"prefixItems": schemas}))
    multiplied = compiler.compile(JSON, json.dumps({"allOf": schemas}))
    assert multiplied.num_bytes > side_by_side.num_bytes + 2**21


def test_a_mask_that_takes_too_long_is_the_answers_last(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = compiler.compile(REGEX, "a+")
    monkeypatch.setattr(grammar_module, "_MAX_MASK_S", -1.0)
    state = after(grammar, "a")
    assert state.error == "the grammar takes too long at this point of the answer"
    monkeypatch.setattr(grammar_module, "_MAX_COMPILE_S", -1.0)
    with pytest.raises(GrammarError, match="too long"):
        compiler.compile(REGEX, "a+")


def test_without_a_token_that_ends_answers_there_are_no_grammars() -> None:
    with pytest.raises(GrammarError, match="ends"):
        byte_tokenizer().grammar_compiler(200)


def test_closing_ends_the_threads() -> None:
    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("headrace-grammar")}

    before = threads()
    compiler = byte_tokenizer().grammar_compiler(VOCAB_SIZE)
    after(compiler.compile(REGEX, "ab"), "a")
    assert threads() > before
    compiler.close()
    assert threads() == before


# In the scheduler


def request(grammar: Grammar | None, id: int = 1, max_tokens: int = 8, **sampling: Any) -> GenerationRequest:
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=frozenset({EOS}), **sampling)
    return GenerationRequest(id, tuple(b"prompt %d" % id), params, 0.0, grammar=grammar, cache_salt=b"%d" % id)


def finish(scheduler: Scheduler) -> dict[int, tuple[bytes, FinishReason | None]]:
    """Each request's text, but for the token that ended it, and how it ended."""
    texts: dict[int, bytes] = {}
    ends: dict[int, FinishReason | None] = {}
    while scheduler.has_work:
        for output in step(scheduler):
            texts[output.request_id] = texts.get(output.request_id, b"") + bytes(
                t for t in output.token_ids if t != EOS
            )
            ends[output.request_id] = output.finish_reason
    return {id: (texts[id], ends[id]) for id in texts}


def step(scheduler: Scheduler) -> list[SequenceOutput]:
    output = scheduler.schedule(0.0)
    outputs = scheduler.update(output, run(output))
    scheduler.check_books()
    return output.dropped + outputs


def test_an_answer_ends_where_its_grammar_does(compiler: GrammarCompiler) -> None:
    scheduler = make_scheduler()
    scheduler.add(request(compiler.compile(LARK, 'start: "ok" | "no"')))
    scheduler.add(request(None, id=2))
    ended = finish(scheduler)
    assert ended[1] in ((b"ok", FinishReason.STOP), (b"no", FinishReason.STOP))
    assert ended[2][1] is FinishReason.LENGTH


def test_an_answer_that_is_over_ends_before_min_tokens(compiler: GrammarCompiler) -> None:
    scheduler = make_scheduler()
    scheduler.add(request(compiler.compile(REGEX, "ab"), min_tokens=6))
    assert finish(scheduler) == {1: (b"ab", FinishReason.STOP)}


def test_an_answer_goes_on_in_its_grammar_where_it_was_begun_before(compiler: GrammarCompiler) -> None:
    scheduler = make_scheduler()
    grammar = compiler.compile(REGEX, "abcdef")
    begun = GenerationRequest(
        1,
        tuple(b"prompt"),
        SamplingParams(max_tokens=8, stop_token_ids=frozenset({EOS})),
        0.0,
        grammar=grammar,
        output_token_ids=tuple(b"abc"),
    )
    scheduler.add(begun)
    assert finish(scheduler) == {1: (b"def", FinishReason.STOP)}


def test_a_preempted_answer_keeps_its_place_in_the_grammar(compiler: GrammarCompiler) -> None:
    scheduler = make_scheduler()
    scheduler.add(request(compiler.compile(REGEX, "abcdef")))
    step(scheduler)
    scheduler._preempt(next(iter(scheduler._running.values())))
    assert finish(scheduler)[1] == (b"bcdef", FinishReason.STOP)


class SlowState(GrammarState):
    """Knows what follows when it is told to."""

    def __init__(self, grammar: Grammar) -> None:
        self.is_held = False
        self._is_ready = True
        super().__init__(grammar)

    @property
    def is_ready(self) -> bool:
        return not self.is_held and self._is_ready

    @is_ready.setter
    def is_ready(self, is_ready: bool) -> None:
        self._is_ready = is_ready


def test_a_row_whose_mask_is_late_computes_its_last_token_again_and_others_do_not_wait(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the mask is late, for a prompt, a prompt found in the cache or an answer, the text is the same."""
    grammar = compiler.compile(REGEX, "[a-z]{30}")
    scheduler = make_scheduler()
    scheduler.add(request(grammar, max_tokens=30))
    expected = finish(scheduler)[1]
    scheduler.add(request(grammar, max_tokens=30))  # its prompt is in the cache
    state = SlowState(grammar)
    monkeypatch.setattr(fake_engine, "wait", lambda states: None if state.is_held else wait(states))
    next(iter(scheduler._sequences.values())).grammar = state
    scheduler.add(request(None, id=2, max_tokens=40))
    texts = {1: b"", 2: b""}
    reason = None
    for i in range(40):
        state.is_held = i % 3 != 2
        outputs = step(scheduler)
        assert {2} <= {output.request_id for output in outputs}
        for output in outputs:
            texts[output.request_id] += bytes(output.token_ids)
            if output.request_id == 1:
                reason = output.finish_reason
        assert len(texts[2]) == i + 1
        assert len(texts[1]) == (i + 1) // 3
    assert reason is None
    state.is_held = False
    assert (texts[1] + finish(scheduler)[1][0], FinishReason.LENGTH) == expected


def test_a_grammar_that_becomes_too_complex_costs_its_own_answer(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make_scheduler()
    monkeypatch.setattr(grammar_module, "_MAX_MASK_S", -1.0)
    scheduler.add(request(compiler.compile(REGEX, "a+")))
    scheduler.add(request(None, id=2))
    ends: dict[int, tuple[FinishReason | None, str | None, bool]] = {}
    while scheduler.has_work:
        ends |= {out.request_id: (out.finish_reason, out.error, out.is_refused) for out in step(scheduler)}
    assert ends == {
        1: (FinishReason.ERROR, "the grammar takes too long at this point of the answer", True),
        2: (FinishReason.LENGTH, None, False),
    }


class BrokenState(GrammarState):
    def compute(self, token_ids: tuple[int, ...]) -> Following:
        raise RuntimeError("broken")


def test_of_the_states_that_advance_together_a_broken_one_has_an_error_and_others_do_not_notice(
    compiler: GrammarCompiler,
) -> None:
    grammar = compiler.compile(REGEX, "ab?")
    first, broken, last = states = [grammar.begin(), BrokenState(grammar), grammar.begin()]
    advance([(state, (ord("a"),)) for state in states])
    wait(states)
    assert broken.error == "the grammar cannot be followed here: broken"
    for state in (first, last):
        assert (state.error, bits(state.mask)) == (None, {ord("b"), EOS})


def test_a_sequence_that_ends_while_its_mask_is_made_leaves_nothing(compiler: GrammarCompiler) -> None:
    scheduler = make_scheduler()
    scheduler.add(request(compiler.compile(REGEX, "a+")))
    step(scheduler)
    [sequence] = scheduler._running.values()
    state = sequence.grammar
    assert state is not None
    scheduler.cancel(1)
    [dropped] = step(scheduler)
    assert dropped.finish_reason is FinishReason.CANCELLED
    wait([state])
    left = weakref.ref(state)
    del sequence, state
    gc.collect()
    assert left() is None
