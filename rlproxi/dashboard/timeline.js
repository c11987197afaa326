// Who did what when: a lane for each actor, rank and scorer, over the last iterations.

import { byId, colour, el, get, ink, number, runPath, sharpen, throttle } from './dom.js';

const PHASES = ['sample', 'score', 'train', 'sync', 'evaluate', 'checkpoint', 'wait'];
const ROLES = ['rollout', 'reward', 'learner', 'weights', 'evaluation'];
const ROW = 22, FOOT = 20;
const tint = (phase) => (phase === 'wait' ? ink('grid') : colour(Math.max(0, PHASES.indexOf(phase))));

export class Timeline {
  constructor() {
    this.lanes = [];
    this.cursor = null;
    this.label = 100;
    this.many = el('select', { onchange: () => this.lay() },
      ...[3, 5, 10, 20, 60].map((n) => el('option', { value: String(n), selected: n === 5 }, String(n))));
    this.canvas = el('canvas', { tabindex: '0', role: 'slider',
      'aria-label': 'Timeline of the roles; arrow keys move through time',
      'aria-valuemin': '0', 'aria-valuemax': '100', 'aria-valuenow': '100' });
    this.readout = el('p', { class: 'faint readout' });
    this.table = el('div', { class: 'scroll', tabindex: '0', 'aria-label': 'Busy and idle shares' });
    this.none = el('p', { class: 'faint' }, 'No timeline yet: telemetry.timeline keeps one.');
    const legend = el('div', { class: 'legend' }, ...[...PHASES].map((phase) => {
      const swatch = el('span', { class: 'swatch' });
      swatch.style.background = `var(--${phase === 'wait' ? 'grid' : `c${PHASES.indexOf(phase)}`})`;
      return el('span', { class: 'key' }, swatch, phase);
    }), el('span', { class: 'key' }, 'empty: idle'));
    this.all = el('div', {}, el('label', { class: 'field' }, 'Last iterations', this.many), this.canvas, legend,
      this.readout, this.table);
    byId('timeline-body').append(this.none, this.all);
    this.draw = throttle(60, () => this.paint());
    new ResizeObserver(this.draw).observe(this.canvas);
    const point = (event) => this.at((event.offsetX - this.label) / Math.max(1, this.canvas.clientWidth - this.label));
    this.canvas.addEventListener('pointermove', point);
    this.canvas.addEventListener('pointerdown', point);
    this.canvas.addEventListener('pointerleave', () => { if (document.activeElement !== this.canvas) this.at(null); });
    this.canvas.addEventListener('focus', () => this.at(this.cursor ?? 1));
    this.canvas.addEventListener('blur', () => this.at(null));
    this.canvas.addEventListener('keydown', (event) => {
      const now = this.cursor ?? 1;
      const to = { ArrowLeft: now - 0.01, ArrowRight: now + 0.01, ArrowDown: now - 0.01, ArrowUp: now + 0.01,
        PageDown: now - 0.1, PageUp: now + 0.1, Home: 0, End: 1, Escape: null }[event.key];
      if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      this.at(to);
    });
  }

  async update(run) {
    if (this.run !== run.id) { this.run = run.id; this.iterations = []; }
    let found;
    try { found = (await get(runPath(run.id, '/timeline'))).iterations; } catch { return; }
    if (this.run !== run.id) return;
    this.iterations = found.filter((iteration) => iteration.spans.length);
    this.none.hidden = this.iterations.length > 0;
    this.all.hidden = !this.iterations.length;
    this.lay();
  }

  // One window over the last iterations, with its spans by lane.
  lay() {
    const shown = this.iterations.slice(-Number(this.many.value)), lanes = new Map();
    this.shown = shown;
    this.from = Infinity; this.to = -Infinity;
    for (const iteration of shown) {
      for (const [role, who, phase, start, seconds] of iteration.spans) {
        const name = `${role} ${who}`;
        if (!lanes.has(name)) lanes.set(name, { name, role, who, spans: [] });
        lanes.get(name).spans.push({ phase, start, end: start + seconds, step: iteration.step });
        this.from = Math.min(this.from, start); this.to = Math.max(this.to, start + seconds);
      }
    }
    const rank = (lane) => (ROLES.indexOf(lane.role) + ROLES.length + 1) % (ROLES.length + 1);
    this.lanes = [...lanes.values()].sort((a, b) => rank(a) - rank(b)
      || String(a.who).localeCompare(String(b.who), undefined, { numeric: true })).slice(0, 64);
    for (const lane of this.lanes) {
      lane.spans.sort((a, b) => a.start - b.start);
      lane.idle = this.to > this.from ? 1 - covered(lane.spans) / (this.to - this.from) : 0;
    }
    this.canvas.style.height = `${this.lanes.length * ROW + FOOT}px`;
    this.canvas.dataset.lanes = String(this.lanes.length);
    this.canvas.dataset.step = String(shown.at(-1)?.step ?? '');
    this.list();
    this.draw();
  }

  list() {
    const phases = PHASES.filter((phase) => phase !== 'wait'
      && this.lanes.some((lane) => lane.spans.some((span) => span.phase === phase)));
    const spent = (lane, phase) => lane.spans.filter((span) => span.phase === phase).reduce((sum, span) =>
      sum + span.end - span.start, 0);
    this.table.replaceChildren(el('table', {}, el('thead', {},
      el('tr', {}, ...['lane', 'idle', ...phases.map((phase) => `${phase}, s`)].map((text) =>
      el('th', { scope: 'col' }, text)))),
      el('tbody', {}, ...this.lanes.map((lane) => el('tr', {}, el('th', { scope: 'row' }, lane.name),
        el('td', { class: 'number' }, `${number(lane.idle * 100, 3)} %`),
        ...phases.map((phase) => el('td', { class: 'number' }, number(spent(lane, phase), 3))))))));
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
      for (const span of [...lane.spans].sort((a, b) => (a.phase === 'wait' ? 0 : 1) - (b.phase === 'wait' ? 0 : 1))) {
        context.fillStyle = tint(span.phase);
        context.fillRect(x(span.start), top + 3, Math.max(1, x(span.end) - x(span.start)), ROW - 6);
      }
      context.fillStyle = ink('ink');
      context.textAlign = 'left';
      context.fillText(fitting(context, lane.name, LABEL - (narrow ? 4 : 64)), 0, top + ROW / 2);
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
      context.beginPath(); context.moveTo(at, 0); context.lineTo(at, this.lanes.length * ROW); context.stroke();
    }
    this.tell();
  }

  at(share) {
    this.cursor = share === null ? null : Math.max(0, Math.min(1, share));
    this.draw();
  }

  tell() {
    const first = this.shown[0].step, last = this.shown.at(-1).step;
    let text = `Iterations ${first} to ${last}, ${number(this.to - this.from, 3)} s.`;
    if (this.cursor !== null) {
      const now = this.from + this.cursor * (this.to - this.from);
      const doing = (lane) => {
        const span = lane.spans.find((s) => s.start <= now && now <= s.end && s.phase !== 'wait');
        return span ? `${span.phase} (iteration ${span.step})` : 'idle';
      };
      text = `${number(now - this.from, 3)} s: ${this.lanes.map((lane) => `${lane.name} ${doing(lane)}`).join(', ')}`;
    }
    this.readout.textContent = text;
    this.canvas.setAttribute('aria-valuenow', String(Math.round((this.cursor ?? 1) * 100)));
    this.canvas.setAttribute('aria-valuetext', text);
  }
}

function fitting(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let length = text.length;
  while (length > 1 && context.measureText(`${text.slice(0, length)}…`).width > width) length -= 1;
  return `${text.slice(0, length)}…`;
}

// Seconds that at least one span covers; waiting is idling.
export function covered(spans) {
  let total = 0, reached = -Infinity;
  for (const { phase, start, end } of spans) {
    if (phase === 'wait') continue;
    total += Math.max(0, end - Math.max(start, reached));
    reached = Math.max(reached, end);
  }
  return total;
}
