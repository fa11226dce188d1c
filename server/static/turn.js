// What the page shows of one turn: the question, and one of its answers with what can be done about it.

import { Answer, isOver, newRecord, secondsToFirstToken, tokensPerSecond } from './answer.js';
import { MarkdownView } from './markdown.js';

// Rendering takes at most this share of the time: the longer a frame took, the longer until the next.
const RENDER_SHARE = 0.2;
const MAX_ANNOUNCED_CHARS = 3000;

const FINISH_REASONS = {
  stop: '',
  length: 'cut at the length limit',
  stopped: 'stopped', // by this page
  cancelled: 'cancelled',
  deadline_exceeded: 'stopped at the time limit',
};

export class Turn {
  #page;
  #markdown;
  #isRenderDue = false;
  #renderAt = 0;

  /** The record has a question, answers, and which of them is shown; the page carries out what is asked here. */
  constructor(record, page) {
    this.record = record;
    this.answer = null; // the one under way
    this.#page = page;
    this.element = document.getElementById('turn-template').content.firstElementChild.cloneNode(true);
    const on = (selector, listener) => this.#find(selector).addEventListener('click', listener);
    on('.edit', () => this.#edit());
    on('.previous', () => this.#switchTo(record.shown - 1));
    on('.next', () => this.#switchTo(record.shown + 1));
    on('.copy', (event) => page.copy(this.shown.text, event.currentTarget));
    on('.retry', () => page.regenerate(this));
    on('.regenerate', () => page.regenerate(this));
    this.#find('.bubble').textContent = record.question;
    if (this.shown) this.#show(record.shown);
  }

  get shown() { return this.record.answers[this.record.shown]; }

  /** A new answer, in place of one that said nothing. */
  begin() {
    const { record } = this;
    if (this.shown && !this.shown.text) record.answers.splice(record.shown, 1);
    record.answers.push(newRecord());
    this.#show(record.answers.length - 1);
    return this.follow();
  }

  /** Take up the answer shown, which is not over. */
  follow() {
    this.answer = new Answer(this.shown, () => this.#onChange());
    this.answer.settled.then(() => {
      this.answer = null;
      this.#page.announce(this.shown.error ?? this.#find('.text').innerText.slice(0, MAX_ANNOUNCED_CHARS));
    });
    return this.answer;
  }

  /** Show what can be done now. */
  showControls() {
    const { record, shown } = this;
    const isFree = !this.#page.isBusy;
    const isLast = this.#page.isLast(this);
    this.#find('.edit').disabled = this.#find('.editor .primary').disabled = !isFree;
    this.#find('.copy').hidden = !shown.text;
    this.#find('.retry').hidden = this.#find('.regenerate').hidden = !isLast;
    this.#find('.retry').disabled = this.#find('.regenerate').disabled = !isFree;
    // What follows was said upon the answer shown, so only the last one can be exchanged.
    this.#find('.alternatives').hidden = !isLast || record.answers.length < 2;
    this.#find('.previous').disabled = !isFree || record.shown === 0;
    this.#find('.next').disabled = !isFree || record.shown === record.answers.length - 1;
    this.#find('.place').textContent = `${record.shown + 1} / ${record.answers.length}`;
  }

  #find(selector) { return this.element.querySelector(selector); }

  #show(index) {
    this.record.shown = index;
    this.#markdown = new MarkdownView(this.#find('.text'));
    this.#render();
  }

  #switchTo(index) {
    this.#show(index);
    this.showControls();
    this.#page.save();
  }

  #edit() {
    const editor = this.#find('.editor');
    const field = this.#find('.editor textarea');
    const close = () => {
      editor.hidden = true;
      this.#find('.edit').focus();
    };
    const send = (event) => {
      event.preventDefault();
      if (!field.value.trim() || this.#page.isBusy) return;
      editor.hidden = true;
      this.#page.edit(this, field.value);
    };
    editor.hidden = false;
    field.value = this.record.question;
    field.focus();
    editor.onsubmit = send;
    field.onkeydown = (event) => {
      if (isSendKey(event)) send(event);
      if (event.key !== 'Escape' || event.isComposing) return;
      event.stopPropagation();
      close();
    };
    this.#find('.cancel').onclick = close;
  }

  #onChange() {
    this.#page.save();
    if (isOver(this.shown)) this.#render();
    else if (!this.#isRenderDue) {
      this.#isRenderDue = true;
      setTimeout(() => requestAnimationFrame(() => {
        this.#isRenderDue = false;
        this.#render();
      }), this.#renderAt - performance.now());
    }
  }

  #render() {
    const startedAt = performance.now();
    const { shown } = this;
    this.#markdown.render(shown.text, !isOver(shown));
    const article = this.#find('.answer');
    article.dataset.state = shown.state;
    article.ariaBusy = String(!isOver(shown));
    const note = this.answer?.note ?? '';
    if (note !== this.#find('.note').textContent) {
      this.#find('.note').textContent = note;
      this.#page.announce(note.replace(/\d+ s$/, '')); // not every second of a countdown
    }
    this.#find('.error span').textContent = shown.error ?? '';
    this.#find('.stats').textContent = statsOf(shown);
    this.#page.follow(); // lays out, which is most of the cost
    this.#renderAt = performance.now() + (performance.now() - startedAt) * (1 / RENDER_SHARE - 1);
  }
}

/** Enter, unless it breaks the line or ends a composition, which Safari marks with 229 only. */
export function isSendKey(event) {
  return event.key === 'Enter' && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

function statsOf(record) {
  const numTokens = record.usage?.completion_tokens ?? record.numTokens;
  const ttft = secondsToFirstToken(record);
  const rate = tokensPerSecond(record);
  return [
    numTokens ? `${numTokens} token${numTokens === 1 ? '' : 's'}` : '',
    rate === null ? '' : `${rate.toFixed(1)} tokens/s`,
    ttft === null ? '' : `first token after ${ttft.toFixed(2)} s`,
    record.finishReason === null ? '' : FINISH_REASONS[record.finishReason] ?? record.finishReason,
  ].filter(Boolean).join(' · ');
}
