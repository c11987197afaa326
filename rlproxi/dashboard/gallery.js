// Samples of training over time, and those of the held-out prompts at each evaluation, which can be compared.

import { byId, el, field, get, number, options, runPath } from './dom.js';

const FIRST_PROMPTS = 6;
const pictures = new Map(); // url -> promise of a decoded image; the newest few

function picture(url) {
  if (!pictures.has(url)) {
    const image = new Image();
    image.src = url;
    pictures.set(url, image.decode().then(() => image));
    if (pictures.size > 200) pictures.delete(pictures.keys().next().value);
  }
  return pictures.get(url);
}

// The held-out scores of an evaluation's prompt; [] if they cannot be fetched.
const heldout = (path) => get(path).then((answer) => answer.heldout).catch(() => []);

// Draws sample `index` of `count` that stand side by side in the picture at `url`.
function crop(url, index, count, label) {
  const canvas = el('canvas', { role: 'img', 'aria-label': label, width: 8, height: 8 });
  picture(url).then((image) => {
    const width = image.naturalWidth / count;
    canvas.width = width;
    canvas.height = image.naturalHeight;
    canvas.getContext('2d').drawImage(image, index * width, 0, width, image.naturalHeight, 0, 0, width,
      image.naturalHeight);
    canvas.dataset.drawn = url;
  }).catch(() => canvas.setAttribute('aria-label', `${label}: the picture is missing`));
  return canvas;
}

function shot(url, index, count, prompt, score, word = '') {
  const text = score === null || score === undefined ? 'no score' : number(score, 3);
  return el('figure', { class: word ? 'shot large' : 'shot' },
    crop(url, index, count, `sample ${index + 1} of “${prompt}”, ${text}`),
    el('figcaption', {}, word ? el('span', { class: word }, `${word} `) : null, text));
}

// A slider over a list that grows; follows its end until it is moved.
class Over {
  constructor(label, show) {
    this.list = [];
    this.follow = true;
    this.show = show;
    this.range = el('input', { type: 'range', min: '0', max: '0', value: '0', class: 'wide', 'aria-label': label,
      oninput: () => { this.follow = Number(this.range.value) === this.list.length - 1; this.moved(); } });
    this.words = el('output', {});
    this.root = field(label, this.range, this.words);
  }

  get index() { return Math.min(Number(this.range.value), this.list.length - 1); }

  set(list, words) {
    const before = this.list[this.index];
    this.list = list;
    this.range.max = String(Math.max(0, list.length - 1));
    const kept = this.follow ? -1 : list.findIndex((entry) => (entry.tag ?? entry) === (before?.tag ?? before));
    this.range.value = String(kept < 0 ? list.length - 1 : kept);
    this.describe = words;
    this.moved();
  }

  moved() {
    if (this.index < 0) return;
    const text = this.describe(this.list[this.index]);
    this.words.textContent = text;
    this.range.setAttribute('aria-valuetext', text);
    this.show(this.list[this.index]);
  }
}

export class Gallery {
  constructor() {
    this.body = el('div', {});
    this.over = new Over('Iteration', (step) => this.show(step));
    this.none = el('p', { class: 'faint' }, 'No gallery yet: telemetry.samples_every sets how often one is kept.');
    byId('gallery-body').append(this.none, this.over.root, this.body);
  }

  update(run) {
    if (this.run !== run.id) { this.run = run.id; this.over.follow = true; this.shown = null;
      this.body.replaceChildren(); }
    this.none.hidden = run.galleries.length > 0;
    this.over.root.hidden = !run.galleries.length;
    if (run.galleries.length) this.over.set([...run.galleries], (step) =>
      `${step}${this.over.follow ? ', the newest' : ''}`);
  }

  async show(step) {
    const wanted = `${this.run} ${step}`;
    if (wanted === this.shown) return;
    this.shown = wanted;
    try {
      const { groups } = await get(runPath(this.run, `/galleries/${step}`));
      // The pictures first: the old ones stay until the new ones are loaded.
      await Promise.allSettled(groups.filter((group) => group.picture)
        .map((group) => picture(runPath(this.run, `/galleries/${step}/${groups.indexOf(group)}.png`))));
      if (this.shown !== wanted) return;
      const open = [...this.body.querySelectorAll('details')].map((node) => node.open);
      this.body.replaceChildren(...groups.map((group, g) => this.group(step, group, g, open[g])));
      this.body.dataset.step = String(step);
    } catch (error) {
      if (this.shown === wanted) this.body.replaceChildren(el('p', { class: 'faint' },
        `Iteration ${step}: ${error.message}`));
    }
  }

  group(step, group, g, open) {
    const count = group.rewards.length, url = runPath(this.run, `/galleries/${step}/${g}.png`);
    const parts = Object.keys(group.parts).length > 1 ? Object.entries(group.parts) : [];
    const detail = (i) => parts.map(([name, values]) => `${name} ${number(values[i], 3)}`).join(', ');
    const large = [['best', group.best], ['worst', group.worst]].filter(([, i]) => i !== null && i < count);
    const shots = group.picture && count ? [
      el('div', { class: 'shots' }, ...large.map(([word, i]) =>
        shot(url, i, count, group.prompt, group.rewards[i], word))),
      parts.length && large.length ? el('p', { class: 'faint' },
        large.map(([word, i]) => `${word}: ${detail(i)}`).join('; ')) : null,
      el('details', { open: Boolean(open) }, el('summary', {}, `All ${count} samples`), el('div', { class: 'shots' },
        ...group.rewards.map((score, i) => shot(url, i, count, group.prompt, score)))),
    ] : [el('p', { class: 'faint' }, 'Its picture is missing.')];
    return el('div', { class: 'group' }, el('p', {}, group.prompt || '(no caption)'), ...shots.filter(Boolean));
  }
}

export class Evaluations {
  constructor() {
    this.list = [];
    this.prompts = FIRST_PROMPTS;
    this.none = el('p', { class: 'faint' }, 'No evaluation with pictures yet.');
    this.steps = el('select', { onchange: () => this.refresh() });
    this.over = new Over('Evaluation', (entry) => this.show(entry));
    this.shots = el('div', {});
    this.more = el('button', { type: 'button', onclick: () =>
      { this.prompts += FIRST_PROMPTS; this.shown = null; this.over.moved(); } }, 'More prompts');
    this.compare = new Compare();
    this.all = el('div', {}, field('Denoising steps', this.steps), this.over.root,
      this.shots, this.more, this.compare.root);
    byId('evaluations-body').append(this.none, this.all);
  }

  async update(run) {
    const fresh = this.run !== run.id;
    if (fresh) { this.run = run.id; this.over.follow = true; this.prompts = FIRST_PROMPTS; }
    let found;
    try { found = (await get(runPath(run.id, '/evaluations'))).evaluations; } catch { return; }
    if (this.run !== run.id) return;
    this.shown = null;
    this.list = found.filter((entry) => entry.steps.length && entry.prompts.length);
    const counts = [...new Set(this.list.flatMap((entry) => entry.steps))].sort((a, b) => a - b);
    const headline = this.list.map((entry) => entry.headline).find((n) => counts.includes(n));
    const chosen = fresh || !counts.includes(Number(this.steps.value)) ? headline ?? counts[0]
      : Number(this.steps.value);
    this.steps.replaceChildren(...options(counts.map((n) => [n, n]), chosen));
    this.refresh();
  }

  refresh() {
    const steps = Number(this.steps.value), found = this.list.filter((entry) => entry.steps.includes(steps));
    this.none.hidden = found.length > 0;
    this.all.hidden = !found.length;
    if (!found.length) return;
    this.over.set(found, (entry) => `${entry.tag} (iteration ${entry.iteration ?? '?'})`);
    this.compare.set(this.run, steps, found);
  }

  async show(entry) {
    const steps = Number(this.steps.value), wanted = `${this.run} ${entry.tag} ${steps} ${this.prompts}`;
    if (wanted === this.shown) return;
    this.shown = wanted;
    const rows = await Promise.all(entry.prompts.slice(0, this.prompts).map(async (prompt, p) => {
      const base = runPath(this.run, `/evaluations/${entry.tag}/${steps}/${p}`);
      const [scores] = await Promise.all([heldout(base), picture(`${base}.png`).catch(() => null)]);
      return el('div', { class: 'group' }, el('p', {}, prompt || '(no caption)'), el('div', { class: 'shots' },
        ...Array.from({ length: Math.min(8, entry.samples) }, (_, i) =>
          shot(`${base}.png`, i, entry.samples, prompt, scores[i]))));
    }));
    if (this.shown !== wanted) return;
    this.shots.replaceChildren(...rows);
    this.shots.dataset.tag = entry.tag;
    this.more.hidden = this.prompts >= entry.prompts.length;
  }
}

// Two evaluations of one prompt, one over the other, with an edge to move.
class Compare {
  constructor() {
    const select = (label) => el('select', { 'aria-label': label, onchange: () => this.draw() });
    [this.left, this.right, this.prompt, this.sample] = ['Left evaluation', 'Right evaluation', 'Prompt',
      'Sample'].map(select);
    this.stage = el('div', { class: 'compare' });
    this.edge = el('div', { class: 'edge' });
    this.range = el('input', { type: 'range', min: '0', max: '100', value: '50', class: 'compare-range',
      'aria-label': 'Share of the left picture', oninput: () => this.place() });
    this.words = el('p', { class: 'faint', role: 'status' });
    this.root = el('div', { class: 'group' }, el('h3', {}, 'Before and after'),
      el('p', {}, field('Left', this.left), field('Right', this.right), field('Prompt', this.prompt),
        field('Sample', this.sample)),
      this.stage, this.range, this.words);
  }

  set(run, steps, list) {
    const was = this.run === run && this.list ? [this.left.value, this.right.value, this.prompt.value,
      this.sample.value] : [];
    Object.assign(this, { run, steps, list });
    const fill = (node, entries, chosen) => node.replaceChildren(...options(entries, chosen));
    const tags = list.map((entry) => [entry.tag, entry.tag]), last = list[list.length - 1];
    fill(this.left, tags, was[0] ?? list[0].tag);
    fill(this.right, tags, was[1] && was[1] !== this.newest ? was[1] : last.tag);
    this.newest = last.tag;
    fill(this.prompt, last.prompts.slice(0, 64).map((text, p) => [p, `${p + 1}: ${text.slice(0, 80)}`]), was[2] ?? '0');
    fill(this.sample, Array.from({ length: last.samples }, (_, i) => [i, i + 1]), was[3] ?? '0');
    this.draw();
  }

  async draw() {
    const p = Number(this.prompt.value), i = Number(this.sample.value);
    const wanted = (this.wanted = {});
    const sides = await Promise.all([this.left.value, this.right.value].map(async (tag) => {
      const entry = this.list.find((found) => found.tag === tag),
        base = runPath(this.run, `/evaluations/${tag}/${this.steps}/${p}`);
      return { tag, score: (await heldout(base))[i], canvas: crop(`${base}.png`, i, entry?.samples ?? 1,
        `sample ${i + 1} of evaluation ${tag}`) };
    }));
    if (wanted !== this.wanted) return;
    this.upper = sides[0].canvas;
    this.stage.replaceChildren(sides[1].canvas, sides[0].canvas, this.edge);
    const describe = ({ tag, score }) =>
      `${tag} ${score === null || score === undefined ? 'without a score' : number(score, 3)}`;
    const [left, right] = sides.map(describe);
    this.words.textContent = `Left: ${left}. Right: ${right}. Held-out judge, same prompt and seed.`;
    this.place();
  }

  place() {
    const share = Number(this.range.value);
    if (this.upper) this.upper.style.clipPath = `inset(0 ${100 - share}% 0 0)`;
    this.edge.style.left = `${share}%`;
    this.range.setAttribute('aria-valuetext', `${share} % left picture`);
  }
}
