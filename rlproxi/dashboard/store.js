// The data of each run: curves and events as the server sent them, and the changes since.

import { get, runPath } from './dom.js';

const MOST_POINTS = 3000; // with more, the server's merged curves are fetched again

export const EVALUATION = /^evaluation@/;

export class Run {
  constructor(id) { this.id = id; }

  take(values) {
    Object.assign(this, values);
    this.number = Number(values.cursor.split('-')[1]);
  }

  curve(stage, name) {
    return this.curves[stage]?.[name];
  }

  newest(stage, name) {
    const curve = this.curve(stage, name);
    return curve?.tail?.length ? curve.tail.at(-1)[1] : curve?.y.at(-1) ?? null;
  }

  // The numbers of denoising steps that have evaluations.
  evaluated() {
    return Object.keys(this.curves).filter((stage) => EVALUATION.test(stage)).map((s) => Number(s.split('@')[1]));
  }

  // The main number of denoising steps: the config's, else the one with the most evaluations; null without any.
  get headline() {
    const counts = this.evaluated();
    if (counts.includes(this.headline_steps)) return this.headline_steps;
    const size = (n) => Math.max(0, ...Object.values(this.curves[`evaluation@${n}`]).map((curve) => curve.x.length));
    return counts.sort((a, b) => size(b) - size(a))[0] ?? null;
  }

  // The names of the held-out judges in the evaluations at a number of denoising steps.
  judges(steps) {
    return Object.keys(this.curves[`evaluation@${steps}`] || {}).filter((name) => /^heldout\/[^/]+$/.test(name));
  }

  // Applies changes in order; returns false if the curves must be fetched again.
  change(changes) {
    let fits = true;
    for (const [kind, ...rest] of changes) {
      if (kind === 'points') fits = this.points(...rest) && fits;
      else if (kind === 'cut') this.cut(...rest);
      else if (kind === 'gallery') this.galleries.push(rest[1]);
      else if (kind === 'event') this.event(rest[0]);
    }
    return fits;
  }

  points(stage, step, values) {
    let fits = true;
    const curves = (this.curves[stage] ??= {});
    for (const [name, value] of Object.entries(values)) {
      const curve = (curves[name] ??= { stride: 1, x: [], y: [] });
      if (curve.x.at(-1) >= step) {
        const at = curve.tail ? -1 : curve.x.lastIndexOf(step);
        if (at >= 0) curve.y[at] = value;
        else fits = false;
        continue;
      }
      for (const column of ['x', 'first']) curve[column]?.push(step);
      for (const column of ['y', 'low', 'high']) curve[column]?.push(value);
      curve.tail?.push([step, value]);
      if (curve.tail?.length > 300) curve.tail.shift();
      fits &&= curve.x.length <= MOST_POINTS;
    }
    return fits;
  }

  cut(stage, step, record) {
    for (const [name, curves] of Object.entries(this.curves)) {
      if (name !== stage && !(stage === 'rl' && EVALUATION.test(name))) continue;
      for (const curve of Object.values(curves)) {
        while (curve.x.at(-1) > step) {
          for (const column of ['x', 'y', 'first', 'low', 'high']) curve[column]?.pop();
        }
        while (curve.tail?.at(-1)?.[0] > step) curve.tail.pop();
      }
    }
    if (stage === 'rl') this.galleries = this.galleries.filter((known) => known <= step);
    this.event(record);
  }

  event(record) {
    const list = (this.events[record.event] ??= []);
    list.push(record);
    if (list.length > 200) list.shift();
    this.counts[record.event] = (this.counts[record.event] || 0) + 1;
  }
}

// Keeps the selected runs up to date, and calls `changed(run, kinds)` with kinds such as 'points' or 'gallery'.
export class Store {
  constructor(changed, connection) {
    Object.assign(this, { changed, connection, runs: new Map(), loading: new Map(), source: null });
  }

  async select(ids) {
    for (const id of this.runs.keys()) if (!ids.includes(id)) this.runs.delete(id);
    await Promise.all(ids.filter((id) => !this.runs.has(id)).map((id) => this.load(id)));
    this.listen();
  }

  load(id) {
    if (!this.loading.has(id)) this.loading.set(id, this.fetch(id).finally(() => this.loading.delete(id)));
    return this.loading.get(id);
  }

  async fetch(id) {
    const values = await get(runPath(id)), run = this.runs.get(id) ?? new Run(id);
    run.take(values);
    this.runs.set(id, run);
    this.changed(run, new Set(['all']));
  }

  // Fetches runs again; one that fails keeps its values.
  reload(...ids) {
    for (const id of ids) this.load(id).catch(() => {});
  }

  listen() {
    this.source?.close();
    const runs = [...this.runs.values()];
    if (!runs.length) return;
    const oldest = runs.reduce((a, b) => (a.number <= b.number ? a : b));
    const query = runs.map((run) => `run=${encodeURIComponent(run.id)}`).join('&');
    this.source = new EventSource(`api/events?${query}&after=${oldest.cursor}`);
    this.source.onopen = () => this.connection('live');
    this.source.onerror = () => this.connection(this.source.readyState === EventSource.CLOSED ? 'closed' : 'lost');
    this.source.onmessage = (message) => this.take(JSON.parse(message.data), message.lastEventId);
    this.source.addEventListener('lost', () => this.reload(...this.runs.keys()));
  }

  take(news, at) {
    const run = this.runs.get(news.run);
    const number = Number(at.split('-')[1]);
    if (!run || number <= run.number) return;
    if (this.loading.has(run.id)) { // the answer under way may be older than this change: fetch once more
      this.loading.get(run.id).then(() => { if (run.number < number) return this.load(run.id); }).catch(() => {});
      return;
    }
    run.number = number;
    if (news.reset) { this.reload(run.id); return; }
    if (news.progress) run.progress = news.progress;
    if (news.read !== undefined) run.read = news.read;
    if (!run.change(news.changes)) this.reload(run.id);
    this.changed(run, new Set(news.changes.map((change) => change[0])));
  }
}
