// What the browser keeps: the chats, the settings, the API key. Where it keeps nothing (storage blocked, a full disk),
// the page works all the same and forgets upon reload.

const CHAT_PREFIX = 'headrace.chat.';
const SETTINGS = 'headrace.settings';
const API_KEY = 'headrace.key';
const MAX_CHATS = 50;
const MAX_CHAT_CHARS = 2e6; // browsers keep about five million characters for an origin

/** A chat without turns. Ids begin with the time, so that they sort from old to new. */
export function newChat() {
  const [random] = crypto.getRandomValues(new Uint32Array(1));
  return { id: Date.now().toString(36) + random.toString(36).padStart(7, '0'), turns: [] };
}

export function isStoredAs(chat, key) {
  return key === CHAT_PREFIX + chat.id;
}

export function loadChat(id) {
  const chat = read('localStorage', CHAT_PREFIX + id);
  const isWhole = Array.isArray(chat?.turns) && chat.turns.every((turn) => turn?.answers?.[turn.shown]);
  return isWhole ? chat : null; // else another program's, or another version's
}

/** Every chat kept, the newest first. */
export function listChats() {
  return chatIds().reverse().map(loadChat).filter((chat) => chat?.turns.length);
}

/** Keep the chat, at the cost of the oldest others if need be; returns whether there was room. */
export function saveChat(chat) {
  const value = JSON.stringify(chat);
  if (value.length > MAX_CHAT_CHARS) return false;
  const others = chatIds().filter((id) => id !== chat.id);
  while (others.length >= MAX_CHATS) deleteChat(others.shift());
  const evicted = [];
  while (!write('localStorage', CHAT_PREFIX + chat.id, value)) {
    if (!others.length) {
      // It was not the chats that took the room.
      for (const each of evicted) write('localStorage', CHAT_PREFIX + each.id, JSON.stringify(each));
      return false;
    }
    const id = others.shift();
    const other = loadChat(id);
    if (other) evicted.push(other);
    deleteChat(id);
  }
  return true;
}

export function deleteChat(id) {
  remove('localStorage', CHAT_PREFIX + id);
}

export function loadSettings() {
  return read('localStorage', SETTINGS) ?? {};
}

export function saveSettings(settings) {
  write('localStorage', SETTINGS, JSON.stringify(settings));
}

export function loadApiKey() {
  return read('sessionStorage', API_KEY) ?? read('localStorage', API_KEY);
}

export function saveApiKey(key, isRemembered) {
  forgetApiKey();
  write(isRemembered ? 'localStorage' : 'sessionStorage', API_KEY, JSON.stringify(key));
}

export function forgetApiKey() {
  remove('sessionStorage', API_KEY);
  remove('localStorage', API_KEY);
}

function chatIds() {
  try {
    const keys = Object.keys(localStorage).filter((key) => key.startsWith(CHAT_PREFIX));
    return keys.map((key) => key.slice(CHAT_PREFIX.length)).sort();
  } catch {
    return [];
  }
}

function read(area, key) {
  try {
    return JSON.parse(window[area].getItem(key));
  } catch {
    return null;
  }
}

function write(area, key, value) {
  try {
    window[area].setItem(key, value);
    return true;
  } catch {
    return false;
  }
}

function remove(area, key) {
  try {
    window[area].removeItem(key);
  } catch { /* nothing is kept there */ }
}
