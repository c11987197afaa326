// The timeline of the roles: a lane for each actor, rank and scorer, over the last iterations.

import { CanvasView, colour, el, field, ink, number, options, Part, sharpen, swatch, trace, withUnit } from './dom.js';

const PHASES = ['sample', 'score', 'train', 'sync', 'evaluate', 'checkpoint', 'wait'];
const ROLES = ['rollout', 'reward', 'learner', 'weights', 'evaluation'];
const ROW = 22, FOOT = 20;
const tint = (phase) => (phase === 'wait' ? ink('grid') : colour(Math.max(0, PHASES.indexOf(phase))));

export class Timeline extends CanvasView {
  constructor() {
    super('Timeline of the roles; arrow keys move through time');
    this.lanes = [];
    this.label = 100;
    this.many = el('select', { onchange: () => this.lay() });
    options(this.many, [3, 5, 10, 20, 60].map((n) => [n, n]), 5);
    this.table = el('div', { class: 'scroll', tabindex: '0', 'aria-label': 'Busy and idle shares' });
    const legend = el('div', { class: 'legend' }, ...PHASES.map((phase, i) =>
      el('span', { class: 'key' }, swatch(`var(--${phase === 'wait' ? 'grid' : `c${i}`})`), phase)),
    el('span', { class: 'key' }, 'empty: idle'));
    this.part = new Part('timeline-body', 'No timeline yet: telemetry.timeline keeps one.',
      field('Last iterations', this.many), this.canvas, legend, this.readout, this.table);
  }

  async update(run) {
    this.part.begins(run);
    const found = await this.part.fetch('/timeline');
    if (!found) return;
    this.iterations = found.filter((iteration) => iteration.spans.length);
    if (this.part.holds(this.iterations)) this.lay();
  }

  // One window over the last iterations, with its spans by lane.
  lay() {
    this.shown = this.iterations.slice(-Number(this.many.value));
    this.from = Infinity; this.to = -Infinity;
    const lanes = new Map();
    for (const iteration of this.shown) {
      for (const [role, who, phase, start, seconds] of iteration.spans) {
        const name = `${role} ${who}`;
        if (!lanes.has(name)) lanes.set(name, { name, role, who, spans: [] });
        lanes.get(name).spans.push({ phase, start, end: start + seconds, step: iteration.step });
        this.from = Math.min(this.from, start); this.to = Math.max(this.to, start + seconds);
      }
    }
    const rank = (lane) => [...ROLES, lane.role].indexOf(lane.role);
    const layer = (span) => (span.phase === 'wait' ? 0 : 1); // waits are drawn first
    this.lanes = [...lanes.values()].sort((a, b) => rank(a) - rank(b)
      || String(a.who).localeCompare(String(b.who), undefined, { numeric: true })).slice(0, 64);
    for (const lane of this.lanes) {
      lane.spans.sort((a, b) => layer(a) - layer(b) || a.start - b.start);
      lane.idle = this.to > this.from ? 1 - covered(lane.spans) / (this.to - this.from) : 0;
    }
    this.canvas.style.height = `${this.lanes.length * ROW + FOOT}px`;
    this.canvas.dataset.lanes = String(this.lanes.length);
    this.list();
    this.draw();
  }

  list() {
    const spent = (lane, phase) => lane.spans.filter((span) => span.phase === phase).reduce((sum, span) =>
      sum + span.end - span.start, 0);
    const phases = PHASES.filter((phase) => phase !== 'wait' && this.lanes.some((lane) => spent(lane, phase)));
    const head = ['lane', 'idle', ...phases.map((phase) => `${phase}, s`)];
    const cells = (lane) => [withUnit(lane.idle, 'share'), ...phases.map((phase) => number(spent(lane, phase), 3))];
    this.table.replaceChildren(el('table', {},
      el('thead', {}, el('tr', {}, ...head.map((text) => el('th', { scope: 'col' }, text)))),
      el('tbody', {}, ...this.lanes.map((lane) => el('tr', {}, el('th', { scope: 'row' }, lane.name),
        ...cells(lane).map((text) => el('td', { class: 'number' }, text)))))));
  }

  paint() {
    if (!this.lanes.length || !this.canvas.clientWidth) return;
    const { context, width } = sharpen(this.canvas), narrow = width < 500;
    const LABEL = (this.label = narrow ? Math.round(width * 0.32) : 200), across = width - LABEL;
    const x = (seconds) => LABEL + (seconds - this.from) / Math.max(1e-6, this.to - this.from) * across;
    context.font = '11px system-ui, sans-serif';
    context.textBaseline = 'middle';
    this.lanes.forEach((lane, row) => {
      const top = row * ROW;
      context.fillStyle = ink('card');
      context.fillRect(LABEL, top + 2, across, ROW - 4);
      for (const span of lane.spans) {
        context.fillStyle = tint(span.phase);
        context.fillRect(x(span.start), top + 3, Math.max(1, x(span.end) - x(span.start)), ROW - 6);
      }
      context.fillStyle = ink('ink');
      context.textAlign = 'left';
      context.fillText(lane.name, 0, top + ROW / 2, LABEL - (narrow ? 4 : 64));
      context.fillStyle = ink('faint');
      context.textAlign = 'right';
      if (!narrow) context.fillText(`${Math.round(lane.idle * 100)}% idle`, LABEL - 4, top + ROW / 2);
    });
    const foot = this.lanes.length * ROW + FOOT / 2;
    context.fillStyle = ink('faint');
    context.textAlign = 'left'; context.fillText('0 s', LABEL, foot);
    context.textAlign = 'right'; context.fillText(`${number(this.to - this.from, 3)} s`, width, foot);
    if (this.cursor !== null) {
      const at = Math.round(LABEL + this.cursor * across) + 0.5;
      context.strokeStyle = ink('ink');
      trace(context, [[at, 0], [at, this.lanes.length * ROW]]).stroke();
    }
    this.show();
  }

  point(offset) {
    this.at((offset - this.label) / Math.max(1, this.canvas.clientWidth - this.label));
  }

  reach() {
    return { last: 1, step: 0.01, page: 0.1 };
  }

  show() {
    const first = this.shown[0].step, last = this.shown.at(-1).step;
    const length = this.to - this.from, now = this.from + this.cursor * length;
    const doing = (lane) => {
      const span = lane.spans.find((s) => s.start <= now && now <= s.end && s.phase !== 'wait');
      return `${lane.name} ${span ? `${span.phase} (iteration ${span.step})` : 'idle'}`;
    };
    this.announce(this.cursor === null ? `Iterations ${first} to ${last}, ${number(length, 3)} s.`
      : `${number(now - this.from, 3)} s: ${this.lanes.map(doing).join(', ')}`,
    [0, 100, Math.round((this.cursor ?? 1) * 100)]);
  }
}

// Seconds that at least one span covers. Waiting counts as idle.
function covered(spans) {
  let total = 0, reached = -Infinity;
  for (const { phase, start, end } of spans) {
    if (phase === 'wait') continue;
    total += Math.max(0, end - Math.max(start, reached));
    reached = Math.max(reached, end);
  }
  return total;
}
