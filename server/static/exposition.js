// Metrics in Prometheus' text format, and what follows from several readings of them: rates, and percentiles of
// histograms as Prometheus' own histogram_quantile has them.
// Source: Prometheus, "Exposition formats" and "Query functions".

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:\\.|[^"\\])*)"/g;
const ESCAPED = { n: '\n' };

/** What a scrape holds: by name a list of { labels, value, key }, where `key` is the labels as text. */
export function parse(text) {
  const samples = new Map();
  for (const line of text.split('\n')) {
    const match = SAMPLE.exec(line);
    if (!match) continue; // a comment
    const [, name, key = '', value] = match;
    const pairs = [...key.matchAll(LABEL)].map(([, label, raw]) => [label, raw.replace(/\\(.)/g, (_, char) => ESCAPED[char] ?? char)]);
    if (!samples.has(name)) samples.set(name, []);
    samples.get(name).push({ labels: Object.fromEntries(pairs), value: toNumber(value), key });
  }
  return samples;
}

/**
 * Readings of the last minutes. All that is asked of it over a time is of the readings that this time holds, the last
 * one included; null where that are fewer than two.
 */
export class History {
  #readings = []; // { atS, samples }
  #mostS;

  constructor(mostS) {
    this.#mostS = mostS;
  }

  /** Add a reading; where a counter has gone back the server is a new one, and what was before is forgotten. */
  add(atS, samples, counter) {
    const total = (reading) => sum(reading.samples.get(counter) ?? []);
    const last = this.#readings.at(-1);
    if (last && total(last) > total({ samples })) this.#readings = [];
    this.#readings.push({ atS, samples });
    while (atS - this.#readings[0].atS > this.#mostS) this.#readings.shift();
  }

  /** The last reading's value, all labels together; null where there is no such metric. */
  now(name, labels = {}) {
    const found = this.#find(this.#readings.at(-1), name, labels);
    return found.length ? sum(found) : null;
  }

  /** What a label says in the last reading. */
  label(name, label) {
    return this.#readings.at(-1)?.samples.get(name)?.[0].labels[label] ?? null;
  }

  /** By how much a counter has grown per second, all labels together. */
  rate(name, overS, labels = {}) {
    const window = this.#window(overS);
    if (!window) return null;
    const [first, last] = window;
    const grown = sum(this.#find(last, name, labels)) - sum(this.#find(first, name, labels));
    return grown / (last.atS - first.atS);
  }

  /** The same for each value of a label: a Map of [value, per second]. */
  rates(name, label, overS, labels = {}) {
    const values = new Set(this.#find(this.#readings.at(-1), name, labels).map((sample) => sample.labels[label]));
    return new Map([...values].map((value) => [value, this.rate(name, overS, { ...labels, [label]: value })]));
  }

  /** A percentile of what a histogram has observed, null where that is nothing. */
  quantile(q, name, overS, labels = {}) {
    const bounds = this.rates(`${name}_bucket`, 'le', overS, labels);
    const buckets = [...bounds].map(([le, perS]) => [toNumber(le), perS]).sort(([a], [b]) => a - b);
    return buckets.some(([, perS]) => perS === null) ? null : quantileOf(q, buckets);
  }

  /** [seconds before the last reading, value(reading before, reading)] of neighbouring readings, for a curve. */
  curve(value) {
    const lastS = this.#readings.at(-1)?.atS;
    return this.#readings.slice(1).map((reading, i) => [lastS - reading.atS, value(this.#readings[i], reading)]);
  }

  #find(reading, name, labels) {
    const wanted = Object.entries(labels);
    return (reading?.samples.get(name) ?? []).filter((sample) => wanted.every(([label, value]) => sample.labels[label] === value));
  }

  #window(overS) {
    const last = this.#readings.at(-1);
    const first = this.#readings.find((reading) => last.atS - reading.atS <= overS);
    return first && first !== last ? [first, last] : null;
  }
}

/** The sum of a reading's samples of a name. */
export function total(reading, name) {
  return sum(reading.samples.get(name) ?? []);
}

/**
 * The value below which a share `q` of the observations lies, from cumulative `buckets`, [upper bound, count] in order
 * and the last bound infinite: linear inside a bucket, from 0 in the first; beyond the last finite bound, that bound.
 */
export function quantileOf(q, buckets) {
  const count = buckets.at(-1)?.[1];
  if (!count) return null;
  const rank = q * count;
  const i = buckets.findIndex(([, cumulative]) => cumulative >= rank);
  if (i === buckets.length - 1) return buckets.at(-2)[0];
  const [upper, cumulative] = buckets[i];
  const [lower, below] = i ? buckets[i - 1] : [0, 0];
  return lower + (upper - lower) * (rank - below) / (cumulative - below);
}

function sum(samples) {
  return samples.reduce((sum, { value }) => sum + value, 0);
}

function toNumber(text) {
  return text === '+Inf' ? Infinity : text === '-Inf' ? -Infinity : Number(text);
}
