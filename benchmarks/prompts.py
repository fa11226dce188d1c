"""Makes prompts of a wanted length, a new one for every request, so that no prefix cache can help.

Random common English words: with the usual byte-pair vocabularies " word" is one token. Where it is not, and for what a
chat template adds, a line `prompt_tokens = overhead + tokens_per_word * words` is fitted through two requests that
the server itself has counted. What was really sent is reported from the server's usage, never from this fit.
"""

import random
from dataclasses import dataclass
from typing import Final

_WORD_TEXT: Final = """
about across add again age all along also among another any area art attack baby bad bar because bed began behind
best between bird blood board body born bottom boy bring brown call can care case center chance child church city
clean close cloud color common contain cook corner could course create cut dark dead dear decide did doctor done
down dream drink drop during early east eat effect eight end enough even event every eye fact family farm father
feel field figure final fine finish first five flow fly food force forest form found free friend full garden gave
get give gold great ground grow gun half happen hard head heart heavy help high history home horse hotel house
human hunt idea inch island join keep kill king knew lake large late law lead leave leg letter lie light line
listen live look lot low magic make many mark matter mean meat member metal might milk mind miss moment month more
most mouth much must nation nature need new next nine north note notice object office oil once only order out own
pain pair parent part pass path peace perhaps picture place plant point poor power press problem program proper
public purpose put quiet race rain ran read real receive red report result rich right river rock room rule safe
sail same save say science season second see sell sense set several share ship short should side silver simple
sing sister six skin sleep small smile social soldier song sort south speak speed spring stage star state stay
stick stone stop story street student subject sudden suggest sun support surface swim table take tall team ten
test thank their then these thick thing third those thought through tie tiny told took total toward track train
tree trouble true turn
"""
WORDS: Final = tuple(_WORD_TEXT.split())


@dataclass(frozen=True, slots=True)
class TokenFit:
    """How many prompt tokens the server counts for a number of words; the default believes one token a word."""

    overhead_tokens: float = 0.0
    tokens_per_word: float = 1.0

    @classmethod
    def through(cls, short: tuple[int, int], long: tuple[int, int]) -> "TokenFit":
        """Fit two (words, prompt tokens) measurements; a slope no tokenizer has falls back to one token a word."""
        slope = (long[1] - short[1]) / (long[0] - short[0])
        if slope <= 0:
            slope = 1.0
        return cls(overhead_tokens=long[1] - slope * long[0], tokens_per_word=slope)

    def num_words(self, prompt_tokens: int) -> int:
        """Say how many words make a prompt of `prompt_tokens`: at least one, so a template alone is never sent."""
        return max(1, round((prompt_tokens - self.overhead_tokens) / self.tokens_per_word))


class PromptMaker:
    """One seeded stream of prompts for a whole invocation, so no run repeats the prompts of another."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.fit = TokenFit()

    def prompt(self, prompt_tokens: int) -> str:
        """Draw a prompt that the server should count as about `prompt_tokens`."""
        return self.prompt_of_words(self.fit.num_words(prompt_tokens))

    def prompt_of_words(self, num_words: int) -> str:
        """Draw a prompt of so many words."""
        return " ".join(self._random.choices(WORDS, k=num_words))
