"""A chat in Gradio before a Headrace server: pip install gradio openai; python gradio_chat.py [URL]"""

import os
import sys
from collections.abc import Iterator
from typing import Any

import gradio
from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("HEADRACE_KEY", "none"))
model = client.models.list().data[0].id


def answer(question: str, turns: list[dict[str, Any]]) -> Iterator[str]:
    """The answer so far, after each piece of it. Stopping it closes the stream, and the server computes no more."""
    messages: Any = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    messages.append({"role": "user", "content": question})
    text = ""
    with client.chat.completions.create(model=model, messages=messages, temperature=0.3, stream=True) as chunks:
        for chunk in chunks:
            text += chunk.choices[0].delta.content or ""
            yield text


if __name__ == "__main__":
    gradio.ChatInterface(answer, title=model, concurrency_limit=None).launch()
