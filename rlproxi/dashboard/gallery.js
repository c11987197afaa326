// Samples of training over time, and those of the held-out prompts at each evaluation, which can be compared.

import { el, field, get, number, options, Part, runPath } from './dom.js';

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
const heldout = (path) => get(path).catch(() => []);
const score = (value) => (value === null || value === undefined ? 'no score' : number(value, 3));

// Draws sample `index` of `count` that stand side by side in the picture at `url`.
function crop(url, index, count, label) {
  const canvas = el('canvas', { role: 'img', 'aria-label': label, width: 8, height: 8 });
  picture(url).then((image) => {
    canvas.width = image.naturalWidth / count;
    canvas.height = image.naturalHeight;
    canvas.getContext('2d').drawImage(image, -index * image.naturalWidth / count, 0);
    canvas.dataset.drawn = url;
  }).catch(() => canvas.setAttribute('aria-label', `${label}: the picture is missing`));
  return canvas;
}

function shot(url, index, count, prompt, value, word = '') {
  return el('figure', { class: word ? 'shot large' : 'shot' },
    crop(url, index, count, `sample ${index + 1} of “${prompt}”, ${score(value)}`),
    el('figcaption', {}, word ? el('span', { class: word }, `${word} `) : null, score(value)));
}

const promptGroup = (prompt, ...content) =>
  el('div', { class: 'group' }, el('p', {}, prompt || '(no caption)'), ...content);

// A slider over a list that grows, which follows the list's end until it is moved.
class Slider {
  constructor(label, describe, show) {
    Object.assign(this, { list: [], follow: true, describe, show });
    this.range = el('input', { type: 'range', min: '0', max: '0', value: '0', class: 'wide', 'aria-label': label,
      oninput: () => { this.follow = Number(this.range.value) === this.list.length - 1; this.moved(); } });
    this.words = el('output', {});
    this.root = field(label, this.range, this.words);
  }

  get chosen() { return this.list[Math.min(Number(this.range.value), this.list.length - 1)]; }

  set(list) {
    const before = this.chosen;
    this.list = list;
    this.range.max = String(list.length - 1);
    const kept = this.follow ? -1 : list.findIndex((entry) => (entry.tag ?? entry) === (before?.tag ?? before));
    this.range.value = String(kept < 0 ? list.length - 1 : kept);
    this.moved();
  }

  moved() {
    const text = this.describe(this.chosen);
    this.words.textContent = text;
    this.range.setAttribute('aria-valuetext', text);
    this.show(this.chosen);
  }
}

export class Gallery {
  constructor() {
    this.body = el('div', {});
    this.slider = new Slider('Iteration', (step) => `${step}${this.slider.follow ? ', the newest' : ''}`,
      (step) => this.show(step));
    this.part = new Part('gallery-body', 'No gallery yet: telemetry.samples_every sets how often one is kept.',
      this.slider.root, this.body);
  }

  update(run) {
    if (this.part.begins(run)) {
      this.slider.follow = true;
      this.shown = null;
      this.body.replaceChildren();
    }
    if (this.part.holds(run.galleries)) this.slider.set([...run.galleries]);
  }

  async show(step) {
    const base = runPath(this.part.run, `/galleries/${step}`);
    if (base === this.shown) return;
    this.shown = base;
    try {
      const groups = (await get(base)).map((group, g) => ({ ...group, url: `${base}/${g}.png` }));
      // The pictures first: the old ones stay until the new ones are loaded.
      await Promise.allSettled(groups.filter((group) => group.picture).map((group) => picture(group.url)));
      if (this.shown !== base) return;
      const open = [...this.body.querySelectorAll('details')].map((node) => node.open);
      this.body.replaceChildren(...groups.map((group, g) => this.group(group, open[g])));
      this.body.dataset.step = String(step);
    } catch (error) {
      if (this.shown === base) this.body.replaceChildren(el('p', { class: 'faint' },
        `Iteration ${step}: ${error.message}`));
    }
  }

  group({ prompt, rewards, parts, url, picture: drawn, ...group }, open) {
    const count = rewards.length;
    if (!drawn || !count) return promptGroup(prompt, el('p', { class: 'faint' }, 'Its picture is missing.'));
    const names = Object.keys(parts), known = (i) => Number.isInteger(i) && i < count;
    const large = ['best', 'worst'].filter((word) => known(group[word]));
    const detail = (i) => names.map((name) => `${name} ${number(parts[name][i], 3)}`).join(', ');
    const single = (i, word) => shot(url, i, count, prompt, rewards[i], word);
    return promptGroup(prompt,
      el('div', { class: 'shots' }, ...large.map((word) => single(group[word], word))),
      names.length > 1 && large.length ? el('p', { class: 'faint' },
        large.map((word) => `${word}: ${detail(group[word])}`).join('; ')) : '',
      el('details', { open: Boolean(open) }, el('summary', {}, `All ${count} samples`),
        el('div', { class: 'shots' }, ...rewards.map((_, i) => single(i)))));
  }
}

export class Evaluations {
  constructor() {
    this.steps = el('select', { onchange: () => this.refresh() });
    this.slider = new Slider('Evaluation', (entry) => `${entry.tag} (iteration ${entry.iteration ?? '?'})`,
      (entry) => this.show(entry));
    this.shots = el('div', { class: 'groups' });
    this.more = el('button', { type: 'button', onclick: () => {
      this.prompts += FIRST_PROMPTS;
      this.slider.moved();
    } }, 'More prompts');
    this.compare = new Compare();
    this.part = new Part('evaluations-body', 'No evaluation with pictures yet.', field('Denoising steps', this.steps),
      this.compare.root, el('h3', {}, 'The same prompts over training'), this.slider.root, this.shots, this.more);
  }

  async update(run) {
    const fresh = this.part.begins(run);
    if (fresh) {
      this.slider.follow = true;
      this.prompts = FIRST_PROMPTS;
    }
    const found = await this.part.fetch('/evaluations');
    if (!found) return;
    this.shown = null;
    this.list = found.filter((entry) => entry.steps.length && entry.prompts.length);
    if (!this.part.holds(this.list)) return;
    const counts = [...new Set(this.list.flatMap((entry) => entry.steps))].sort((a, b) => a - b);
    const headline = this.list.map((entry) => entry.headline).find((n) => counts.includes(n)) ?? counts[0];
    const before = Number(this.steps.value);
    options(this.steps, counts.map((n) => [n, n]), !fresh && counts.includes(before) ? before : headline);
    this.refresh();
  }

  refresh() {
    const found = this.list.filter((entry) => entry.steps.includes(Number(this.steps.value)));
    this.slider.set(found);
    this.compare.set(this.part.run, this.steps.value, found);
  }

  async show(entry) {
    const base = runPath(this.part.run, `/evaluations/${entry.tag}/${this.steps.value}`);
    const wanted = `${base} ${this.prompts}`;
    if (wanted === this.shown) return;
    this.shown = wanted;
    const rows = await Promise.all(entry.prompts.slice(0, this.prompts).map(async (prompt, p) => {
      const url = `${base}/${p}.png`;
      const [scores] = await Promise.all([heldout(`${base}/${p}`), picture(url).catch(() => null)]);
      const count = Math.min(8, entry.samples);
      return promptGroup(prompt, el('div', { class: 'shots' },
        ...Array.from({ length: count }, (_, i) => shot(url, i, entry.samples, prompt, scores[i]))));
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
    const labels = ['Left', 'Right', 'Prompt', 'Sample'];
    this.choices = labels.map((_, i) => el('select', { onchange: () => { this.draw(); if (i < 2) this.beside(); } }));
    const fields = labels.map((label, i) => field(label, this.choices[i]));
    this.pairs = el('div', { class: 'groups pairs' });
    this.stage = el('div', { class: 'compare' });
    this.edge = el('div', { class: 'edge' });
    this.range = el('input', { type: 'range', min: '0', max: '100', value: '50', class: 'compare-range',
      'aria-label': 'Share of the left picture', oninput: () => this.place() });
    this.words = el('p', { class: 'faint', role: 'status' });
    this.root = el('div', {}, el('h3', {}, 'Before and after'), el('p', {}, ...fields.slice(0, 2)), this.pairs,
      el('h3', {}, 'One sample, under a movable edge'), el('p', {}, ...fields.slice(2)),
      this.stage, this.range, this.words);
  }

  set(run, steps, list) {
    const [left, right, prompt, sample] = this.run === run ? this.choices.map((choice) => choice.value) : [];
    const tags = list.map((entry) => [entry.tag, entry.tag]), last = list.at(-1);
    const prompts = last.prompts.slice(0, 64).map((text, p) => [p, `${p + 1}: ${text.slice(0, 80)}`]);
    const samples = Array.from({ length: last.samples }, (_, i) => [i, i + 1]);
    const newest = right && right !== this.newest ? right : last.tag;
    const filled = [[tags, left ?? list[0].tag], [tags, newest], [prompts, prompt ?? 0], [samples, sample ?? 0]];
    this.choices.forEach((choice, i) => options(choice, ...filled[i]));
    Object.assign(this, { run, steps, list, newest: last.tag });
    this.draw();
    this.beside();
  }

  // The first prompts, with the samples of both evaluations side by side: the same seeds stand in the same places.
  async beside() {
    const tags = this.choices.slice(0, 2).map((choice) => choice.value);
    const wanted = (this.paired = {});
    const entry = (tag) => this.list.find((found) => found.tag === tag);
    const prompts = this.list.at(-1).prompts.slice(0, FIRST_PROMPTS);
    const side = async (tag, prompt, p) => {
      const url = runPath(this.run, `/evaluations/${tag}/${this.steps}/${p}`), count = entry(tag)?.samples ?? 1;
      const [scores] = await Promise.all([heldout(url), picture(`${url}.png`).catch(() => null)]);
      return el('div', { class: 'side' }, el('p', { class: 'faint' }, tag), el('div', { class: 'shots' },
        ...Array.from({ length: Math.min(4, count) }, (_, i) => shot(`${url}.png`, i, count, prompt, scores[i]))));
    };
    const rows = await Promise.all(prompts.map(async (prompt, p) => promptGroup(prompt,
      el('div', { class: 'sides' }, ...await Promise.all(tags.map((tag) => side(tag, prompt, p)))))));
    if (wanted === this.paired) this.pairs.replaceChildren(...rows);
  }

  async draw() {
    const [left, right, p, i] = this.choices.map((choice) => choice.value);
    const wanted = (this.wanted = {});
    const sides = await Promise.all([left, right].map(async (tag) => {
      const base = runPath(this.run, `/evaluations/${tag}/${this.steps}/${p}`);
      const count = this.list.find((entry) => entry.tag === tag)?.samples ?? 1;
      const canvas = crop(`${base}.png`, Number(i), count, `sample ${Number(i) + 1} of evaluation ${tag}`);
      return { canvas, text: `${tag} ${score((await heldout(base))[i])}` };
    }));
    if (wanted !== this.wanted) return;
    this.upper = sides[0].canvas;
    this.stage.replaceChildren(sides[1].canvas, this.upper, this.edge);
    this.words.textContent = `Left: ${sides[0].text}. Right: ${sides[1].text}. Held-out judge, same prompt and seed.`;
    this.place();
  }

  place() {
    const share = Number(this.range.value);
    this.edge.style.left = `${share}%`;
    this.range.setAttribute('aria-valuetext', `${share} % left picture`);
    this.upper?.style.setProperty('clip-path', `inset(0 ${100 - share}% 0 0)`);
  }
}
