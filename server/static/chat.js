// The chat page: one conversation, one stream at a time, kept in this tab only.
// It knows the native streams (POST /v1/streams, then EventSource), not how text is made.

// A small model wanders at the API's default temperature of 1.
const SAMPLING = { temperature: 0.3, top_p: 0.9 };

const $ = (id) => document.getElementById(id);
const form = $('composer');
const prompt = $('prompt');
const status = $('status');

const turns = []; // answered ones only: chat templates want roles to alternate
let current = null; // the Answer under way
let whenReady = pollReady();

const FINISH_REASONS = {
  length: 'cut at the length limit',
  cancelled: 'cancelled',
  deadline_exceeded: 'deadline exceeded',
};

/** One assistant message, from its request to its terminal event. */
class Answer {
  #article = addMessage('assistant', 'queued');
  #text = new Text();
  #meta = this.#article.querySelector('.meta');
  #settle;
  #stream = null;
  #source = null;
  #isStopping = false;
  #requestedAt = 0;
  #firstTokenAt = null;

  constructor() {
    this.#article.ariaBusy = 'true'; // read out once whole, not token by token
    this.#article.querySelector('.text').append(this.#text);
    this.settled = new Promise((resolve) => { this.#settle = resolve; });
  }

  get text() { return this.#text.data; }
  get state() { return this.#article.dataset.state; }
  get isSettled() { return this.state === 'done' || this.state === 'error'; }

  async request(messages) {
    this.#note('Waiting for the model…');
    await whenReady;
    if (this.isSettled) return;
    this.#requestedAt = performance.now();
    this.#note('Waiting for the first token…');
    let stream;
    try {
      const response = await fetch('/v1/streams', {
        method: 'POST',
        headers: { 'Content-Type': 'application/json' },
        body: JSON.stringify({ messages, ...SAMPLING }),
      });
      if (!response.ok) {
        this.#fail(await refusalText(response));
        if (response.status === 503) whenReady = pollReady();
        return;
      }
      stream = await response.json();
    } catch {
      this.#fail('The server cannot be reached.');
      whenReady = pollReady();
      return;
    }
    if (this.isSettled) {
      cancelStream(stream.url); // stopped before its id was known
      return;
    }
    this.#stream = stream;
    this.#listen();
  }

  async stop() {
    if (this.#isStopping || this.isSettled) return;
    this.#isStopping = true;
    if (!this.#stream) {
      this.#finish({ finish_reason: 'cancelled' });
      return;
    }
    this.#note('Stopping…');
    // Once cancelled, the stream's own `done` ends the message, with its usage.
    if (!await cancelStream(this.#stream.url)) this.#finish({ finish_reason: 'cancelled' });
  }

  #listen() {
    this.#source = new EventSource(this.#stream.events_url);
    const on = (type, listener) => this.#source.addEventListener(type, listener);
    on('open', () => this.#noteProgress());
    on('queued', (event) => this.#noteProgress(JSON.parse(event.data)));
    on('token', (event) => this.#append(JSON.parse(event.data).text));
    on('done', (event) => this.#finish(JSON.parse(event.data)));
    on('error', (event) => {
      // The server's own `error` events carry data; the browser's, upon a lost connection, none.
      if (event.data) this.#fail(JSON.parse(event.data).error.message);
      else if (this.#source.readyState === EventSource.CONNECTING) this.#note('Reconnecting…');
      else {
        this.#fail('The connection was lost and the stream cannot be resumed.');
        cancelStream(this.#stream.url); // nobody reads it any more: this is also how a reload looks
      }
    });
  }

  #append(text) {
    this.#firstTokenAt ??= performance.now();
    this.#text.appendData(text);
    this.#article.dataset.state = 'streaming';
    this.#noteProgress();
  }

  #noteProgress(queue) {
    if (this.#isStopping) this.#note('Stopping…');
    else if (this.state === 'streaming') this.#note('');
    else if (queue?.position > 0) this.#note(queueText(queue));
    else this.#note('Waiting for the first token…');
  }

  #note(text) {
    if (this.#meta.textContent !== text) this.#meta.textContent = text;
    follow();
  }

  #finish({ finish_reason: reason, usage }) {
    const now = performance.now();
    const parts = [];
    const numTokens = usage?.completion_tokens;
    if (numTokens != null) parts.push(`${numTokens} token${numTokens === 1 ? '' : 's'}`);
    if (this.#firstTokenAt !== null) {
      parts.push(`first token after ${((this.#firstTokenAt - this.#requestedAt) / 1000).toFixed(2)} s`);
      // The first token's time is the queue's and the prompt's, so it is left out of the rate.
      if (numTokens > 1) parts.push(`${((numTokens - 1) * 1000 / (now - this.#firstTokenAt)).toFixed(1)} tokens/s`);
    }
    if (reason !== 'stop') parts.push(FINISH_REASONS[reason] ?? reason);
    this.#end('done', parts.join(' · '));
  }

  #fail(message) { this.#end('error', message); }

  #end(state, note) {
    if (this.isSettled) return;
    this.#source?.close();
    this.#article.dataset.state = state;
    this.#article.ariaBusy = 'false';
    this.#note(note);
    this.#settle();
  }
}

async function submit() {
  const question = prompt.value;
  if (current || !question.trim()) return;
  prompt.value = '';
  isFollowing = true;
  addMessage('user', 'done').querySelector('.text').textContent = question;
  current = new Answer();
  showControls();

  const history = turns.flatMap(({ question, answer }) => [
    { role: 'user', content: question },
    { role: 'assistant', content: answer },
  ]);
  current.request([...history, { role: 'user', content: question }]);
  await current.settled;

  if (current.text) turns.push({ question, answer: current.text });
  else if (current.state === 'error') prompt.value ||= question; // so that Enter tries again
  current = null;
  showControls();
}

function showControls() {
  const hadFocus = [$('send'), $('stop')].includes(document.activeElement);
  $('send').hidden = current !== null;
  $('stop').hidden = current === null;
  // The button that was pressed is gone. Not on touch screens, where focus raises a keyboard.
  if (hadFocus && matchMedia('(hover: hover)').matches) prompt.focus();
}

function addMessage(role, state) {
  const article = $('message').content.firstElementChild.cloneNode(true);
  article.dataset.role = role;
  article.dataset.state = state;
  article.ariaLabel = role === 'user' ? 'You' : 'Assistant';
  $('messages').append(article);
  follow();
  return article;
}

async function cancelStream(url) {
  try {
    // keepalive: the request has to outlive the page when that is being left.
    const options = { method: 'DELETE', keepalive: true, signal: AbortSignal.timeout(5000) };
    return (await fetch(url, options)).ok;
  } catch {
    return false;
  }
}

async function refusalText(response) {
  const body = await response.json().catch(() => null); // a proxy's error page is not JSON
  const message = body?.error?.message ?? `The server answered ${response.status}.`;
  const retryAfter = response.headers.get('Retry-After');
  return retryAfter ? `${message} Try again in ${retryAfter} s.` : message;
}

function queueText({ position, eta_s: etaS }) {
  return `Queued, position ${position}` + (etaS == null ? '' : `, about ${Math.ceil(etaS)} s`);
}

async function pollReady() {
  for (;;) {
    const response = await fetch('/ready', { cache: 'no-store' }).catch(() => null);
    if (response?.ok) break;
    if (response) showStatus('loading', 'loading the model…');
    else showStatus('unreachable', 'no connection…');
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  showStatus('ready', 'ready');
  showModel();
}

function showStatus(state, text) {
  status.dataset.state = state;
  if (status.textContent !== text) status.textContent = text;
}

async function showModel() {
  const response = await fetch('/v1/models').catch(() => null);
  if (response?.ok) $('model').textContent = (await response.json()).data[0]?.id ?? '';
}

// Keep the newest text in view, unless the reader has scrolled up.
let isFollowing = true;
let lastScrollY = 0;
let isFollowDue = false;

function follow() {
  if (isFollowDue) return;
  isFollowDue = true;
  requestAnimationFrame(() => {
    isFollowDue = false;
    if (isFollowing) scrollTo(0, document.documentElement.scrollHeight);
  });
}

addEventListener('scroll', () => {
  const isAtEnd = scrollY + innerHeight >= document.documentElement.scrollHeight - 32;
  // Text that arrives also moves the end away: only a move upwards is the reader's.
  isFollowing = isAtEnd || (isFollowing && scrollY >= lastScrollY);
  lastScrollY = scrollY;
}, { passive: true });

form.addEventListener('submit', (event) => {
  event.preventDefault();
  submit();
});

prompt.addEventListener('keydown', (event) => {
  // Safari ends a composition before its Enter arrives; 229 still marks it.
  const isComposing = event.isComposing || event.keyCode === 229;
  if (event.key !== 'Enter' || event.shiftKey || isComposing) return;
  event.preventDefault();
  submit();
});

$('stop').addEventListener('click', () => current?.stop());
addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && !event.isComposing) current?.stop();
});
addEventListener('pagehide', () => current?.stop());
