// The operator's page: it reads /metrics every two seconds and shows what follows. Nothing is kept but an API key, where
// the server wants one.

import { History, parse, total } from './exposition.js';
import { forgetApiKey, loadApiKey, saveApiKey } from './storage.js';

const INTERVAL_MS = 2000;
const SHORT_S = 10; // of what is felt at once
const MINUTE_S = 60;
const CURVE_S = 300;
const TIERS = ['premium', 'standard', 'batch'];
const TTFT = 'headrace_time_to_first_token_seconds';
const ITL = 'headrace_inter_token_latency_seconds';
const NOTHING = '–';

const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat('en', { maximumSignificantDigits: 3 });
const whole = new Intl.NumberFormat('en');
const history = new History(CURVE_S);

let timer = null;
let isPaused = false;

// [id, what stands there, the points of its curve]
const TILES = [
  gauge('running', 'headrace_num_requests_running'),
  gauge('waiting', 'headrace_num_requests_waiting'),
  flow('generated', 'headrace_generation_tokens_total', SHORT_S),
  flow('prompt', 'headrace_prompt_tokens_total', SHORT_S),
  gauge('cache', 'headrace_kv_cache_usage_ratio', share),
  flow('preempted', 'headrace_num_preemptions_total', MINUTE_S, 60),
];

function gauge(id, name, format = (value) => whole.format(value)) {
  return { id, text: () => orNothing(history.now(name), format), curve: (_, reading) => total(reading, name) };
}

function flow(id, name, overS, per = 1) {
  return {
    id,
    text: () => orNothing(history.rate(name, overS), (rate) => number.format(per * rate)),
    curve: (before, reading) => (total(reading, name) - total(before, name)) / (reading.atS - before.atS),
  };
}

async function read() {
  const key = loadApiKey();
  const options = { cache: 'no-store', headers: key ? { authorization: `Bearer ${key}` } : {}, signal: AbortSignal.timeout(5 * INTERVAL_MS) };
  const response = await fetch('/metrics', options).catch(() => null);
  if (response?.ok) {
    history.add(performance.now() / 1000, parse(await response.text()), 'headrace_engine_steps_total');
    $('key').hidden = true;
    showStatus('ready', 'live');
    show();
  } else if (response?.status === 401) {
    forgetApiKey();
    $('key').hidden = false;
    showStatus('unreachable', key ? 'the server did not accept this key' : 'a key is needed');
  } else showStatus('unreachable', response ? `the server answered ${response.status}` : 'no connection');
}

/** Read now, and again as long as the page is looked at. */
async function run() {
  clearTimeout(timer);
  if (isPaused || document.hidden) return;
  timer = setTimeout(run, INTERVAL_MS);
  await read().catch(() => showStatus('unreachable', 'no connection')); // cut in the middle of an answer
}

function showStatus(state, text) {
  $('status').dataset.state = state;
  setText($('status-text'), text);
  document.querySelector('main').dataset.state = state === 'ready' ? 'live' : 'old';
}

function show() {
  setText($('model'), history.label('vllm:num_requests_running', 'model_name') ?? '');
  for (const { id, text, curve } of TILES) {
    setText($(id).querySelector('b'), text());
    draw($(id).querySelector('polyline'), history.curve(curve));
  }
  fill('latency', TIERS.filter(isInUse).map(latencyRow));
  showTenants();
  fill('cancelled', countRows('headrace_requests_cancelled_total', 'phase'));
  fill('shed', countRows('headrace_requests_shed_total', 'reason'));
  fill('finished', countRows('headrace_requests_finished_total', 'finished_reason'));
}

function isInUse(tier) {
  return history.now(`${TTFT}_count`, { tier }) > 0 || history.now('headrace_tier_requests_waiting', { tier }) > 0;
}

function latencyRow(tier) {
  const percentiles = (name) => [0.5, 0.95, 0.99].map((q) => history.quantile(q, name, MINUTE_S, { tier }));
  const [ttft, itl] = [percentiles(TTFT), percentiles(ITL)];
  const targetS = history.now('headrace_ttft_target_seconds', { tier });
  const cells = [whole.format(history.now('headrace_tier_requests_waiting', { tier })), ...ttft.map(seconds), seconds(targetS), ...itl.map(seconds)];
  return { name: tier, cells, state: ttft[2] > targetS ? 'late' : '' };
}

function showTenants() {
  const rates = (kind) => history.rates('headrace_tenant_tokens_total', 'tenant', MINUTE_S, { kind });
  const [prompt, generated] = [rates('prompt'), rates('generated')];
  const tenants = [...new Set([...prompt.keys(), ...generated.keys()])].map((name) => ({ name, prompt: prompt.get(name) ?? 0, generated: generated.get(name) ?? 0 }));
  const all = tenants.reduce((sum, each) => sum + each.prompt + each.generated, 0);
  const busiest = tenants.sort((a, b) => b.prompt + b.generated - a.prompt - a.generated || (a.name < b.name ? -1 : 1));
  fill('tenants', busiest.map((each) => {
    const part = all && (each.prompt + each.generated) / all;
    return { name: each.name, cells: [number.format(each.generated), number.format(each.prompt), share(part)], meter: part };
  }));
  $('no-tenants').hidden = tenants.length > 0;
}

function countRows(name, label) {
  return [...history.rates(name, label, MINUTE_S)].map(([value, rate]) => ({
    name: value.replaceAll('_', ' '),
    cells: [orNothing(rate, (perS) => number.format(60 * perS)), whole.format(history.now(name, { [label]: value }))],
  }));
}

/** Bring a table's rows up to date; those that can stay do, and with them a reader's place in it. */
function fill(id, rows) {
  const body = $(id).tBodies[0];
  while (body.rows.length > rows.length) body.lastChild.remove();
  rows.forEach(({ name, cells, state = '', meter }, i) => {
    const row = body.rows[i] ?? body.insertRow();
    if (!row.cells.length) {
      const heading = document.createElement('th');
      heading.scope = 'row';
      row.append(heading, ...cells.map(() => document.createElement('td')));
      if (meter !== undefined) row.lastChild.append(document.createElement('meter'), document.createTextNode(''));
      if (id === 'latency') row.cells[4].className = 'target'; // p99, beside its target
    }
    row.dataset.state = state;
    [name, ...cells].forEach((text, j) => setText(j === cells.length && meter !== undefined ? row.lastChild.lastChild : row.cells[j], text));
    if (meter !== undefined) row.querySelector('meter').value = meter;
  });
}

/** A curve of [seconds ago, value]: the last minute or more across, from 0 at the bottom to the largest value. */
function draw(polyline, points) {
  const most = Math.max(...points.map(([, value]) => value), 1e-9);
  const longestS = Math.max(points[0]?.[0] ?? 0, MINUTE_S);
  polyline.setAttribute('points', points.map(([agoS, value]) => `${100 - 100 * agoS / longestS},${24 - 24 * value / most}`).join(' '));
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function orNothing(value, format) {
  return value === null ? NOTHING : format(value);
}

function share(part) {
  return `${(100 * part).toFixed(part < 0.1 ? 1 : 0)} %`;
}

function seconds(value) {
  if (value === null || !Number.isFinite(value)) return NOTHING;
  return value < 1 ? `${number.format(1000 * value)} ms` : `${number.format(value)} s`;
}

$('pause').addEventListener('click', (event) => {
  isPaused = !isPaused;
  event.currentTarget.ariaPressed = String(isPaused);
  if (isPaused) showStatus('connecting', 'paused');
  run();
});
$('key').addEventListener('submit', (event) => {
  event.preventDefault();
  saveApiKey(event.currentTarget.elements.key.value.trim(), false);
  event.currentTarget.reset();
  run();
});
document.addEventListener('visibilitychange', run);
run();
