// Reads a native stream through EventSource and does not let go of it before its terminal event.
// A cut connection EventSource mends by itself, with Last-Event-ID. What it does not mend, this does: it gives up
// (CLOSED) on any answer but a stream, such as a proxy's 502, and it does not notice a connection that has fallen silent.

const SILENCE_MS = 25_000; // a lively stream may be as silent while it waits in the queue; then reconnecting is harmless
const IMPATIENT_SILENCE_MS = 4_000; // enough to doubt the connection after sleep or a change of network
const FIRST_BACKOFF_MS = 500;
const MAX_BACKOFF_MS = 5_000;
const PROBE_TIMEOUT_MS = 10_000;
const FINAL_STATUSES = new Set([204, 400, 404, 410]);

export class StreamReader {
  #url;
  #lastEventId;
  #listener;
  #source = null;
  #retryTimer;
  #silenceTimer;
  #heardAt = 0;
  #numFailures = 0;
  #closing = new AbortController();

  /**
   * Read from behind `lastEventId` on. The listener is told `onEvent(type, data, id)` of the events queued, token,
   * done and error; `onConnected(isConnected)`; and `onGone(status)` where the server has the stream no more.
   */
  constructor(url, lastEventId, listener) {
    this.#url = url;
    this.#lastEventId = lastEventId;
    this.#listener = listener;
    const { signal } = this.#closing;
    addEventListener('online', () => this.#hurry(), { signal });
    document.addEventListener('visibilitychange', () => { if (!document.hidden) this.#hurry(); }, { signal });
    this.#connect();
  }

  close() {
    this.#closing.abort();
    this.#disconnect();
  }

  get #urlFromHere() {
    return this.#lastEventId ? `${this.#url}?last_event_id=${encodeURIComponent(this.#lastEventId)}` : this.#url;
  }

  #connect() {
    this.#disconnect();
    const source = new EventSource(this.#urlFromHere);
    this.#source = source;
    this.#noteLife();
    source.addEventListener('open', () => {
      this.#noteLife();
      this.#listener.onConnected(true);
    });
    for (const type of ['queued', 'token', 'done', 'error']) {
      source.addEventListener(type, (event) => {
        // The server's own `error` events carry data; the browser's, upon a lost connection, none.
        if (event.data === undefined) this.#onLost(source);
        else this.#onEvent(event);
      });
    }
  }

  #disconnect() {
    this.#source?.close();
    clearTimeout(this.#retryTimer);
    clearTimeout(this.#silenceTimer);
  }

  #onEvent(event) {
    this.#noteLife();
    this.#numFailures = 0;
    this.#lastEventId = event.lastEventId;
    this.#listener.onEvent(event.type, JSON.parse(event.data), event.lastEventId);
  }

  #noteLife() {
    this.#heardAt = performance.now();
    clearTimeout(this.#silenceTimer);
    this.#silenceTimer = setTimeout(() => this.#connect(), SILENCE_MS);
  }

  async #onLost(source) {
    this.#listener.onConnected(false);
    if (source.readyState !== EventSource.CLOSED) return;
    // EventSource does not tell what the server answered, so ask again.
    clearTimeout(this.#silenceTimer);
    const status = await this.#probe();
    if (this.#closing.signal.aborted || source !== this.#source) return;
    if (FINAL_STATUSES.has(status)) {
      this.close();
      this.#listener.onGone(status);
      return;
    }
    const backoffMs = Math.min(MAX_BACKOFF_MS, FIRST_BACKOFF_MS * 2 ** this.#numFailures);
    this.#numFailures += 1;
    this.#retryTimer = setTimeout(() => this.#connect(), backoffMs * (0.75 + Math.random() / 2));
  }

  /** The status that reading on would be answered with; null where the server cannot be reached. */
  async #probe() {
    try {
      const signal = AbortSignal.any([this.#closing.signal, AbortSignal.timeout(PROBE_TIMEOUT_MS)]);
      const response = await fetch(this.#urlFromHere, { headers: { Accept: 'text/event-stream' }, signal });
      response.body?.cancel();
      return response.status;
    } catch {
      return null;
    }
  }

  /** The network or the user has come back: do not wait for a timer. */
  #hurry() {
    const isOpen = this.#source.readyState === EventSource.OPEN;
    if (isOpen && performance.now() - this.#heardAt < IMPATIENT_SILENCE_MS) return;
    this.#numFailures = 0;
    this.#connect();
  }
}
