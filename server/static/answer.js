// One answer, from its request to its end. It knows no DOM: a view is told of every change.
// The record is plain JSON. Text and the id of the event that brought it change together, so that whenever the record is
// saved, reading on from there loses nothing and doubles nothing.

import { RequestError, cancelStream, createStream } from './api.js';
import { StreamReader } from './stream.js';

const LOST = {
  404: 'The server does not know this answer any more. It was probably restarted.',
  410: 'The server no longer keeps this answer: it ended too long ago.',
};

export function newRecord() {
  return {
    state: 'waiting', // for its first token; then streaming; then done or error
    text: '',
    numTokens: 0,
    numFirstTokens: 0, // those that came at once with the first, after a reload perhaps many
    stream: null, // while there is one to read: url, eventsUrl, lastEventId
    requestedAt: null, // ms since the epoch, which outlives a reload
    firstTokenAt: null,
    finishReason: null,
    usage: null,
    timings: null,
    error: null,
  };
}

export function isOver(record) {
  return record.state === 'done' || record.state === 'error';
}

export class Answer {
  #reader = null;
  #stopping = new AbortController();
  #onChange;
  #settle;

  constructor(record, onChange) {
    this.record = record;
    this.note = ''; // what the reader is waiting for
    this.onLost = () => {}; // called whenever the connection to its stream is lost
    this.settled = new Promise((resolve) => { this.#settle = resolve; });
    this.#onChange = onChange;
  }

  /** Ask for it. `whenReady` resolves once the server can be asked. */
  async request(body, { whenReady, askForKey }) {
    const { signal } = this.#stopping;
    this.#setNote('Waiting for the model');
    await whenReady;
    if (signal.aborted) return;
    this.record.requestedAt = Date.now();
    this.#setNote('Waiting for the first token');
    try {
      const stream = await createStream(body, {
        signal,
        askForKey: async (wasRefused) => {
          const hasKey = await askForKey(wasRefused);
          this.record.requestedAt = Date.now(); // the time it took to find the key is not the server's
          return hasKey;
        },
        onWait: (seconds, message) => this.#setNote(`${sentence(message)} Trying again in ${seconds} s`),
      });
      this.record.stream = { url: stream.url, eventsUrl: stream.events_url, lastEventId: '' };
      this.resume();
    } catch (error) {
      if (signal.aborted) return;
      this.#fail(error instanceof RequestError ? error.message : `This page failed: ${error.message}`);
    }
  }

  /** Read on where the record stops. */
  resume() {
    const { eventsUrl, lastEventId } = this.record.stream;
    this.#setNote(this.#progress);
    this.#reader = new StreamReader(eventsUrl, lastEventId, {
      onEvent: (type, data, id) => this.#onEvent(type, data, id),
      onConnected: (isConnected) => {
        this.#setNote(isConnected ? this.#progress : 'Connection lost, reconnecting');
        if (!isConnected) this.onLost();
      },
      onGone: (status) => this.#fail(LOST[status] ?? `Reading on was answered ${status}.`),
    });
  }

  async stop() {
    if (this.#stopping.signal.aborted || isOver(this.record)) return;
    this.#stopping.abort();
    const { stream } = this.record;
    if (!stream) {
      this.#finish({ finish_reason: 'cancelled' });
      return;
    }
    this.#setNote('Stopping');
    const snapshot = await cancelStream(stream.url);
    if (snapshot && !isOver(this.record)) this.record.text = snapshot.text;
    // Offline the server is not told; it ends by itself a stream that nobody reads.
    this.#finish(snapshot ?? { finish_reason: 'cancelled' });
  }

  get #progress() {
    if (this.#stopping.signal.aborted) return 'Stopping';
    return this.record.state === 'streaming' ? '' : 'Waiting for the first token';
  }

  #onEvent(type, data, id) {
    const { record } = this;
    if (type === 'done') this.#finish(data);
    else if (type === 'error') this.#fail(data.error.message);
    else {
      record.stream.lastEventId = id;
      if (type === 'token') {
        record.text += data.text;
        record.numTokens += data.num_tokens;
        if (record.firstTokenAt === null) {
          record.firstTokenAt = Date.now();
          record.numFirstTokens = data.num_tokens;
        }
        record.state = 'streaming';
      }
      this.#setNote(type === 'queued' && data.position > 0 ? queueNote(data) : this.#progress);
    }
  }

  #finish({ finish_reason: reason, usage = null, timings = null }) {
    const finishReason = reason === 'cancelled' && this.#stopping.signal.aborted ? 'stopped' : reason;
    this.#end({ state: 'done', finishReason, usage, timings });
  }

  #fail(message) {
    this.#end({ state: 'error', error: sentence(message) });
  }

  #end(fields) {
    if (isOver(this.record)) return;
    this.#reader?.close();
    Object.assign(this.record, fields, { stream: null });
    this.#setNote('');
    this.#settle();
  }

  #setNote(note) {
    this.note = note;
    this.#onChange();
  }
}

/** Tokens per second after the first one, whose time is the queue's and the prompt's; null before there is a rate. */
export function tokensPerSecond({ state, usage, timings, numTokens, numFirstTokens, firstTokenAt }) {
  if (timings?.total_s != null && timings.ttft_s != null) {
    return rate(usage.completion_tokens - 1, timings.total_s - timings.ttft_s);
  }
  return state === 'streaming' ? rate(numTokens - numFirstTokens, (Date.now() - firstTokenAt) / 1000) : null;
}

/** Seconds from the request to the first token, as the server measured them or else this page; null before it. */
export function secondsToFirstToken({ timings, requestedAt, firstTokenAt }) {
  return timings?.ttft_s ?? (firstTokenAt && requestedAt ? (firstTokenAt - requestedAt) / 1000 : null);
}

function rate(numTokens, seconds) {
  return numTokens > 0 && seconds > 0.05 ? numTokens / seconds : null;
}

function queueNote({ position, eta_s: etaS }) {
  return `Number ${position} in the queue` + (etaS == null ? '' : `, about ${Math.max(1, Math.ceil(etaS))} s`);
}

/** A message of the server's as a sentence of the page's. */
function sentence(message) {
  const text = message.trim() || 'The server did not say why';
  return text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? '' : '.');
}
