// A curve plot on a canvas: bands for the range or standard errors, log scale, values by pointer and keyboard.

import { CanvasView, colour, el, ink, number, save, sharpen, swatch, trace, whole, withUnit } from './dom.js';

const LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 20;
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]];
export const settings = { smoothing: 0, range: 'all' };

// Exponential moving average, corrected for the bias of its start.
function smooth(values, weight) {
  let sum = 0, norm = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return null;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) ?? rough;
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9 && found.length < 30; v += step) {
    found.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  }
  return found;
}

// What the settings show of a curve: {x, y}, {low, high} of a band, and `ends`, the steps that a merged point spans.
function shownPart(curve, sem) {
  const { x, y, first, low, high, tail } = curve;
  if (settings.range === 'tail') {
    return tail ? { x: tail.map((point) => point[0]), y: tail.map((point) => point[1]) }
      : { x: x.slice(-300), y: y.slice(-300), ...errorBand(x.slice(-300), y.slice(-300), sem) };
  }
  if (tail) return { x: x.map((step, i) => (step + first[i]) / 2), y, low, high, ends: [first, x] };
  return { x, y, ...errorBand(x, y, sem) };
}

// {low, high}: one standard error below and above each value; {} without the errors of all steps.
function errorBand(x, y, sem) {
  if (!sem || sem.tail) return {};
  const errors = new Map(sem.x.map((step, i) => [step, sem.y[i]]));
  const moved = (sign) => x.map((step, i) => (y[i] === null ? null : y[i] + sign * (errors.get(step) ?? 0)));
  return { low: moved(-1), high: moved(1) };
}

export class Chart extends CanvasView {
  // spec: {key, title, unit, help, axis, curves: () => [{label, tint, dash, curve, sem}]}
  constructor(spec) {
    const unit = spec.unit && spec.unit !== '1' ? ` (${spec.unit})` : '';
    super(`${spec.title}${unit}, values by step`);
    Object.assign(this, { spec, log: false, visible: false, steps: [], lines: [] });
    this.button = el('button', { type: 'button', 'aria-pressed': 'false',
      'aria-label': `Logarithmic scale of ${spec.title}`,
      onclick: () => this.toggle() }, 'log');
    this.file = el('button', { type: 'button', 'aria-label': `Download ${spec.title} as CSV`,
      onclick: () => save(`${spec.title}.csv`, this.table()) }, 'CSV');
    this.legend = el('div', { class: 'legend' });
    this.steady = el('p', { class: 'steady', hidden: true });
    this.root = el('figure', { class: 'chart' },
      el('div', { class: 'top' }, el('h3', {}, spec.title + unit), this.file, this.button), this.steady,
      this.canvas, this.legend, this.readout,
      spec.help ? el('details', {}, el('summary', {}, 'How to read it'), el('p', {}, spec.help)) : null);
    this.root.dataset.metric = spec.key;
    new IntersectionObserver((entries) => { this.visible = entries.at(-1).isIntersecting; this.draw(); },
      { rootMargin: '300px' }).observe(this.root);
  }

  toggle() {
    this.log = !this.log;
    this.button.setAttribute('aria-pressed', String(this.log));
    this.draw();
  }

  prepare() {
    this.lines = this.spec.curves().map((given) => {
      const line = { ...given, ...shownPart(given.curve, given.sem), hue: colour(given.tint) };
      line.shown = settings.smoothing > 0 && line.x.length > 3 ? smooth(line.y, settings.smoothing) : line.y;
      return line;
    }).filter((line) => line.x.length);
    const kept = this.steps[this.cursor];
    this.steps = [...new Set(this.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    if (this.cursor !== null) {
      this.cursor = this.steps.length ? Math.max(0, this.steps.findIndex((step) => step >= kept)) : null;
    }
    this.showLegend();
  }

  // What a plot of flat lines shows, in words; '' if something changes, or there are too few points to say.
  unchanging() {
    const flat = (line) => {
      const band = line.sem ? [] : [line.low ?? [], line.high ?? []];
      const values = [line.y, ...band].flat().filter(Number.isFinite);
      const low = values.reduce((a, b) => Math.min(a, b), Infinity);
      const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
      return !values.length || high - low <= 1e-6 * Math.max(Math.abs(low), Math.abs(high));
    };
    if (this.steps.length < 2 || !this.lines.every(flat)) return '';
    const between = `${this.spec.axis || 'step'} ${whole(this.steps[0])} to ${whole(this.steps.at(-1))}`;
    const words = this.lines.map((line) => {
      const value = line.y.find(Number.isFinite);
      const text = value === undefined ? 'no value' : withUnit(value, this.spec.unit);
      return this.lines.length > 1 ? `${line.label} ${text}` : text;
    });
    return this.lines.length > 1 ? `Nothing changes from ${between}: ${words.join('; ')}.`
      : `${words[0] === 'no value' ? 'No value' : `Always ${words[0]}`}, from ${between}.`;
  }

  // Shows a sentence in the place of the plot, or the plot.
  say(sentence) {
    if (this.steady.textContent !== sentence) this.steady.textContent = sentence;
    this.steady.hidden = !sentence;
    for (const part of [this.canvas, this.readout, this.button, this.legend]) part.hidden = Boolean(sentence);
  }

  // The rows of the CSV file: every value that the page holds, whatever range and smoothing show.
  table() {
    const rows = this.spec.curves().flatMap(({ label, curve, sem }) => {
      const errors = new Map(sem && !sem.tail ? sem.x.map((step, i) => [step, sem.y[i]]) : []);
      return curve.x.map((step, i) => [curve.first?.[i] ?? step, step, label, curve.y[i], errors.get(step),
        curve.tail ? curve.low[i] : null, curve.tail ? curve.high[i] : null]);
    });
    const axis = this.spec.axis || 'step';
    const head = [`first ${axis}`, `last ${axis}`, 'curve', this.spec.title, 'standard error', 'least', 'greatest'];
    return [head, ...rows];
  }

  showLegend() {
    const many = this.lines.length > 1;
    const text = many ? JSON.stringify(this.lines.map((line) => [line.label, line.hue, line.dash])) : '';
    if (text === this.legendText) return;
    this.legendText = text;
    this.legend.replaceChildren(...(many ? this.lines.map((line) =>
      el('span', { class: 'key' }, swatch(line.hue, line.dash ? '0.55' : ''), line.label)) : []));
  }

  scale(width, height) {
    const usable = (v) => Number.isFinite(v) && (!this.log || v > 0);
    const values = this.lines.flatMap((line) => [line.y, line.low ?? [], line.high ?? []]).flat().filter(usable);
    if (!values.length) return null;
    let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
    if (this.log) { low = Math.log10(low); high = Math.log10(high); }
    const pad = high > low ? (high - low) * 0.06 : Math.abs(high) * 0.1 || 0.5;
    low -= pad; high += pad;
    const from = this.steps[0], to = this.steps.at(-1);
    const across = width - LEFT - RIGHT, down = height - TOP - BOTTOM;
    return { low, high, from, to,
      x: (step) => LEFT + (to > from ? (step - from) / (to - from) : 0.5) * across,
      y: (v) => TOP + (1 - ((this.log ? Math.log10(v) : v) - low) / (high - low)) * down, usable };
  }

  paint() {
    if (!this.visible || !this.root.isConnected) return;
    this.prepare();
    this.say(this.unchanging());
    if (!this.steady.hidden) return this.show();
    const { context, width, height } = sharpen(this.canvas);
    context.font = '11px system-ui, sans-serif';
    const scale = this.lines.length && width > 60 ? this.scale(width, height) : null;
    this.placed = scale;
    if (!scale) {
      context.fillStyle = ink('faint');
      context.fillText(this.lines.length ? 'no value that this scale can show' : 'no data yet', LEFT, height / 2);
      return this.show();
    }
    this.axes(context, scale, width, height);
    for (const line of this.lines) this.line(context, scale, line);
    if (this.cursor !== null) this.mark(context, scale, height);
    this.show();
  }

  axes(context, scale, width, height) {
    context.lineWidth = 1;
    context.strokeStyle = ink('grid');
    context.fillStyle = ink('faint');
    context.textBaseline = 'middle';
    context.textAlign = 'right';
    for (const tick of ticks(scale.low, scale.high, 4)) {
      const v = this.log ? 10 ** tick : tick, at = Math.round(scale.y(v)) + 0.5;
      trace(context, [[LEFT, at], [width - RIGHT, at]]).stroke();
      context.fillText(short(v, this.spec.unit), LEFT - 4, at);
    }
    context.textBaseline = 'alphabetic';
    for (const tick of scale.to > scale.from ? ticks(scale.from, scale.to, width / 90) : [scale.from]) {
      context.textAlign = tick === scale.to ? 'right' : 'center';
      context.fillText(short(tick), Math.min(scale.x(tick), width - RIGHT), height - 5);
    }
  }

  line(context, scale, line) {
    const at = (column) => (i) => [scale.x(line.x[i]), scale.y(column[i])];
    context.strokeStyle = context.fillStyle = line.hue;
    context.lineJoin = 'round';
    context.globalAlpha = 0.18;
    for (const stretch of stretches(line.low ?? [], scale)) {
      const lower = stretch.map(at(line.low)), upper = stretch.map(at(line.high));
      trace(context, [...upper, ...[...lower].reverse()]).fill();
      if (line.sem) upper.forEach(([x, y], i) => context.fillRect(x - 1, y, 2, lower[i][1] - y));
    }
    const draw = (values, alpha, weight) => {
      context.globalAlpha = alpha;
      context.lineWidth = weight;
      context.setLineDash(DASHES[(line.dash || 0) % 4]);
      for (const stretch of stretches(values, scale)) {
        const points = stretch.map(at(values));
        trace(context, points).stroke();
        if (line.x.length <= 30 || points.length === 1) for (const point of points) dot(context, point, 2.2);
      }
      context.setLineDash([]);
    };
    if (line.shown !== line.y) draw(line.y, 0.25, 1);
    draw(line.shown, 1, 1.6);
    context.globalAlpha = 1;
  }

  mark(context, scale, height) {
    const step = this.steps[this.cursor], at = Math.round(scale.x(step)) + 0.5;
    context.strokeStyle = ink('faint');
    trace(context, [[at, TOP], [at, height - BOTTOM]]).stroke();
    for (const line of this.lines) {
      const i = nearest(line.x, step), value = line.shown[i];
      context.fillStyle = line.hue;
      if (scale.usable(value)) dot(context, [scale.x(line.x[i]), scale.y(value)], 3.5);
    }
  }

  show() {
    const last = this.steps.length - 1, index = this.cursor ?? last;
    this.announce(last < 0 ? 'no data yet' : this.describe(index),
      [0, last, index].map((i) => this.steps[i] ?? 0));
    this.canvas.dataset.last = String(Math.max(...this.lines.map((line) => (line.ends?.[1] ?? line.x).at(-1))));
  }

  describe(index) {
    const step = this.steps[index], many = this.lines.length > 1;
    const parts = this.lines.map((line) => {
      const i = nearest(line.x, step);
      const value = Number.isFinite(line.y[i]) ? withUnit(line.y[i], this.spec.unit) : 'no value';
      const error = line.sem && line.high?.[i] > line.y[i] ? ` ± ${number(line.high[i] - line.y[i], 2)}` : '';
      const spread = !line.sem && line.high ? ` (${number(line.low[i], 3)} to ${number(line.high[i], 3)})` : '';
      const smoothed = line.shown !== line.y ? `, smoothed ${number(line.shown[i])}` : '';
      return `${many ? `${line.label}: ` : ''}${value}${error}${spread}${smoothed}`;
    });
    const line = this.lines.find((found) => found.ends), i = line ? nearest(line.x, step) : 0;
    const axis = this.spec.axis || 'step';
    const where = line && line.ends[0][i] !== line.ends[1][i]
      ? `${axis}s ${whole(line.ends[0][i])} to ${whole(line.ends[1][i])}, mean` : `${axis} ${whole(step)}`;
    return `${where}: ${parts.join('; ')}`;
  }

  point(offset) {
    if (!this.placed || !this.steps.length) return;
    const { from, to } = this.placed, across = this.canvas.clientWidth - LEFT - RIGHT;
    this.at(nearest(this.steps, from + ((offset - LEFT) / across) * (to - from)));
  }

  reach() {
    const last = this.steps.length - 1;
    return { last, step: 1, page: Math.max(1, Math.round(last / 10)) };
  }
}

// The indices of usable values, in stretches without a gap.
function stretches(values, scale) {
  const found = [[]];
  values.forEach((value, i) => (scale.usable(value) ? found.at(-1).push(i) : found.push([])));
  return found.filter((stretch) => stretch.length);
}

function dot(context, [x, y], radius) {
  context.beginPath();
  context.arc(x, y, radius, 0, 7);
  context.fill();
}

const nearest = (steps, wanted) => steps.reduce((best, step, i) =>
  (Math.abs(step - wanted) < Math.abs(steps[best] - wanted) ? i : best), 0);

function short(value, unit) {
  if (unit === 'bytes') return withUnit(value, unit).replace(/ |iB|B$/g, '');
  const size = Math.abs(value);
  for (const [power, sign] of [[1e9, 'G'], [1e6, 'M'], [1e3, 'k']]) {
    if (size >= power * (power === 1e3 ? 10 : 1)) return `${number(value / power, 3)}${sign}`;
  }
  return number(value, 3);
}
