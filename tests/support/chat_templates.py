"""Chat templates in the shape of the families' own, cut to what decides how a conversation with tools is told.

Each has its family's way of showing tools, calls and results, and of reasoning. Written for these tests.
"""

_TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_ASSISTANT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

# Knows no tools, as SmolLM2's.
PLAIN = _TURNS + _ASSISTANT

# Qwen2.5's and Hermes' way. Arguments are objects, to be written as JSON.
_HERMES_TOOLS = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}
{% endif %}<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
Write <tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
"""
_HERMES_MESSAGES = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}<|im_start|>assistant
{{ m.content }}{% for call in m.tool_calls %}{% set call = call.function %}
<tool_call>
{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% elif m.role == 'user' %}<|im_start|>user
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}
"""
QWEN2 = _HERMES_TOOLS + _HERMES_MESSAGES + _ASSISTANT
# Qwen3 shows the reasoning of earlier turns, and its newer kind begins it in the prompt.
_THOUGHT = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}"
_WITH_THOUGHT = _HERMES_MESSAGES.replace("{{ m.content }}{% for", _THOUGHT + "{{ m.content }}{% for")
QWEN3 = _HERMES_TOOLS + _WITH_THOUGHT + _ASSISTANT
QWEN3_THINKING = QWEN3.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
# SmolLM3's tools have a name of their own.
SMOLLM3 = QWEN3.replace("in tools", "in xml_tools").replace("if tools", "if xml_tools").replace("| tojson }}{%", "}}{%")
# Qwen3-Coder's calls stand between Hermes' tags and are no JSON.
QWEN3_CODER = QWEN2.replace('{"name": <function-name>, "arguments": <args-json-object>}', "<function=name></function>")
# DeepSeek-R1's distilled models: no tools, and reasoning that the prompt begins.
R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}"
    "{% else %}<|User|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)

LLAMA = """\
{%- for m in messages %}
{%- if m.tool_calls %}<|start_header_id|>assistant<|end_header_id|>

{% set call = m.tool_calls[0].function %}{"name": "{{ call.name }}", {{ '"parameters": ' -}}
{{ call.arguments | tojson }}}<|eot_id|>
{%- elif m.role in ['tool', 'ipython'] %}<|start_header_id|>ipython<|end_header_id|>

{{ m.content | tojson }}<|eot_id|>
{%- else %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if tools and loop.last %}Respond with {"name": function name, "parameters": dictionary}.
{% for tool in tools %}{{ tool | tojson(indent=4) }}
{% endfor %}{% endif %}{{ m.content }}<|eot_id|>
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

_MISTRAL = """\
{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and loop.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}
[INST] {{ m.content }}[/INST]
{%- elif m.tool_calls is defined and m.tool_calls is not none %}
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}
CALL
{%- endfor %}CLOSING{{ eos_token }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}
[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]
{%- elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}
{%- endif %}{% endfor %}"""
MISTRAL_V3 = _MISTRAL.replace("CLOSING", "]").replace(
    "CALL\n",
    "{{ '[TOOL_CALLS] [' if loop.first else ', ' }}{{ (call.function | tojson)[:-1] }}, \"id\": \"{{ call.id }}\"}\n",
)
MISTRAL_V11 = _MISTRAL.replace("CLOSING", "").replace(
    "CALL\n", "[TOOL_CALLS]{{ call.function.name }}[CALL_ID]{{ call.id }}[ARGS]{{ call.function.arguments | tojson }}\n"
)
