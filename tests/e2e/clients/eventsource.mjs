// Follows a native stream to its end with npm's `eventsource`; prints what it saw as one line of JSON.
import { EventSource } from 'eventsource'

const seen = { text: '', num_tokens: 0, num_opens: 0, queued: [], done: null }
const source = new EventSource(process.argv[2])

source.onopen = () => { seen.num_opens += 1 }
source.addEventListener('queued', event => seen.queued.push(JSON.parse(event.data)))
source.addEventListener('token', event => {
  const token = JSON.parse(event.data)
  seen.text += token.text
  seen.num_tokens += token.num_tokens
})
source.addEventListener('done', event => {
  seen.done = JSON.parse(event.data)
  source.close()
  console.log(JSON.stringify(seen))
})
source.addEventListener('error', event => {
  if (source.readyState === EventSource.CLOSED) {
    console.error(`closed for good: ${event.code} ${event.message}`)
    process.exit(1)
  }
})
