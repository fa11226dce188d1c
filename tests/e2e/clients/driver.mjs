// A client library as a process: reads a call per line of JSON, answers each with what the client saw as one line.
// The process ends with its input and not before, so that what a client leaves open stays open. See driver.py.
import { createInterface } from 'node:readline'

export class Seen {
  texts = []
  finish_reasons = []
  logprobs = []
  usage = null
  num_chunks = 0
  calls = []
  error = null

  // `logprobs` is either route's form, or null.
  add(index, text, finishReason, logprobs) {
    this.texts[index] = (this.texts[index] ?? '') + (text ?? '')
    this.finish_reasons[index] = finishReason ?? this.finish_reasons[index] ?? null
    const pairs = logprobs?.content?.map(item => [item.token, item.logprob])
      ?? logprobs?.tokens?.map((token, i) => [token, logprobs.token_logprobs[i]]) ?? []
    this.logprobs[index] = [...this.logprobs[index] ?? [], ...pairs]
  }

  // Calls, or pieces of them, as OpenAI's SDK has them.
  addCalls(calls) {
    for (const [place, call] of (calls ?? []).entries()) {
      const own = this.calls[call.index ?? place] ??= ['', '']
      own[0] += call.function.name ?? ''
      own[1] += call.function.arguments ?? ''
    }
  }
}

const types = error => {
  const names = []
  for (let type = Object.getPrototypeOf(error); type; type = Object.getPrototypeOf(type)) names.push(type.constructor.name)
  return names
}

export async function serve(ways) {
  for await (const line of createInterface({ input: process.stdin })) {
    const call = JSON.parse(line)
    const seen = new Seen()
    try {
      await ways[call.way](call, seen)
    } catch (error) {
      seen.error = { types: types(error), message: error.message, status: error.status ?? error.statusCode ?? null }
    }
    process.stdout.write(JSON.stringify(seen) + '\n')
  }
  process.exit()
}
