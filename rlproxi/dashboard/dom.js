// Small helpers. Text from a run always becomes text, never markup.

export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === 'class') node.className = value;
    else if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name in node && typeof value !== 'string') node[name] = value;
    else node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Fills a select; entries: [[value, text]].
export const options = (select, entries, chosen) => select.replaceChildren(...entries.map(([value, text]) =>
  el('option', { value: String(value), selected: String(value) === String(chosen) }, String(text))));

export const field = (text, ...controls) => el('label', { class: 'field' }, text, ...controls);

// A coloured square, as in a legend.
export function swatch(background, opacity = '') {
  const node = el('span', { class: 'swatch' });
  Object.assign(node.style, { background, opacity });
  return node;
}

export const byId = (id) => document.getElementById(id);

export async function get(path) {
  const answer = await fetch(path, { cache: 'no-store' });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error || `status ${answer.status}`);
  return body;
}

export const runPath = (id, rest = '') => `api/runs/${encodeURIComponent(id)}${rest}`;

// A part of the page about one run: its content, or the sentence `none` where the run has none.
export class Part {
  constructor(id, none, ...content) {
    this.none = el('p', { class: 'faint' }, none);
    this.content = el('div', {}, ...content);
    byId(id).append(this.none, this.content);
  }

  // Takes the run; returns whether another one was shown before.
  begins(run) {
    const other = this.run !== run.id;
    this.run = run.id;
    return other;
  }

  // Shows the content if `list` has entries; returns whether it has.
  holds(list) {
    this.none.hidden = list.length > 0;
    this.content.hidden = !list.length;
    return list.length > 0;
  }

  // What the server answers about the run; null if it fails, or if another run is shown by then.
  async fetch(path) {
    const run = this.run, answer = await get(runPath(run, path)).catch(() => null);
    return run === this.run ? answer : null;
  }
}

export function number(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return '–';
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(Math.max(0, digits - 2)).replace(/\.?0+e/, 'e');
  return String(Number(value.toPrecision(digits)));
}

export const whole = (value) => (Number.isFinite(value)
  ? Math.round(value).toLocaleString('en').replaceAll(',', '\u202f') : '–');

export function withUnit(value, unit) {
  if (unit === 'bytes' && Number.isFinite(value)) {
    const power = Math.min(4, Math.floor(Math.log2(Math.max(1, Math.abs(value))) / 10));
    return `${number(value / 1024 ** power, 3)} ${['B', 'KiB', 'MiB', 'GiB', 'TiB'][power]}`;
  }
  if (unit === 'share' && Number.isFinite(value)) return `${number(value * 100, 3)} %`;
  return number(value) + (unit && unit !== '1' && unit !== 'reward' ? ` ${unit}` : '');
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return '–';
  if (seconds < 90) return `${number(seconds, 2)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

// Saves rows as a CSV file.
export function save(name, rows) {
  const cell = (value) => {
    const text = value === null || value === undefined || Number.isNaN(value) ? '' : String(value);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const text = rows.map((row) => row.map(cell).join(',')).join('\n');
  const address = URL.createObjectURL(new Blob([`${text}\n`], { type: 'text/csv' }));
  el('a', { href: address, download: name.replace(/[^\w.-]+/g, '-') }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

export const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
export const colour = (index) => ink(`c${index % 8}`);

// A canvas as sharp as the screen; returns its context and size in CSS pixels.
export function sharpen(canvas) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = Math.round(width * scale); // which also clears it and resets its context
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext('2d');
  context.scale(scale, scale);
  return { context, width, height };
}

// Begins a path through the points [x, y].
export function trace(context, points) {
  context.beginPath();
  for (const [x, y] of points) context.lineTo(x, y);
  return context;
}

// At most one call in `wait` milliseconds, and always one after the last request.
export function throttle(wait, action) {
  let timer = null, last = 0;
  return () => {
    if (timer !== null) return;
    timer = setTimeout(() => { timer = null; last = Date.now(); action(); }, Math.max(0, last + wait - Date.now()));
  };
}

// A canvas that is read at a cursor, which pointer and keyboard move. A subclass has paint(), point(offset in pixels)
// and reach() => {last: the greatest position, step and page: what the arrow and page keys add}.
export class CanvasView {
  constructor(label) {
    this.cursor = null;
    this.readout = el('div', { class: 'readout faint' });
    this.canvas = el('canvas', { tabindex: '0', role: 'slider', 'aria-label': label,
      'aria-valuemin': '0', 'aria-valuemax': '0', 'aria-valuenow': '0', 'aria-valuetext': 'no data yet' });
    this.draw = throttle(60, () => this.paint());
    new ResizeObserver(this.draw).observe(this.canvas);
    const on = (name, action) => this.canvas.addEventListener(name, action);
    on('pointermove', (event) => this.point(event.offsetX));
    on('pointerdown', (event) => this.point(event.offsetX));
    on('pointerleave', () => { if (document.activeElement !== this.canvas) this.at(null); });
    on('focus', () => { if (this.cursor === null) this.at(this.reach().last); });
    on('blur', () => this.at(null));
    on('keydown', (event) => this.key(event));
  }

  key(event) {
    const { last, step, page } = this.reach(), now = this.cursor ?? last;
    const to = { ArrowLeft: now - step, ArrowDown: now - step, ArrowRight: now + step, ArrowUp: now + step,
      PageDown: now - page, PageUp: now + page, Home: 0, End: last, Escape: null }[event.key];
    if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.at(to);
  }

  at(position) {
    const { last } = this.reach();
    this.cursor = position === null || last < 0 ? null : Math.max(0, Math.min(last, position));
    this.draw();
  }

  // Writes what is at the cursor below the canvas, also for screen readers.
  announce(text, [min, max, now]) {
    this.readout.textContent = text;
    this.readout.classList.toggle('faint', this.cursor === null);
    const values = { valuetext: text, valuemin: min, valuemax: max, valuenow: now };
    for (const [name, value] of Object.entries(values)) this.canvas.setAttribute(`aria-${name}`, String(value));
  }
}
