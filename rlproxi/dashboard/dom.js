// Small helpers. Text from a run only ever becomes text, never markup.

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

export const byId = (id) => document.getElementById(id);

export async function get(path) {
  const answer = await fetch(path, { cache: 'no-store' });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error || `status ${answer.status}`);
  return body;
}

export const runPath = (id, rest = '') => `api/runs/${encodeURIComponent(id)}${rest}`;

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

export const colour = (index) => getComputedStyle(document.documentElement).getPropertyValue(`--c${index % 8}`).trim();
export const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// A canvas as sharp as the screen; returns its context and size in CSS pixels.
export function sharpen(canvas) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const context = canvas.getContext('2d');
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

// At most one call in `wait` milliseconds, and always one after the last request.
export function throttle(wait, action) {
  let timer = null, last = 0;
  return () => {
    if (timer !== null) return;
    timer = setTimeout(() => { timer = null; last = Date.now(); action(); }, Math.max(0, last + wait - Date.now()));
  };
}
