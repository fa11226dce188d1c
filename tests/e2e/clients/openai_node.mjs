// openai-node: create, `for await`, and its stream helper.
import OpenAI from 'openai'
import { serve } from './driver.mjs'

const client = new OpenAI({ baseURL: process.argv[2], apiKey: 'none' })

const options = call => ({ timeout: call.timeout_s * 1000, maxRetries: call.max_retries })
const asked = call => ({ ...call.body, ...call.extra })

function see(seen, answer) {
  for (const choice of answer.choices) {
    const text = choice.message?.content ?? choice.delta?.content ?? choice.text
    seen.add(choice.index, text, choice.finish_reason, choice.logprobs)
    seen.addCalls((choice.message ?? choice.delta)?.tool_calls)
  }
  seen.usage = answer.usage ?? seen.usage
}

async function seeStream(call, seen, stream) {
  for await (const chunk of stream) {
    see(seen, chunk)
    seen.num_chunks += 1
    if (seen.num_chunks === call.leave_after) break // closes the connection
  }
}

serve({
  async chat(call, seen) {
    see(seen, await client.chat.completions.create(asked(call), options(call)))
  },
  async chat_stream(call, seen) {
    await seeStream(call, seen, await client.chat.completions.create({ ...asked(call), stream: true }, options(call)))
  },
  async chat_helper(call, seen) {
    let deltas = ''
    const stream = client.chat.completions.stream(asked(call), options(call))
    stream.on('content', delta => { deltas += delta }) // of any choice
    stream.on('chunk', () => {
      seen.num_chunks += 1
      if (seen.num_chunks === call.leave_after) stream.abort()
    })
    try {
      see(seen, await stream.finalChatCompletion())
    } catch (error) {
      if (error instanceof OpenAI.APIUserAbortError && call.leave_after) return
      throw error
    }
    if (seen.texts.length === 1 && deltas !== seen.texts[0]) throw new Error(`the helper's deltas differ: ${deltas}`)
  },
  async completion(call, seen) {
    see(seen, await client.completions.create(asked(call), options(call)))
  },
  async completion_stream(call, seen) {
    await seeStream(call, seen, await client.completions.create({ ...asked(call), stream: true }, options(call)))
  },
})
