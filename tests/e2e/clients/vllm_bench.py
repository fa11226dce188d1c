"""The request functions of `vllm bench serve`: vLLM's own file, which stands alone but for a few packages."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp

from driver import Call, Seen, serve


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VLLM = _load(Path(sys.prefix) / "endpoint_request_func.py")


async def _ask(call: Call, seen: Seen, function: Any, path: str, prompt: Any) -> None:
    asked = VLLM.RequestFuncInput(
        prompt=prompt,
        api_url=sys.argv[1] + path,
        prompt_len=0,
        output_len=call.body["max_tokens"],
        model=call.body["model"],
        extra_body={name: call.body[name] for name in ("temperature", "stop") if name in call.body} | call.extra,
    )
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(call.timeout_s)) as session:
        output = await function(asked, session)
    if not output.success:
        seen.error = {"types": [], "message": output.error, "status": None}
        return
    seen.add(0, output.generated_text, None)
    seen.usage = {
        "prompt_tokens": output.prompt_len,
        "completion_tokens": output.output_tokens,
        "total_tokens": output.prompt_len + output.output_tokens,
    }
    seen.num_chunks = 1 + len(output.itl)
    assert 0 < output.ttft <= output.latency


async def completion_stream(call: Call, seen: Seen) -> None:
    await _ask(call, seen, VLLM.async_request_openai_completions, "/completions", call.body["prompt"])


async def chat_stream(call: Call, seen: Seen) -> None:
    await _ask(call, seen, VLLM.async_request_openai_chat_completions, "/chat/completions", call.body["messages"])


serve({"completion_stream": completion_stream, "chat_stream": chat_stream})
