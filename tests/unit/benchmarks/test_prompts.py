"""Prompts: new ones every time, of the length the server counts."""

from headrace.benchmarks.prompts import WORDS, PromptMaker, TokenFit


def test_prompts_are_new_in_every_request_and_repeat_with_the_seed() -> None:
    maker, again = PromptMaker(1), PromptMaker(1)
    prompts = [maker.prompt(16) for _ in range(200)]
    assert len({prompt.rsplit(" ", 8)[0] for prompt in prompts}) == 200  # even their first halves differ
    assert prompts == [again.prompt(16) for _ in range(200)]
    assert prompts != [PromptMaker(2).prompt(16) for _ in range(200)]


def test_an_uncalibrated_prompt_has_one_word_a_token() -> None:
    words = PromptMaker(1).prompt(154).split(" ")
    assert len(words) == 154
    assert set(words) <= set(WORDS)


def test_the_fit_takes_a_templates_overhead_and_split_words_into_account() -> None:
    fit = TokenFit.through((8, 30 + 12), (100, 30 + 150))
    assert fit == TokenFit(overhead_tokens=30.0, tokens_per_word=1.5)
    assert fit.num_words(330) == 200


def test_a_prompt_shorter_than_its_template_is_still_one_word() -> None:
    assert TokenFit(overhead_tokens=30.0).num_words(10) == 1


def test_a_count_that_does_not_grow_with_the_words_falls_back_to_one_token_a_word() -> None:
    assert TokenFit.through((8, 50), (100, 50)).tokens_per_word == 1.0


def test_the_words_are_distinct_plain_and_short() -> None:
    assert len(WORDS) == len(set(WORDS))
    assert all(word.isascii() and word.isalpha() and word.islower() for word in WORDS)
