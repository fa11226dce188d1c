// Pictures that are dropped, chosen or pasted, and what the server sees in them.

import { loadApiKey } from './storage.js';

const SHOWN_AT_ONCE = 50;

const drop = document.getElementById('drop');
const input = document.getElementById('files');
const pictures = document.getElementById('pictures');

function element(name, text = '') {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

/** The labels of a picture, likeliest first. Throws an Error with the server's message. */
async function classify(file) {
  const body = new FormData();
  body.append('image', file);
  const key = loadApiKey();
  const response = await fetch('/v1/classify', { method: 'POST', body, headers: key ? { authorization: `Bearer ${key}` } : {} });
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error?.message ?? `the server answered ${response.status}`);
  return answer.predictions;
}

async function show(file) {
  const item = element('li');
  const image = element('img');
  image.alt = file.name;
  image.src = URL.createObjectURL(file);
  for (const end of ['load', 'error']) image.addEventListener(end, () => URL.revokeObjectURL(image.src));
  const outcome = element('p', 'Looking …');
  item.append(image, outcome);
  pictures.prepend(item);
  while (pictures.children.length > SHOWN_AT_ONCE) pictures.lastChild.remove();
  try {
    const list = element('ol');
    for (const { label, score } of await classify(file)) {
      const row = element('li');
      const meter = element('meter');
      meter.value = score;
      meter.ariaLabel = label;
      row.append(element('span', label), element('span', `${(100 * score).toFixed(1)} %`), meter);
      list.append(row);
    }
    outcome.replaceWith(list);
  } catch (error) {
    outcome.className = 'failed';
    outcome.textContent = error instanceof TypeError ? 'The server cannot be reached.' : error.message;
  }
}

function showAll(files) {
  for (const file of files) show(file);
}

input.addEventListener('change', () => {
  showAll(input.files);
  input.value = '';
});
document.addEventListener('paste', (event) => showAll(event.clipboardData.files));
document.addEventListener('dragover', (event) => {
  event.preventDefault();
  drop.classList.add('over');
});
document.addEventListener('dragleave', () => drop.classList.remove('over'));
document.addEventListener('drop', (event) => {
  event.preventDefault();
  drop.classList.remove('over');
  showAll(event.dataTransfer.files);
});
