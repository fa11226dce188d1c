// The chat page: the chat in its address, the composer, and what goes around them. One answer at a time.
// A chat is one page load, "/?chat=<id>": opening an old one and coming back to an answer under way are the same.

import { isOver } from './answer.js';
import { fetchModelName, waitUntilReady } from './api.js';
import { askForKey, initSettings, sampling, systemMessages } from './settings.js';
import { deleteChat, isStoredAs, listChats, loadChat, newChat, saveChat } from './storage.js';
import { Turn, isSendKey } from './turn.js';

const SAVE_INTERVAL_MS = 1000;
const END_MARGIN_PX = 48;
const MAX_TITLE_CHARS = 60;
const STATUSES = {
  loading: 'loading the model',
  draining: 'the server is shutting down',
  engine_dead: 'the model has failed',
  unreachable: 'no connection',
};

const $ = (id) => document.getElementById(id);
const prompt = $('prompt');

let chat = loadChat(new URLSearchParams(location.search).get('chat')) ?? newChat();
let turns = [];
let current = null; // the answer under way
let whenReady = becomeReady();
let saveTimer = null;
let isForgotten = false;

const page = {
  get isBusy() { return current !== null; },
  isLast: (turn) => turn === turns.at(-1),
  regenerate: (turn) => ask(turn),
  edit(turn, question) {
    for (const gone of turns.splice(turns.indexOf(turn))) gone.element.remove();
    submit(question);
  },
  save() { saveTimer ??= setTimeout(saveNow, SAVE_INTERVAL_MS); },
  announce(text) { $('announcer').textContent = text; },
  follow,
  copy,
};

/** Show the chat, and go on with an answer that is not over. */
function open() {
  $('turns').replaceChildren();
  turns = [];
  for (const record of chat.turns) addTurn(record);
  showControls();
  follow();
  const last = turns.at(-1);
  if (!last || isOver(last.shown)) return;
  const answer = last.follow();
  settle(answer);
  if (last.shown.stream) answer.resume();
  else answer.request(bodyFor(last), { whenReady, askForKey });
}

function submit(question) {
  if (current || !question.trim()) return;
  isFollowing = true;
  ask(addTurn({ question, answers: [], shown: 0 }));
}

/** Ask for a (further) answer in the last turn. */
function ask(turn) {
  if (current) return;
  const answer = turn.begin();
  settle(answer);
  answer.request(bodyFor(turn), { whenReady, askForKey });
}

async function settle(answer) {
  current = answer;
  answer.onLost = doubtServer;
  showControls();
  saveNow();
  await answer.settled;
  current = null;
  showControls();
  saveNow();
  if (answer.record.error) doubtServer();
}

/** The whole chat up to the turn. Turns that were not answered are left out: templates want roles to alternate. */
function bodyFor(turn) {
  const messages = systemMessages();
  for (const { record: { question }, shown } of turns.slice(0, turns.indexOf(turn))) {
    if (shown.text) messages.push({ role: 'user', content: question }, { role: 'assistant', content: shown.text });
  }
  messages.push({ role: 'user', content: turn.record.question });
  return { messages, ...sampling() };
}

function addTurn(record) {
  const turn = new Turn(record, page);
  turns.push(turn);
  $('turns').append(turn.element);
  return turn;
}

function showControls() {
  const { activeElement } = document;
  $('send').hidden = current !== null;
  $('stop').hidden = current === null;
  $('welcome').hidden = turns.length > 0;
  for (const turn of turns) turn.showControls();
  document.title = turns.length ? `${titleOf(chat)} · Headrace` : 'Headrace';
  // What had the focus may be gone. Not on touch screens, where focus raises a keyboard, nor from who is reading.
  if (activeElement === prompt || !matchMedia('(hover: hover)').matches) return;
  if (current) $('stop').focus({ preventScroll: true });
  else if (activeElement === $('stop') && getSelection().isCollapsed) prompt.focus({ preventScroll: true });
}

function saveNow() {
  clearTimeout(saveTimer);
  saveTimer = null;
  if (!turns.length || isForgotten) return;
  chat.turns = turns.map((turn) => turn.record);
  if (saveChat(chat)) history.replaceState(null, '', `/?chat=${chat.id}`);
  else {
    $('keys').textContent = 'This chat cannot be kept in the browser: it will be gone after a reload.';
    $('keys').dataset.state = 'warning';
  }
}

function titleOf({ turns }) {
  const text = (turns[0]?.question ?? '').trim().replace(/\s+/g, ' ');
  return text.length > MAX_TITLE_CHARS ? `${text.slice(0, MAX_TITLE_CHARS)}…` : text;
}

function showChats() {
  const items = listChats().map((each) => {
    const item = $('chat-template').content.firstElementChild.cloneNode(true);
    const link = item.querySelector('a');
    link.textContent = titleOf(each);
    link.href = `/?chat=${each.id}`;
    if (each.id === chat.id) link.ariaCurrent = 'page';
    const button = item.querySelector('button');
    button.ariaLabel = `Delete “${link.textContent}”`;
    button.addEventListener('click', () => {
      deleteChat(each.id);
      item.remove();
      $('chats').querySelector('button').focus();
      if (each.id !== chat.id) return;
      isForgotten = true;
      current?.stop();
      location.assign('/');
    });
    return item;
  });
  $('chat-list').replaceChildren(...items);
  if (!$('chats').open) $('chats').showModal();
}

async function becomeReady() {
  await waitUntilReady((status) => showStatus(status, STATUSES[status] ?? status));
  showStatus('ready', '');
  $('model').textContent = await fetchModelName() ?? $('model').textContent;
}

/** Something failed: find out whether the server can still be asked, unless that is being found out. */
function doubtServer() {
  if ($('status').dataset.state === 'ready') whenReady = becomeReady();
}

function showStatus(state, text) {
  $('status').dataset.state = state;
  if ($('status-text').textContent !== text) $('status-text').textContent = text;
}

async function copy(text, button) {
  let isCopied = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // there is no clipboard on plain http from elsewhere than this machine
    const field = document.body.appendChild(document.createElement('textarea'));
    field.value = text;
    field.select();
    isCopied = document.execCommand('copy');
    field.remove();
    button.focus();
  }
  page.announce(isCopied ? 'Copied' : 'The browser did not let it be copied');
  if (!isCopied) return;
  button.dataset.state = 'copied';
  setTimeout(() => delete button.dataset.state, 1500);
}

// The newest text stays in view, unless the reader has scrolled up.
let isFollowing = true;
let lastScrollY = 0;

function follow() {
  if (isFollowing) scrollTo(0, document.documentElement.scrollHeight);
  showJump();
}

function showJump() {
  $('jump').hidden = isFollowing || document.documentElement.scrollHeight - scrollY - innerHeight < END_MARGIN_PX;
}

addEventListener('scroll', () => {
  const isAtEnd = scrollY + innerHeight >= document.documentElement.scrollHeight - END_MARGIN_PX;
  // Text that arrives also moves the end away: only a move upwards is the reader's.
  isFollowing = isAtEnd || (isFollowing && scrollY >= lastScrollY);
  lastScrollY = scrollY;
  showJump();
}, { passive: true });

$('jump').addEventListener('click', () => {
  isFollowing = true;
  follow();
  prompt.focus({ preventScroll: true });
});

$('composer').addEventListener('submit', (event) => {
  event.preventDefault();
  if (current || !prompt.value.trim()) return;
  const question = prompt.value;
  prompt.value = '';
  submit(question);
});

prompt.addEventListener('keydown', (event) => {
  if (!isSendKey(event)) return;
  event.preventDefault();
  $('composer').requestSubmit();
});

$('suggestions').addEventListener('click', (event) => {
  if (event.target.localName === 'button') submit(event.target.textContent);
});

$('turns').addEventListener('click', ({ target }) => {
  if (target.className === 'copy-code') copy(target.closest('.code').querySelector('code').textContent, target);
});

$('stop').addEventListener('click', () => current?.stop());
$('open-chats').addEventListener('click', showChats);
addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && !event.isComposing && !document.querySelector('dialog[open]')) current?.stop();
});
addEventListener('pagehide', saveNow);
addEventListener('pageshow', (event) => { if (event.persisted) location.reload(); }); // the chat may have gone on since
document.addEventListener('visibilitychange', () => { if (document.hidden) saveNow(); });
addEventListener('storage', (event) => {
  // The same chat in another tab.
  const stored = !current && event.newValue && isStoredAs(chat, event.key) ? loadChat(chat.id) : null;
  const last = stored?.turns.at(-1);
  const answer = last?.answers[last.shown];
  if (!answer || !(isOver(answer) || answer.stream)) return; // that tab still asks
  chat = stored;
  open();
});

history.scrollRestoration = 'manual';
initSettings();
open();
