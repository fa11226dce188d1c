// The API's document as a page: every route, what it takes and answers, and a form to try it with.

import { loadApiKey, saveApiKey } from './storage.js';

const METHODS = ['get', 'post', 'put', 'patch', 'delete'];
// What JSON Schema says of a value beside its type, in words.
const LIMITS = {
  minimum: 'at least', exclusiveMinimum: 'above', maximum: 'at most', exclusiveMaximum: 'below', minLength: 'characters, at least',
  maxLength: 'characters, at most', minItems: 'items, at least', maxItems: 'items, at most', pattern: 'pattern', format: 'format',
};
const MAX_SHOWN_CHARS = 200_000; // of an answer

const about = document.getElementById('about');
const keyForm = document.getElementById('key');

function element(name, { text, children = [], ...properties } = {}) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...(text === undefined ? children : [text]));
  return made;
}

function authorization() {
  const key = loadApiKey();
  return key ? { authorization: `Bearer ${key}` } : {};
}

/** A schema without the null that every field may be, and without a list of one. */
function withoutNull(schema) {
  const { anyOf, ...rest } = schema;
  const kinds = anyOf?.filter((kind) => kind.type !== 'null');
  if (!kinds) return schema;
  return kinds.length === 1 ? { ...rest, ...kinds[0] } : { ...rest, anyOf: kinds };
}

/** Whether a field is there only to be left alone: what it may be asks for nothing. */
function isUnsupported(schema) {
  return Object.keys(schema).length === 1 && schema.enum?.includes(null) === true;
}

function joined(parts, between) {
  return parts.flatMap((part, i) => (i ? [between, ...part] : part));
}

/** What a value may be, as text and links to shapes. */
function typeOf(schema) {
  const plain = withoutNull(schema);
  const kinds = plain.anyOf ?? plain.oneOf;
  if (plain.$ref) {
    const name = plain.$ref.split('/').at(-1);
    return [element('a', { href: `#shape-${name}`, text: name })];
  }
  if (plain.const !== undefined) return [element('code', { text: JSON.stringify(plain.const) })];
  if (plain.enum) {
    const values = plain.enum.filter((value) => value !== null);
    return values.length ? joined(values.map((value) => [element('code', { text: JSON.stringify(value) })]), ' or ') : ['nothing'];
  }
  if (plain.contentSchema) return ['JSON of ', ...typeOf(plain.contentSchema)];
  if (kinds) return joined(kinds.map(typeOf), ' or ');
  if (plain.type === 'array') return ['list of ', ...(plain.items ? typeOf(plain.items) : ['anything'])];
  if (plain.type === 'object' && plain.additionalProperties?.type) return ['object of ', ...typeOf(plain.additionalProperties)];
  return [plain.type ?? 'anything'];
}

function limitsOf(schema) {
  const plain = withoutNull(schema);
  return Object.keys(LIMITS).filter((name) => plain[name] !== undefined).map((name) => `${LIMITS[name]} ${plain[name]}`).join('; ');
}

/** A table of [name, schema, whether it is needed, where it goes]. */
function table(rows) {
  const head = element('tr', { children: ['Name', 'What', 'Limits'].map((text) => element('th', { scope: 'col', text })) });
  const body = rows.map(([name, schema, isNeeded, place]) => {
    const label = element('th', { scope: 'row', children: [element('code', { text: name, className: isNeeded ? 'required' : '' })] });
    if (place) label.append(` ${place}`);
    const what = schema.description ? [...typeOf(schema), `: ${schema.description}`] : typeOf(schema);
    return element('tr', { children: [label, element('td', { children: what }), element('td', { className: 'limits', text: limitsOf(schema) })] });
  });
  const made = element('table', { children: [element('thead', { children: [head] }), element('tbody', { children: body })] });
  return element('div', { className: 'table', tabIndex: 0, role: 'group', ariaLabel: 'table', children: [made] });
}

function fieldsOf(schema) {
  const rows = Object.entries(schema.properties ?? {}).map(([name, each]) => [name, each, schema.required?.includes(name)]);
  const supported = rows.filter(([, each]) => !isUnsupported(each));
  const others = rows.filter(([, each]) => isUnsupported(each));
  const made = supported.length ? [table(supported)] : [element('p', { children: typeOf(schema) })];
  if (others.length) {
    const summary = element('summary', { text: 'Not supported, and taken only where they ask for nothing' });
    made.push(element('details', { children: [summary, table(others)] }));
  }
  return made;
}

function contentOf(content) {
  return Object.entries(content).map(([type, { schema }]) => {
    const fields = schema.properties && !schema.$ref ? [table(Object.entries(schema.properties))] : typeOf(schema);
    return element('div', { children: [element('code', { text: type }), ' ', ...fields] });
  });
}

function responsesOf(api, responses) {
  return Object.entries(responses).map(([status, response]) => {
    const found = response.$ref ? api.components.responses[status] : response;
    const made = element('div', { children: [element('code', { text: status }), ` ${found.description}`] });
    if (!response.$ref) made.append(...contentOf(found.content ?? {}));
    return made;
  });
}

/** The request that a form holds: [path with query, fetch's options]. */
function requestOf(operation, form) {
  const { path, method, parameters, accept } = operation;
  const headers = { ...authorization(), accept };
  const query = new URLSearchParams();
  let target = path;
  for (const { name, in: place } of parameters) {
    const { value } = form.elements[`${place} ${name}`];
    if (place === 'path') target = target.replace(`{${name}}`, encodeURIComponent(value).replaceAll('%2F', '/'));
    else if (value && place === 'header') headers[name] = value;
    else if (value) query.append(name, value);
  }
  const body = form.elements.body?.value;
  if (body !== undefined) headers['content-type'] = 'application/json';
  return [`${target}${query.size ? `?${query}` : ''}`, { method: method.toUpperCase(), headers, body }];
}

/** Show the text of a response as it comes; whole JSON is indented. */
async function show(response, shown) {
  const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (let piece = await reader?.read(); piece && !piece.done; piece = await reader.read()) {
    text += piece.value;
    shown.textContent = text.slice(0, MAX_SHOWN_CHARS);
  }
  if (text.length > MAX_SHOWN_CHARS) shown.textContent += ' …';
  else if (response.headers.get('content-type')?.startsWith('application/json')) {
    shown.textContent = JSON.stringify(JSON.parse(text), null, 2);
  }
}

async function send(operation, form) {
  const status = form.querySelector('output');
  const shown = form.querySelector('.example');
  const stop = form.querySelector('.stop');
  const leaving = new AbortController();
  stop.onclick = () => leaving.abort();
  stop.hidden = false;
  shown.hidden = true;
  status.className = '';
  status.textContent = 'sent';
  const startedMs = performance.now();
  try {
    const [target, options] = requestOf(operation, form);
    const response = await fetch(target, { ...options, signal: leaving.signal });
    const elapsedMs = Math.round(performance.now() - startedMs);
    const id = response.headers.get('x-request-id');
    status.textContent = `${response.status} after ${elapsedMs} ms${id ? `, x-request-id ${id}` : ''}`;
    status.className = response.ok ? '' : 'failed';
    shown.hidden = false;
    shown.textContent = '';
    await show(response, shown);
  } catch (error) {
    status.className = 'failed';
    status.textContent = leaving.signal.aborted ? 'stopped' : `no answer: ${error.message}`;
  } finally {
    stop.hidden = true;
  }
}

function tryForm(operation) {
  const children = [element('h3', { text: 'Try it' })];
  const inputs = operation.parameters.map(({ name, in: place, required = false }) => (
    element('label', { children: [`${name} (${place})`, element('input', { name: `${place} ${name}`, required, autocomplete: 'off', spellcheck: false })] })
  ));
  if (inputs.length) children.push(element('div', { className: 'parameters', children: inputs }));
  if (operation.body) {
    const value = JSON.stringify(operation.body.example ?? {}, null, 2);
    children.push(element('label', { children: ['Body', element('textarea', { name: 'body', value, spellcheck: false })] }));
  }
  const buttons = [
    element('button', { className: 'primary', text: 'Send' }),
    element('button', { type: 'button', className: 'stop', hidden: true, text: 'Stop' }),
    element('output'),
  ];
  const footer = element('footer', { children: buttons });
  const shown = element('pre', { className: 'example', hidden: true, tabIndex: 0, role: 'group', ariaLabel: 'Answer' });
  const form = element('form', { className: 'try', children: [...children, footer, shown] });
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    send(operation, form);
  });
  return form;
}

function showOperation(api, path, method, described) {
  const { operationId: id, summary, parameters = [], requestBody, responses } = described;
  const head = [element('span', { className: 'method', text: method.toUpperCase() }), element('code', { text: path }), element('span', { text: summary })];
  const children = [];
  if (parameters.length) {
    const rows = parameters.map((each) => [each.name, each.schema ?? each.content['application/json'].schema, each.required, each.in]);
    children.push(element('h3', { text: 'Parameters' }), table(rows));
  }
  if (requestBody) children.push(element('h3', { text: 'Body' }), ...contentOf(requestBody.content));
  const accept = Object.keys(Object.entries(responses).find(([status]) => status.startsWith('2'))?.[1].content ?? {}).join(', ');
  const operation = { path, method, parameters, accept: `${accept || 'application/json'}, */*`, body: requestBody?.content['application/json'] };
  children.push(tryForm(operation), element('h3', { text: 'Answers' }), ...responsesOf(api, responses));
  const inside = element('div', { children });
  return element('details', { className: 'entry', id, children: [element('summary', { children: head }), inside] });
}

function showSchema(name, schema) {
  const children = schema.description ? [element('p', { text: schema.description }), ...fieldsOf(schema)] : fieldsOf(schema);
  const summary = element('summary', { children: [element('code', { text: name })] });
  return element('details', { className: 'entry', id: `shape-${name}`, children: [summary, element('div', { children })] });
}

function showDocument(api) {
  about.textContent = `${api.info.title} ${api.info.version}. ${api.info.description}`;
  const operations = Object.entries(api.paths).flatMap(([path, item]) => (
    METHODS.filter((method) => item[method]).map((method) => showOperation(api, path, method, item[method]))
  ));
  document.getElementById('operations').replaceChildren(...operations);
  const schemas = Object.entries(api.components.schemas).map(([name, schema]) => showSchema(name, schema));
  document.getElementById('schemas').replaceChildren(...schemas);
  openTarget();
}

/** Open what the address names, and go there. */
function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target?.matches('details')) {
    target.open = true;
    target.scrollIntoView();
  }
}

async function load() {
  const response = await fetch('/openapi.json', { headers: authorization() }).catch(() => null);
  const api = await response?.json().catch(() => null);
  keyForm.hidden = !(response?.status === 401 || api?.components?.securitySchemes);
  about.classList.toggle('failed', !response?.ok);
  if (response?.ok) showDocument(api);
  else about.textContent = api?.error?.message ?? 'The server cannot be reached.';
}

keyForm.addEventListener('submit', (event) => {
  event.preventDefault();
  saveApiKey(keyForm.elements['key-value'].value.trim(), false);
  load();
});
addEventListener('hashchange', openTarget);
load();
