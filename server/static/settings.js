// The dialogs of settings and of the API key.

import { forgetApiKey, loadApiKey, loadSettings, saveApiKey, saveSettings } from './storage.js';

const SAMPLING = ['temperature', 'top_p', 'max_tokens'];

const dialog = document.getElementById('settings');
const form = dialog.querySelector('form');
const keyDialog = document.getElementById('key');
const keyForm = keyDialog.querySelector('form');

/** What the settings add to a request: the sampling fields that are set and valid. */
export function sampling() {
  const fields = SAMPLING.map((name) => [name, form.elements[name]]);
  return Object.fromEntries(fields.filter(([, field]) => field.value && field.validity.valid).map(([name, field]) => [name, Number(field.value)]));
}

/** The system prompt as a message, or nothing. */
export function systemMessages() {
  const content = form.elements.system.value.trim();
  return content ? [{ role: 'system', content }] : [];
}

export function initSettings() {
  const saved = loadSettings();
  for (const field of form.elements) {
    if (!field.name || saved[field.name] === undefined) continue;
    if (field.type === 'radio') field.checked = field.value === saved.theme;
    else field.value = saved[field.name];
  }
  form.addEventListener('input', keepSettings);
  dialog.addEventListener('close', () => {
    // What would not be sent should not stand there.
    for (const field of form.elements) if (field.name && !field.validity.valid) field.value = '';
    keepSettings();
  });
  form.addEventListener('reset', () => setTimeout(keepSettings)); // it is told before the fields are reset
  document.getElementById('open-settings').addEventListener('click', () => {
    document.getElementById('forget-key').hidden = !loadApiKey();
    dialog.showModal();
  });
  document.getElementById('forget-key').addEventListener('click', (event) => {
    forgetApiKey();
    event.currentTarget.hidden = true;
  });
  document.getElementById('key-cancel').addEventListener('click', () => keyDialog.close());
  for (const each of document.querySelectorAll('dialog')) closeOnOutsideClick(each);
}

/** Ask for the API key; resolves to whether one was given. */
export function askForKey(wasRefused) {
  document.getElementById('key-reason').textContent = wasRefused
    ? 'The server did not accept this key.' : 'This server answers only to those who have a key.';
  keyForm.reset();
  keyDialog.returnValue = '';
  keyDialog.showModal();
  return new Promise((resolve) => {
    keyDialog.addEventListener('close', () => {
      const isGiven = keyDialog.returnValue === 'ok';
      if (isGiven) saveApiKey(keyForm.elements.key.value.trim(), keyForm.elements.remember.checked);
      keyForm.reset();
      resolve(isGiven);
    }, { once: true });
  });
}

function keepSettings() {
  const settings = Object.fromEntries(new FormData(form));
  saveSettings(settings);
  document.documentElement.dataset.theme = settings.theme;
}

function closeOnOutsideClick(each) {
  // The backdrop counts as the dialog itself, and all inside as its form.
  each.addEventListener('pointerdown', (event) => { if (event.target === each) each.close(); });
}
