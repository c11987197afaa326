// A curve plot on a canvas: bands for the range or standard errors, log scale, values by pointer and keyboard.

import { CanvasView, colour, el, ink, number, sharpen, swatch, whole, withUnit } from './dom.js';

const LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 20;
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]];
export const settings = { smoothing: 0, range: 'all' };

// Exponential moving average, corrected for the bias of its start.
export function smooth(values, weight) {
  let sum = 0, norm = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return null;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

export function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) ?? rough;
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9 && found.length < 30; v += step) {
    found.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  }
  return found;
}

export class Chart extends CanvasView {
  // spec: {title, unit, help, reading, axis, curves: () => [{label, tint, dash, curve, sem}]}
  constructor(spec) {
    const unit = spec.unit && spec.unit !== '1' ? ` (${spec.unit})` : '';
    super(`${spec.title}${unit}, values by step`);
    Object.assign(this, { spec, log: false, visible: false, steps: [], lines: [] });
    this.button = el('button', { type: 'button', 'aria-pressed': 'false',
      'aria-label': `Logarithmic scale of ${spec.title}`,
      onclick: () => this.toggle() }, 'log');
    this.legend = el('div', { class: 'legend' });
    this.root = el('figure', { class: 'chart' },
      el('div', { class: 'top' }, el('h3', {}, spec.title + unit), this.button), this.canvas, this.legend, this.readout,
      spec.help ? el('details', {}, el('summary', {}, 'How to read it'),
        el('p', {}, `${spec.help} ${spec.reading || ''}`)) : null);
    this.root.dataset.metric = spec.key || spec.title;
    new IntersectionObserver((entries) => { this.visible = entries[entries.length - 1].isIntersecting; this.draw(); },
      { rootMargin: '300px' }).observe(this.canvas);
  }

  toggle() {
    this.log = !this.log;
    this.button.setAttribute('aria-pressed', String(this.log));
    this.draw();
  }

  prepare() {
    const newest = settings.range === 'tail';
    this.lines = this.spec.curves().map((given) => {
      const { curve, sem } = given;
      let { x, y } = curve, low = curve.low, high = curve.high, first = curve.first;
      if (curve.stride > 1 && newest) {
        x = curve.tail.map((p) => p[0]); y = curve.tail.map((p) => p[1]); low = high = first = undefined;
      } else if (newest) {
        const from = Math.max(0, x.length - 300);
        x = x.slice(from); y = y.slice(from);
      } else if (first) x = x.map((step, i) => (step + first[i]) / 2);
      if (sem && curve.stride === 1 && sem.stride === 1) {
        const errors = new Map(sem.x.map((step, i) => [step, sem.y[i]]));
        low = x.map((step, i) => (y[i] === null || errors.get(step) == null ? y[i] : y[i] - errors.get(step)));
        high = x.map((step, i) => (y[i] === null || errors.get(step) == null ? y[i] : y[i] + errors.get(step)));
      }
      const shown = settings.smoothing > 0 && x.length > 3 ? smooth(y, settings.smoothing) : y;
      return { ...given, x, y, low, high, ends: !newest && first ? [first, curve.x] : null, shown,
        hue: colour(given.tint) };
    }).filter((line) => line.x.length);
    const steps = new Set();
    for (const line of this.lines) for (const step of line.x) steps.add(step);
    const kept = this.cursor !== null && this.steps[this.cursor];
    this.steps = [...steps].sort((a, b) => a - b);
    if (this.cursor !== null) {
      this.cursor = this.steps.length ? Math.max(0, this.steps.findIndex((step) => step >= kept)) : null;
    }
    this.showLegend();
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
    let low = Infinity, high = -Infinity;
    const usable = (v) => v !== null && v !== undefined && Number.isFinite(v) && (!this.log || v > 0);
    for (const line of this.lines) {
      for (const column of [line.y, line.low, line.high]) {
        for (const v of column || []) if (usable(v)) { if (v < low) low = v; if (v > high) high = v; }
      }
    }
    if (low > high) return null;
    if (this.log) { low = Math.log10(low); high = Math.log10(high); }
    const pad = high > low ? (high - low) * 0.06 : Math.abs(high) * 0.1 || 0.5;
    low -= pad; high += pad;
    const from = this.steps[0], to = this.steps[this.steps.length - 1];
    const across = width - LEFT - RIGHT, down = height - TOP - BOTTOM;
    return { low, high, from, to,
      x: (step) => LEFT + (to > from ? (step - from) / (to - from) : 0.5) * across,
      y: (v) => TOP + (1 - ((this.log ? Math.log10(v) : v) - low) / (high - low)) * down, usable };
  }

  paint() {
    if (!this.visible || !this.root.isConnected) return;
    this.prepare();
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
      context.beginPath(); context.moveTo(LEFT, at); context.lineTo(width - RIGHT, at); context.stroke();
      context.fillText(short(v, this.spec.unit), LEFT - 4, at);
    }
    context.textBaseline = 'alphabetic';
    for (const tick of scale.to > scale.from ? ticks(scale.from, scale.to, width / 90) : [scale.from]) {
      context.textAlign = tick === scale.to ? 'right' : 'center';
      context.fillText(short(tick), Math.min(scale.x(tick), width - RIGHT), height - 5);
    }
  }

  line(context, scale, line) {
    context.strokeStyle = context.fillStyle = line.hue;
    context.lineJoin = 'round';
    if (line.low) {
      context.globalAlpha = 0.18;
      this.runs(line, line.low, scale, (from, to) => {
        context.beginPath();
        for (let i = from; i <= to; i++) context.lineTo(scale.x(line.x[i]), scale.y(line.high[i]));
        for (let i = to; i >= from; i--) context.lineTo(scale.x(line.x[i]), scale.y(line.low[i]));
        context.closePath(); context.fill();
        if (line.sem) for (let i = from; i <= to; i++) {
          context.fillRect(scale.x(line.x[i]) - 1, scale.y(line.high[i]), 2,
            scale.y(line.low[i]) - scale.y(line.high[i]));
        }
      });
    }
    const draw = (values, alpha, weight) => {
      context.globalAlpha = alpha; context.lineWidth = weight;
      this.runs(line, values, scale, (from, to) => {
        context.setLineDash(DASHES[(line.dash || 0) % 4]);
        context.beginPath();
        for (let i = from; i <= to; i++) context.lineTo(scale.x(line.x[i]), scale.y(values[i]));
        context.stroke();
        context.setLineDash([]);
        if (line.x.length <= 30 || from === to) {
          for (let i = from; i <= to; i++) {
            context.beginPath(); context.arc(scale.x(line.x[i]), scale.y(values[i]), 2.2, 0, 7); context.fill();
          }
        }
      });
    };
    if (line.shown !== line.y) draw(line.y, 0.25, 1);
    draw(line.shown, 1, 1.6);
    context.globalAlpha = 1;
  }

  // Calls `each(from, to)` for the stretches without a gap.
  runs(line, values, scale, each) {
    let from = -1;
    for (let i = 0; i <= values.length; i++) {
      const fine = i < values.length && scale.usable(values[i]);
      if (fine && from < 0) from = i;
      if (!fine && from >= 0) { each(from, i - 1); from = -1; }
    }
  }

  mark(context, scale, height) {
    const step = this.steps[this.cursor], at = Math.round(scale.x(step)) + 0.5;
    context.strokeStyle = ink('faint');
    context.beginPath(); context.moveTo(at, TOP); context.lineTo(at, height - BOTTOM); context.stroke();
    for (const line of this.lines) {
      const i = nearest(line.x, step), value = line.shown[i];
      if (!scale.usable(value)) continue;
      context.fillStyle = line.hue;
      context.beginPath(); context.arc(scale.x(line.x[i]), scale.y(value), 3.5, 0, 7); context.fill();
    }
  }

  show() {
    const last = this.steps.length - 1, index = this.cursor ?? last;
    this.announce(last < 0 ? 'no data yet' : this.describe(index),
      [0, last, index].map((i) => this.steps[i] ?? 0));
    this.canvas.dataset.points = String(this.lines.reduce((sum, line) => sum + line.x.length, 0));
    this.canvas.dataset.last = String(Math.max(...this.lines.map((line) =>
      (line.ends ? line.ends[1] : line.x).at(-1))));
  }

  describe(index) {
    const step = this.steps[index], many = this.lines.length > 1;
    const parts = this.lines.map((line) => {
      const i = nearest(line.x, step), value = withUnit(line.y[i], this.spec.unit);
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

function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1; else high = middle;
  }
  return low > 0 && value - sorted[low - 1] <= sorted[low] - value ? low - 1 : low;
}

function short(value, unit) {
  if (unit === 'bytes') return withUnit(value, unit).replace(/ |iB|B$/g, '');
  const size = Math.abs(value);
  for (const [power, sign] of [[1e9, 'G'], [1e6, 'M'], [1e3, 'k']]) {
    if (size >= power * (power === 1e3 ? 10 : 1)) return `${number(value / power, 3)}${sign}`;
  }
  return number(value, 3);
}
