// Markdown as models write it, to DOM nodes: the parts of CommonMark and GFM that a chat needs.
// Made with createElement and text nodes only: whatever the text says, no element and no attribute comes out but those
// named here. Raw HTML is text, but for <br>; an image is a link to it. All steps are linear in the text, and nesting is
// bounded.
// Sources: CommonMark 0.31 (delimiter runs, "process emphasis"), GitHub Flavored Markdown (tables, strikethrough).
// Deviations: no indented code, no link references, no entities; sloppy list indentation is accepted.

const MAX_DEPTH = 12; // of containers, and of emphasis, in one another: deeper marks are text
const MAX_COLUMNS = 64;
const MAX_URL_CHARS = 4096;
const LINK_PROTOCOLS = new Set(['http:', 'https:', 'mailto:']);

const FENCE = /^[ \t]*(`{3,}|~{3,})/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const UNDERLINE = /^ {0,3}(?:=+|-+)[ \t]*$/;
const QUOTE = /^[ \t]*>[ \t]?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:[ \t]{1,4}|$)/;

/** An answer that grows: only its last block is rendered again when more of it arrives. */
export class MarkdownView {
  #root;
  #numClosed = 0; // children of the root that no further text can change
  #openAt = 0; // where in the text the first block begins that can still change

  constructor(root) {
    this.#root = root;
    root.replaceChildren();
  }

  /** Show `text`, which begins with all that was shown before. While it `isGrowing`, marks left open look closed. */
  render(text, isGrowing = false) {
    const rawLines = text.slice(this.#openAt).split('\n');
    const lines = rawLines.map((line) => (line.endsWith('\r') ? line.slice(0, -1) : line));
    const fresh = document.createDocumentFragment();
    const numKept = this.#numClosed;
    for (let i = 0, end = 0, offset = this.#openAt; i < lines.length; i = end) {
      // A block that begins on lines known whole, of which a table needs two, closes all before it. A blank line does
      // not: a list may go on.
      if (i < lines.length - (beginsTable(lines, i) ? 2 : 1) && !isBlank(lines[i])) {
        this.#openAt = offset;
        this.#numClosed = numKept + fresh.childNodes.length;
      }
      end = renderBlock(lines, i, fresh, { depth: 0, isTight: false, isGrowing });
      for (let j = i; j < end; j++) offset += rawLines[j].length + 1;
    }
    morph(this.#root, numKept, fresh);
  }
}

/**
 * Make the children of `parent` from number `start` on look like those of `fresh`. Nodes that can stay do, and with them
 * a selection, the focus, a click under way and how far code is scrolled.
 */
function morph(parent, start, fresh) {
  let old = parent.childNodes[start] ?? null;
  for (const node of [...fresh.childNodes]) {
    const next = old?.nextSibling ?? null;
    if (!old) parent.append(node);
    else if (old.nodeName !== node.nodeName) old.replaceWith(node);
    else if (node.nodeType === Node.TEXT_NODE) {
      if (node.data.startsWith(old.data)) old.appendData(node.data.slice(old.data.length)); // which keeps a selection
      else old.data = node.data;
    } else {
      for (const { name } of [...old.attributes]) {
        if (!node.hasAttribute(name) && !name.startsWith('data-')) old.removeAttribute(name);
      }
      for (const { name, value } of node.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
      morph(old, 0, node);
    }
    old = next;
  }
  while (old) {
    const next = old.nextSibling;
    old.remove();
    old = next;
  }
}

function renderBlocks(lines, parent, context) {
  for (let i = 0; i < lines.length;) i = renderBlock(lines, i, parent, context);
}

/** What holds inside a block of these lines that ends before line `end`: only the last line there is can be growing. */
function within(context, lines, end, changes) {
  return { ...context, isGrowing: context.isGrowing && end === lines.length, ...changes };
}

/** Render the block that begins at line `i`; returns the line behind it. */
function renderBlock(lines, i, parent, context) {
  const line = lines[i];
  if (isBlank(line)) return i + 1;
  if (isFence(line)) return renderFence(lines, i, parent);
  if (HEADING.test(line)) return renderHeading(lines, i, parent, context);
  if (RULE.test(line)) {
    add(parent, 'hr');
    return i + 1;
  }
  if (context.depth < MAX_DEPTH && QUOTE.test(line)) return renderQuote(lines, i, parent, context);
  if (context.depth < MAX_DEPTH && ITEM.test(line)) return renderList(lines, i, parent, context);
  if (beginsTable(lines, i)) return renderTable(lines, i, parent);
  return renderParagraph(lines, i, parent, context);
}

function renderFence(lines, i, parent) {
  const [opening, mark] = FENCE.exec(lines[i]);
  const indent = indentOf(lines[i]);
  let end = i + 1;
  while (end < lines.length && !closesFence(lines[end], mark)) end++;
  const figure = add(parent, 'figure');
  figure.className = 'code';
  const caption = add(figure, 'figcaption');
  add(caption, 'span').textContent = lines[i].slice(opening.length).trim().split(/\s/, 1)[0].slice(0, 40) || 'text';
  const button = add(caption, 'button');
  button.type = 'button';
  button.className = 'copy-code';
  button.textContent = 'Copy';
  const code = add(add(figure, 'pre'), 'code');
  code.textContent = lines.slice(i + 1, end).map((line) => dedent(line, indent)).join('\n');
  return Math.min(end + 1, lines.length);
}

function renderHeading(lines, i, parent, context) {
  const [, marks] = HEADING.exec(lines[i]);
  let text = lines[i].trim().slice(marks.length).trim();
  let end = text.length;
  while (text[end - 1] === '#') end--;
  if (end === 0 || text[end - 1] === ' ') text = text.slice(0, end).trim();
  addHeading(parent, marks.length, text, within(context, lines, i + 1));
  return i + 1;
}

/** The page itself has the headings above an answer's. */
function addHeading(parent, level, text, context) {
  renderInline(text, add(parent, `h${Math.min(6, level + 2)}`), context);
}

function renderQuote(lines, i, parent, context) {
  let end = i;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  const inner = lines.slice(i, end).map((line) => line.replace(QUOTE, ''));
  const changes = { depth: context.depth + 1, isTight: false };
  renderBlocks(inner, add(parent, 'blockquote'), within(context, lines, end, changes));
  return end;
}

function renderList(lines, i, parent, context) {
  const kindOf = (marker) => marker.at(-1); // "-" and "*" are lists of their own, and so are "1." and "1)"
  const [, , firstMarker] = ITEM.exec(lines[i]);
  const outerIndent = indentOf(lines[i]);
  const items = [];
  let isLoose = false;
  let wasBlank = false;
  let end = i; // behind the last line that belongs to the list
  for (let j = i; j < lines.length; j++) {
    const line = lines[j];
    if (isBlank(line)) {
      wasBlank = true;
      continue;
    }
    const indent = indentOf(line);
    const match = ITEM.exec(line);
    if (items.length && indent >= outerIndent + 2) {
      // belongs to the item above, if not quite where it should begin
    } else if (match && kindOf(match[2]) === kindOf(firstMarker) && !RULE.test(line)) {
      isLoose ||= wasBlank;
      items.push({ lines: [line.slice(match[0].length)], indent: match[0].length });
      wasBlank = false;
      end = j + 1;
      continue;
    } else if (match || wasBlank || interruptsParagraph(lines, j)) break;
    const item = items.at(-1);
    if (wasBlank) {
      isLoose = true;
      for (let k = end; k < j; k++) item.lines.push('');
    }
    item.lines.push(dedent(line, item.indent));
    wasBlank = false;
    end = j + 1;
  }
  const list = add(parent, /\d/.test(firstMarker) ? 'ol' : 'ul');
  if (list.localName === 'ol' && parseInt(firstMarker, 10) !== 1) list.start = parseInt(firstMarker, 10);
  const inner = within(context, lines, end, { depth: context.depth + 1, isTight: !isLoose });
  for (const item of items) {
    item.lines[0] = item.lines[0].replace(/^\[([ xX])\] /, (_, mark) => (mark === ' ' ? '\u2610 ' : '\u2611 ')); // a task
    const isGrowing = inner.isGrowing && item === items.at(-1);
    renderBlocks(item.lines, add(list, 'li'), { ...inner, isGrowing });
  }
  return end;
}

function renderTable(lines, i, parent) {
  const aligns = cellsOf(lines[i + 1]).map((cell) => {
    if (cell.endsWith(':')) return cell.startsWith(':') ? 'center' : 'right';
    return 'left';
  });
  const box = add(parent, 'div');
  box.className = 'table';
  const table = add(box, 'table');
  const addRow = (section, line, name) => {
    const row = add(section, 'tr');
    cellsOf(line).slice(0, aligns.length).forEach((text, column) => {
      const cell = add(row, name);
      if (aligns[column] !== 'left') cell.className = aligns[column];
      renderInline(text, cell, { isGrowing: false });
    });
  };
  addRow(add(table, 'thead'), lines[i], 'th');
  const body = add(table, 'tbody');
  let end = i + 2;
  for (; end < lines.length && lines[end].includes('|') && !beginsBlock(lines[end]); end++) addRow(body, lines[end], 'td');
  return end;
}

function renderParagraph(lines, i, parent, context) {
  let end = i + 1;
  for (; end < lines.length && !isBlank(lines[end]); end++) {
    if (UNDERLINE.test(lines[end])) {
      const text = lines.slice(i, end).map((line) => line.trim()).join('\n');
      addHeading(parent, lines[end].includes('=') ? 1 : 2, text, within(context, lines, end));
      return end + 1;
    }
    if (interruptsParagraph(lines, end)) break;
  }
  const text = lines.slice(i, end).map((line) => line.trimStart()).join('\n').trimEnd();
  renderInline(text, context.isTight ? parent : add(parent, 'p'), within(context, lines, end));
  return end;
}

function beginsBlock(line) {
  return isFence(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);
}

function interruptsParagraph(lines, i) {
  if (beginsBlock(lines[i]) || beginsTable(lines, i)) return true;
  // A line that happens to begin with a number, or has a dash and nothing else, is text.
  const match = ITEM.exec(lines[i]);
  return match !== null && match[0].length < lines[i].length && !/^(?!0*1[.)])\d/.test(match[2]);
}

function isBlank(line) {
  return line.trim() === '';
}

function isFence(line) {
  const match = FENCE.exec(line);
  // A backtick later in the line means inline code.
  return match !== null && !(match[1][0] === '`' && line.includes('`', match[0].length));
}

function closesFence(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && text === mark[0].repeat(text.length);
}

function indentOf(line) {
  let indent = 0;
  for (const char of line) {
    if (char === ' ') indent++;
    else if (char === '\t') indent += 4 - (indent % 4);
    else break;
  }
  return indent;
}

/** The line without up to `indent` columns of leading blanks. Tabs behind them stay tabs, as a Makefile's have to. */
function dedent(line, indent) {
  let column = 0;
  let i = 0;
  for (; column < indent && ' \t'.includes(line[i] ?? '.'); i++) column += line[i] === ' ' ? 1 : 4 - (column % 4);
  return ' '.repeat(Math.max(0, column - indent)) + line.slice(i);
}

function beginsTable(lines, i) {
  if (i + 1 >= lines.length || !lines[i].includes('|') || !/^[ \t|:-]+$/.test(lines[i + 1])) return false;
  const rule = cellsOf(lines[i + 1]);
  return rule.length <= MAX_COLUMNS && rule.length === cellsOf(lines[i]).length
    && rule.every((cell) => /^:?-+:?$/.test(cell));
}

function cellsOf(line) {
  let text = line.trim();
  if (text.startsWith('|')) text = text.slice(1);
  if (text.endsWith('|') && !text.endsWith('\\|')) text = text.slice(0, -1);
  return text.split(/(?<!\\)\|/).map((cell) => cell.replaceAll('\\|', '|').trim());
}

// Inline. Runs of "*", "_" and "~~" become text nodes and entries of a linked list; those that match are then wrapped
// in place, so that a text of nothing but marks costs no more than any other.

const PLAIN = /.[^\\`*_~[\]!h\n<]*/sy; // whatever comes first, and what means nothing after it
const URL_TEXT = /https?:\/\/[^\s<>"`]+/y;
const LINE_BREAK = /<br[ \t]*\/?>/iy; // which models write in the cells of tables
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const SPACE = /\s/;
const PUNCTUATION = /[\p{P}\p{S}]/u;

function renderInline(text, parent, { isGrowing }) {
  let end = text.length;
  // Marks at the very end may be half of what they are going to be.
  if (isGrowing) while ('*_~`'.includes(text[end - 1] ?? ' ')) end--;
  new Inline(text.slice(0, end), parent).render(isGrowing);
}

class Inline {
  #text;
  #parent;
  #at = 0;
  #plainTexts = []; // that are to become one node
  #lastRun = null; // of the delimiter runs not matched yet
  #brackets = [];
  #backticks = null; // by length: where the runs of that length are
  #depths = new Map();
  #isTooDeep = false;

  constructor(text, parent) {
    this.#text = text;
    this.#parent = parent;
  }

  render(isGrowing) {
    while (this.#at < this.#text.length) this.#step(isGrowing);
    this.#flush();
    this.#matchRuns(null, isGrowing);
  }

  #step(isGrowing) {
    const text = this.#text;
    const char = text[this.#at];
    if (char === '\\') this.#escape();
    else if (char === '`') this.#code(isGrowing);
    else if (char === '*' || char === '_' || char === '~') this.#run(char);
    else if (char === '[') this.#openBracket(char);
    else if (char === '!' && text[this.#at + 1] === '[') this.#openBracket('![');
    else if (char === ']') this.#closeBracket();
    else if (char === '\n') this.#lineBreak();
    else if (char === '<') this.#tag();
    else if (char === 'h') this.#url();
    else this.#plain();
  }

  #plain() {
    PLAIN.lastIndex = this.#at;
    this.#addText(PLAIN.exec(this.#text)[0]);
  }

  #addText(text) {
    this.#at += text.length;
    this.#plainTexts.push(text);
  }

  /** Text that may yet turn out to be a mark has a node of its own. */
  #addMark(text) {
    this.#at += text.length;
    return this.#append(document.createTextNode(text));
  }

  #append(node) {
    this.#flush();
    return this.#parent.appendChild(node);
  }

  #flush() {
    if (this.#plainTexts.length) this.#parent.append(this.#plainTexts.join(''));
    this.#plainTexts = [];
  }

  #escape() {
    const next = this.#text[this.#at + 1];
    if (next === '\n') {
      this.#append(document.createElement('br'));
      this.#at += 2;
    } else if (next !== undefined && ESCAPABLE.test(next)) {
      this.#at += 1;
      this.#addText(next);
    } else this.#addText('\\');
  }

  #lineBreak() {
    const before = this.#plainTexts.at(-1);
    if (before?.endsWith('  ')) {
      this.#plainTexts[this.#plainTexts.length - 1] = before.trimEnd();
      this.#append(document.createElement('br'));
      this.#at += 1;
    } else this.#addText('\n'); // shown as a break by the style sheet: poems and addresses need it
  }

  #code(isGrowing) {
    if (!this.#backticks) {
      this.#backticks = new Map();
      for (const { 0: { length }, index } of this.#text.matchAll(/`+/g)) {
        if (!this.#backticks.has(length)) this.#backticks.set(length, []);
        this.#backticks.get(length).push(index);
      }
      for (const places of this.#backticks.values()) places.reverse();
    }
    const start = this.#at;
    let length = 1;
    while (this.#text[start + length] === '`') length++;
    const places = this.#backticks.get(length) ?? []; // an escaped backtick makes the run after it shorter
    while (places.length && places.at(-1) <= start) places.pop();
    let end = places.at(-1);
    if (end === undefined && isGrowing && start + length < this.#text.length) end = this.#text.length;
    if (end === undefined) {
      this.#addText('`'.repeat(length));
      return;
    }
    const code = this.#text.slice(start + length, end).replaceAll('\n', ' ');
    const isPadded = code.startsWith(' ') && code.endsWith(' ') && code.trim() !== '';
    this.#append(document.createElement('code')).textContent = isPadded ? code.slice(1, -1) : code;
    this.#at = end + length;
  }

  #run(char) {
    const start = this.#at;
    let end = start + 1;
    while (this.#text[end] === char) end++;
    const node = this.#addMark(this.#text.slice(start, end));
    const size = end - start;
    if (char === '~' && size !== 2) return;
    const before = this.#text[start - 1] ?? ' ';
    const after = this.#text[end] ?? ' ';
    const isLeft = !SPACE.test(after) && (!PUNCTUATION.test(after) || SPACE.test(before) || PUNCTUATION.test(before));
    const isRight = !SPACE.test(before) && (!PUNCTUATION.test(before) || SPACE.test(after) || PUNCTUATION.test(after));
    const isWord = char === '_';
    this.#lastRun = {
      char,
      size,
      count: size,
      node,
      canOpen: isLeft && (!isWord || !isRight || PUNCTUATION.test(before)),
      canClose: isRight && (!isWord || !isLeft || PUNCTUATION.test(after)),
      previous: this.#lastRun,
      next: null,
    };
    if (this.#lastRun.previous) this.#lastRun.previous.next = this.#lastRun;
  }

  #openBracket(mark) {
    const node = this.#addMark(mark);
    this.#brackets.push({ node, lastRun: this.#lastRun });
  }

  #closeBracket() {
    const bracket = this.#brackets.pop();
    const target = bracket && this.#readTarget(this.#at + 1);
    if (!target) {
      this.#addText(']');
      return;
    }
    this.#flush();
    this.#matchRuns(bracket.lastRun, false);
    const link = makeLink(target.url);
    if (!this.#wrap(bracket.node, null, link)) {
      this.#addText(']');
      return;
    }
    if (!link.hasChildNodes()) link.textContent = target.url;
    bracket.node.remove();
    this.#brackets.length = 0; // no link holds another
    this.#at = target.end;
  }

  /** Read "(url "title")" at `at`; null where there is none, or none that may be followed. */
  #readTarget(at) {
    const text = this.#text;
    if (text[at] !== '(') return null;
    const limit = Math.min(text.length, at + MAX_URL_CHARS);
    const skipBlanks = () => { while (at < limit && SPACE.test(text[at])) at++; };
    at++;
    skipBlanks();
    let url;
    if (text[at] === '<') {
      const start = ++at;
      while (at < limit && !'<>\n'.includes(text[at])) at++;
      url = text.slice(start, at);
      if (text[at++] !== '>') return null;
    } else {
      const start = at;
      for (let depth = 0; at < limit && !SPACE.test(text[at]); at++) {
        if (text[at] === '(' && ++depth > 3) return null;
        if (text[at] === ')' && --depth < 0) break;
      }
      url = text.slice(start, at);
    }
    skipBlanks();
    if ('"\''.includes(text[at] ?? ' ')) {
      const quote = text[at++];
      while (at < limit && text[at] !== quote) at++;
      at++;
      skipBlanks();
    }
    const safe = safeUrl(url);
    return at < limit && text[at] === ')' && safe ? { url: safe, end: at + 1 } : null;
  }

  #tag() {
    LINE_BREAK.lastIndex = this.#at;
    const lineBreak = LINE_BREAK.exec(this.#text)?.[0];
    if (lineBreak === undefined) this.#autolink();
    else {
      this.#append(document.createElement('br'));
      this.#at += lineBreak.length;
    }
  }

  #autolink() {
    const limit = this.#at + MAX_URL_CHARS;
    let end = this.#at + 1;
    while (end < limit && end < this.#text.length && !/[\s<>]/.test(this.#text[end])) end++;
    const inner = this.#text.slice(this.#at + 1, end);
    const url = this.#text[end] === '>' && safeUrl(/^[^\s@:]+@[^\s@:]+$/.test(inner) ? `mailto:${inner}` : inner);
    if (!url) {
      this.#addText('<');
      return;
    }
    this.#append(makeLink(url, inner));
    this.#at = end + 1;
  }

  #url() {
    URL_TEXT.lastIndex = this.#at;
    const isWithin = /[\w:/=]/.test(this.#text[this.#at - 1] ?? ' '); // a word or another address
    let shown = isWithin || this.#brackets.length ? null : URL_TEXT.exec(this.#text)?.[0];
    shown = shown?.slice(0, MAX_URL_CHARS);
    // What ends a sentence, closes a bracket or ends emphasis is not the address's.
    while (shown && /[.,:;!?'*_~\])]/.test(shown.at(-1)) && !(shown.endsWith(')') && shown.includes('('))) {
      shown = shown.slice(0, -1);
    }
    const url = shown && safeUrl(shown);
    if (!url) {
      this.#plain();
      return;
    }
    this.#append(makeLink(url, shown));
    this.#at += shown.length;
  }

  /** Match the runs behind `bottom`: each that can close with the nearest that can open. */
  #matchRuns(bottom, isGrowing) {
    let closer = this.#lastRun === bottom ? null : this.#lastRun;
    while (closer && closer.previous !== bottom) closer = closer.previous;
    const floors = new Map(); // where a search for the opener of such a closer has failed
    while (closer) {
      const kind = `${closer.char}${closer.canOpen}${closer.size % 3}`;
      const floor = floors.get(kind);
      let opener = closer.previous;
      if (closer.canClose) while (opener !== bottom && opener !== floor && !isPair(opener, closer)) opener = opener.previous;
      if (!closer.canClose || opener === bottom || opener === floor) {
        if (closer.canClose) floors.set(kind, closer.previous);
        closer = closer.next;
        continue;
      }
      closer = this.#join(opener, closer);
    }
    if (isGrowing) this.#closeOpenRuns(bottom);
    this.#lastRun = bottom;
    if (bottom) bottom.next = null;
  }

  /** Wrap what is between the two; returns the run to go on with. */
  #join(opener, closer) {
    const width = Math.min(opener.count, closer.count, 2);
    const name = opener.char === '~' ? 'del' : width === 2 ? 'strong' : 'em';
    opener.next = closer;
    closer.previous = opener;
    if (!this.#wrap(opener.node, closer.node, document.createElement(name))) return null;
    for (const run of [opener, closer]) {
      run.count -= width;
      run.node.data = run.char.repeat(run.count);
      if (run.count === 0) this.#unlink(run);
    }
    return closer.count ? closer : closer.next;
  }

  #unlink(run) {
    if (run.previous) run.previous.next = run.next;
    if (run.next) run.next.previous = run.previous;
    else this.#lastRun = run.previous;
  }

  /** Show "**" that waits for its other half as if that had come. */
  #closeOpenRuns(bottom) {
    for (let run = this.#lastRun; run && run !== bottom; run = run.previous) {
      if (!run.canOpen || run.char !== '*' || run.count !== 2) continue;
      if (this.#wrap(run.node, null, document.createElement('strong'))) run.node.data = '';
    }
  }

  /**
   * Move the siblings between `first` and `last`, both exclusive, into `element`. Where that gets too deep it does
   * nothing and returns false, as it will for the rest of the text: looking again and again would cost a square.
   */
  #wrap(first, last, element) {
    if (this.#isTooDeep) return false;
    let depth = 0;
    for (let node = first.nextSibling; node !== last; node = node.nextSibling) {
      depth = Math.max(depth, this.#depths.get(node) ?? 0);
    }
    this.#isTooDeep = depth >= MAX_DEPTH;
    if (this.#isTooDeep) return false;
    while (first.nextSibling !== last) element.append(first.nextSibling);
    first.after(element);
    this.#depths.set(element, depth + 1);
    return true;
  }
}

function isPair(opener, closer) {
  if (opener.char !== closer.char || !opener.canOpen) return false;
  if (!opener.canClose && !closer.canOpen) return true;
  return closer.size % 3 === 0 || (opener.size + closer.size) % 3 !== 0;
}

/** The address as the browser understands it, or null unless it is absolute and of a harmless kind. */
function safeUrl(text) {
  if (!URL.canParse(text)) return null;
  const url = new URL(text);
  return LINK_PROTOCOLS.has(url.protocol) ? url.href : null;
}

function makeLink(url, text = '') {
  const link = document.createElement('a');
  link.href = url;
  link.target = '_blank';
  link.rel = 'noopener noreferrer';
  link.textContent = text;
  return link;
}

function add(parent, name) {
  return parent.appendChild(document.createElement(name));
}
