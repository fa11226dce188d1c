// Vercel's AI SDK: generateText and streamText, through both providers that speak OpenAI's routes.
import { createOpenAI } from '@ai-sdk/openai'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { generateText, streamText } from 'ai'
import { serve } from './driver.mjs'

const baseURL = process.argv[2]
const compatible = createOpenAICompatible({ name: 'headrace', baseURL, apiKey: 'none', includeUsage: true })
const openai = createOpenAI({ baseURL, apiKey: 'none' })

// The SDK has names of its own for what a body holds.
function asked(call, model) {
  const { messages, prompt, temperature, max_tokens, stop } = call.body
  return {
    model,
    ...(messages ? { messages } : { prompt }),
    temperature,
    maxOutputTokens: max_tokens,
    stopSequences: stop,
    maxRetries: call.max_retries,
    timeout: call.timeout_s * 1000,
    providerOptions: { headrace: call.extra },
  }
}

function see(seen, text, finishReason, usage) {
  seen.add(0, text, finishReason)
  seen.usage = {
    prompt_tokens: usage.inputTokens,
    completion_tokens: usage.outputTokens,
    total_tokens: usage.totalTokens,
  }
}

const generate = makeModel => async (call, seen) => {
  const { text, finishReason, usage } = await generateText(asked(call, makeModel(call.body.model)))
  see(seen, text, finishReason, usage)
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
    if (part.type !== 'text-delta') continue
    seen.add(0, part.text, null)
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
