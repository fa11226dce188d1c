// The requests that are not streams, each with the API key where the server wants one.

import { forgetApiKey, loadApiKey } from './storage.js';

// A reload, a tunnel or a locked phone should not cost an answer; a page that was closed should not keep the model busy.
const DISCONNECT_GRACE_S = 120;
const MAX_RETRIES = 20;
const MAX_RETRY_AFTER_S = 120;

let isLeaving = false; // the page, whose requests are then cut off
addEventListener('pagehide', () => { isLeaving = true; });

/** A request that came to nothing; the message is for the reader. */
export class RequestError extends Error {}

/** Resolves once requests are served. Until then `onStatus(status)` is told the server's own, or "unreachable". */
export async function waitUntilReady(onStatus) {
  for (;;) {
    const response = await fetch('/ready', { cache: 'no-store' }).catch(() => null);
    if (response?.ok) return;
    const body = await response?.json().catch(() => null);
    onStatus(response ? body?.status ?? 'loading' : 'unreachable');
    await sleep(1000);
  }
}

/** The name of the model served, or null. */
export async function fetchModelName() {
  const response = await fetch('/v1/models', { headers: authorization() }).catch(() => null);
  if (!response?.ok) return null;
  return (await response.json()).data[0]?.id ?? null;
}

/**
 * Start a stream; resolves to where it is. `askForKey(wasRefused)` is called where the server wants a key, and resolves
 * to whether there is one now; `onWait(seconds, message)` tells how long an overloaded server asked to be left alone.
 * Raises: RequestError; the signal's reason once that is aborted.
 */
export async function createStream(body, { signal, askForKey, onWait }) {
  for (let numRetries = 0; ; ) {
    const headers = { 'Content-Type': 'application/json', ...authorization() };
    const content = JSON.stringify({ ...body, disconnect_grace_s: DISCONNECT_GRACE_S });
    const response = await fetch('/v1/streams', { method: 'POST', headers, body: content }).catch(() => null);
    if (response === null && isLeaving) return new Promise(() => {}); // what was kept before is right
    if (response === null) throw new RequestError('The server cannot be reached.');
    if (response.ok) {
      const stream = await response.json();
      // Not aborted in mid-request: then nobody would know whether there is a stream to cancel.
      if (signal.aborted) cancelStream(stream.url);
      signal.throwIfAborted();
      return stream;
    }
    signal.throwIfAborted();
    const message = await refusalOf(response);
    const retryAfterS = Number(response.headers.get('Retry-After'));
    if (response.status === 401) {
      forgetApiKey();
      if (!await askForKey('Authorization' in headers)) throw new RequestError('This server asks for an API key.');
    } else if ([429, 503].includes(response.status) && retryAfterS > 0 && numRetries < MAX_RETRIES) {
      numRetries += 1;
      for (let s = Math.min(retryAfterS, MAX_RETRY_AFTER_S); s > 0; s--) {
        onWait(s, message);
        await sleep(1000 * Math.min(1, s), signal);
      }
    } else throw new RequestError(message);
  }
}

/** End a stream; resolves to what there is of it, or to null where the server could not be told. */
export async function cancelStream(url) {
  try {
    const options = { method: 'DELETE', headers: authorization(), keepalive: true, signal: AbortSignal.timeout(5000) };
    const response = await fetch(url, options);
    return response.ok ? await response.json() : null;
  } catch {
    return null;
  }
}

function authorization() {
  const key = loadApiKey();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function refusalOf(response) {
  const body = await response.json().catch(() => null); // a proxy's error page is not JSON
  return body?.error?.message ?? `The server answered ${response.status}.`;
}

function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener('abort', () => {
      clearTimeout(timer);
      reject(signal.reason);
    }, { once: true });
  });
}
