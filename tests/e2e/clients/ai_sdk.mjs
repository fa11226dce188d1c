// Vercel's AI SDK: generateText and streamText, through both providers that speak OpenAI's routes.
import { createOpenAI } from '@ai-sdk/openai'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { generateText, jsonSchema, streamText, tool } from 'ai'
import { serve } from './driver.mjs'

const baseURL = process.argv[2]
const compatible = createOpenAICompatible({ name: 'headrace', baseURL, apiKey: 'none', includeUsage: true })
const openai = createOpenAI({ baseURL, apiKey: 'none' })

// A message with calls, or the result of one, as the SDK has it.
function translated(message, i, messages) {
  if (message.tool_calls) {
    const content = message.tool_calls.map(({ id, function: { name, arguments: input } }) =>
      ({ type: 'tool-call', toolCallId: id, toolName: name, input: JSON.parse(input) }))
    return { role: 'assistant', content }
  }
  if (message.role !== 'tool') return message
  const { name } = messages[i - 1].tool_calls[0].function
  const output = { type: 'text', value: message.content }
  return { role: 'tool', content: [{ type: 'tool-result', toolCallId: message.tool_call_id, toolName: name, output }] }
}

function translatedTools(tools) {
  const inputs = tools.map(({ function: { name, parameters, ...rest } }) =>
    [name, tool({ ...rest, inputSchema: jsonSchema(parameters) })])
  return Object.fromEntries(inputs)
}

// The SDK has names of its own for what a body holds.
function asked(call, model) {
  const { messages, prompt, temperature, max_tokens, stop, tools, tool_choice } = call.body
  return {
    model,
    ...(messages ? { messages: messages.map(translated) } : { prompt }),
    ...(tools && { tools: translatedTools(tools), toolChoice: tool_choice }),
    temperature,
    maxOutputTokens: max_tokens,
    stopSequences: stop,
    maxRetries: call.max_retries,
    timeout: call.timeout_s * 1000,
    providerOptions: { headrace: call.extra },
  }
}

function see(seen, text, finishReason, usage) {
  seen.add(0, text, finishReason.replace('-', '_'))
  seen.usage = {
    prompt_tokens: usage.inputTokens,
    completion_tokens: usage.outputTokens,
    total_tokens: usage.totalTokens,
  }
}

const generate = makeModel => async (call, seen) => {
  const { text, toolCalls, finishReason, usage } = await generateText(asked(call, makeModel(call.body.model)))
  see(seen, text, finishReason, usage)
  seen.calls = toolCalls.map(({ toolName, input }) => [toolName, JSON.stringify(input)])
}

const stream = makeModel => async (call, seen) => {
  const abort = new AbortController()
  const result = streamText({
    ...asked(call, makeModel(call.body.model)),
    abortSignal: abort.signal,
    onError: () => {}, // printed otherwise; it is also a part of the stream
  })
  for await (const part of result.fullStream) {
    if (part.type === 'error') throw part.error
    if (part.type === 'finish') see(seen, '', part.finishReason, part.totalUsage)
    if (part.type === 'tool-call') seen.calls.push([part.toolName, JSON.stringify(part.input)])
    if (part.type !== 'text-delta' && part.type !== 'tool-input-delta') continue
    seen.add(0, part.type === 'text-delta' ? part.text : '', null)
    seen.num_chunks += 1
    if (seen.num_chunks === call.leave_after) abort.abort()
  }
}

serve({
  chat: generate(id => compatible.chatModel(id)),
  chat_stream: stream(id => compatible.chatModel(id)),
  completion: generate(id => compatible.completionModel(id)),
  completion_stream: stream(id => compatible.completionModel(id)),
  openai_chat: generate(id => openai.chat(id)),
  openai_chat_stream: stream(id => openai.chat(id)),
  openai_completion: generate(id => openai.completion(id)),
  openai_completion_stream: stream(id => openai.completion(id)),
})
