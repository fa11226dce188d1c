"""A tiny model of bytes, as a Hugging Face directory, and Hugging Face's own log-likelihoods of texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fake_engine import EOS, VOCAB_SIZE, byte_wrapper
from tiny_models import tiny_llama


def write_scored_model(path: Path) -> Any:
    """Write model and tokenizer; what the model thinks comes next is, for one text in two, nothing."""
    model = tiny_llama(vocab_size=VOCAB_SIZE, eos_token_id=EOS, max_position_embeddings=512)
    model.lm_head.weight.data[EOS] *= 8
    model.save_pretrained(path)
    byte_wrapper().save_pretrained(path)
    return model


def loglikelihood(model: Any, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """The log probability of one text behind another, and whether it is the likeliest at every token."""
    token_ids = torch.tensor([[*context, *continuation]])
    with torch.inference_mode():
        rows = model(token_ids).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
    own = rows.gather(-1, token_ids[0, len(context) :, None])
    return float(own.sum()), rows.argmax(-1).tolist() == [*continuation]
