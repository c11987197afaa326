// The data of each run: curves and events as the server sent them, and the changes since.

import { get, runPath } from './dom.js';

const MOST_POINTS = 3000; // with more, the server's merged curves are fetched again

export const EVALUATION = /^evaluation@/;

export class Run {
  constructor(id, values) {
    this.id = id;
    this.take(values);
  }

  take(values) {
    Object.assign(this, values);
    this.number = Number(values.cursor.split('-')[1]);
  }

  curve(stage, name) {
    return this.curves[stage]?.[name];
  }

  newest(stage, name) {
    const curve = this.curve(stage, name);
    if (!curve || !curve.x.length) return null;
    if (curve.stride > 1 && curve.tail.length) return curve.tail[curve.tail.length - 1][1];
    return curve.y[curve.y.length - 1];
  }

  // The numbers of denoising steps that have evaluations.
  evaluated() {
    return Object.keys(this.curves).filter((stage) => EVALUATION.test(stage)).map((s) => Number(s.split('@')[1]));
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
      const last = curve.x.length - 1;
      if (last >= 0 && curve.x[last] >= step) {
        const at = curve.stride === 1 ? curve.x.lastIndexOf(step) : -1;
        if (at >= 0) curve.y[at] = value;
        else fits = false;
        continue;
      }
      curve.x.push(step);
      curve.y.push(value);
      if (curve.stride > 1) {
        curve.first.push(step); curve.low.push(value); curve.high.push(value);
        curve.tail.push([step, value]);
        if (curve.tail.length > 300) curve.tail.shift();
      }
      if (curve.x.length > MOST_POINTS) fits = false;
    }
    return fits;
  }

  cut(stage, step, record) {
    for (const [name, curves] of Object.entries(this.curves)) {
      if (name !== stage && !(stage === 'rl' && EVALUATION.test(name))) continue;
      for (const curve of Object.values(curves)) {
        while (curve.x.length && curve.x[curve.x.length - 1] > step) {
          for (const column of ['x', 'y', 'first', 'low', 'high']) curve[column]?.pop();
        }
        while (curve.tail?.length && curve.tail[curve.tail.length - 1][0] > step) curve.tail.pop();
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
    this.changed = changed;
    this.connection = connection;
    this.runs = new Map();
    this.source = null;
    this.loading = new Map();
  }

  async select(ids) {
    for (const id of this.runs.keys()) if (!ids.includes(id)) this.runs.delete(id);
    await Promise.all(ids.filter((id) => !this.runs.has(id)).map((id) => this.load(id)));
    this.listen();
  }

  load(id) {
    if (this.loading.has(id)) return this.loading.get(id);
    const work = (async () => {
      try {
        const values = await get(runPath(id));
        if (this.runs.has(id)) this.runs.get(id).take(values);
        else this.runs.set(id, new Run(id, values));
        this.changed(this.runs.get(id), new Set(['all']));
      } finally {
        this.loading.delete(id);
      }
    })();
    this.loading.set(id, work);
    return work;
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
    this.source.addEventListener('lost', () => { for (const id of this.runs.keys()) this.load(id).catch(() => {}); });
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
    if (news.reset) return void this.load(run.id).catch(() => {});
    if (news.progress) run.progress = news.progress;
    if (news.read !== undefined) run.read = news.read;
    const fits = run.change(news.changes);
    const kinds = new Set(news.changes.map((change) => change[0]));
    if (!fits) this.load(run.id).catch(() => {});
    this.changed(run, kinds);
  }
}
