// Which curves are shown together, under which heading. Curves without a place come last, so none is left out.

import { Chart } from './chart.js';
import { el } from './dom.js';
import { EVALUATION } from './store.js';

const one = (stage, ...names) => names.map((name) => ({ key: name, pick: (s, n) => s === stage && n === name }));
const family = (stage, pattern, title) => ({ title, pattern, stage });

// A row is {key, pick} for a plot of its own, or {title, stage, pattern} for one plot of all that match.
const LAYOUT = [
  ['rewards', 'Rewards', [
    ...one('rl', 'reward/mean'), { each: 'headline', pattern: /^heldout\/[^/]+$/ }, ...one('rl', 'reward/std'),
    { each: 'rl', pattern: /^reward\// }, { each: 'headline', pattern: /^train\/[^/]+$/ },
    { frontier: true }, family('headline', /^details\//, 'Share judged right, by attribute')]],
  ['policy', 'Is the policy update sound?', [
    ...one('rl', 'kl', 'clip_fraction', 'ratio/first_max_deviation', 'ratio/max_deviation', 'ratio/mean',
      'advantages/zero_variance_groups')]],
  ['optimisation', 'Optimisation', one('rl', 'loss', 'lr', 'grad_norm')],
  ['looks', 'Diversity and distance to data', [
    ...['diversity', 'distance/total', 'distance/layout', 'distance/texture'].map((name) =>
      ({ each: 'headline', pattern: new RegExp(`^${name}$`) })),
    { each: 'rl', pattern: /^(diversity|distance)/ }]],
  ['speed', 'Where the time goes', [
    family('rl', /^seconds\//, 'Seconds by role'), family('rl', /^idle\//, 'Idle share by role'),
    ...one('rl', 'images_per_second', 'images_per_second/gpu', 'staleness/mean', 'bytes_in_flight', 'bytes/weights')]],
  ['faults', 'Restarts and what was dropped', one('rl', 'restarts', 'groups/masked', 'samples/masked')],
  ['pretraining', 'Pre-training', [...one('pretrain', 'loss', 'lr', 'grad_norm', 'images_per_second'),
    { each: 'pretrain', pattern: /./ }]],
  ['preparation', 'Preparation', [{ each: /^(prepare|encode|curate)/, pattern: /./ }]],
  ['others', 'Everything else', [{ each: /./, pattern: /./ }]],
];

export class Sections {
  constructor(root, nav, catalogue, selected) {
    Object.assign(this, { root, nav, catalogue, selected, charts: new Map(), signature: '' });
    this.known = catalogue.map((metric) => ({ ...metric,
      test: new RegExp(`^${metric.name.replace(/[.*+?^${}()|[\]\\]/g, '\\$&').replace(/<\w+>/g, '[^/]+')}$`) }));
  }

  lookup(name) {
    const bare = name.replace(/^train\//, 'reward/');
    return this.known.find((m) => m.name === bare) || this.known.find((m) => m.test.test(bare));
  }

  // The stage 'headline' stands for evaluations at a run's own number of denoising steps, in which runs differ.
  curveOf(run, stage, name) {
    return run.curve(stage === 'headline' ? `evaluation@${run.headline}` : stage, name);
  }

  // Builds the plots again when there is a new curve.
  update() {
    const found = new Map();
    for (const run of this.selected()) {
      run.headline = headlineSteps(run);
      for (const [stage, curves] of Object.entries(run.curves)) {
        const known = stage === `evaluation@${run.headline}` ? 'headline' : stage;
        for (const name of Object.keys(curves)) {
          if (!name.endsWith('/sem')) found.set(`${known}\n${name}`, [known, name]);
        }
      }
    }
    const signature = [...found.keys()].sort().join('\n\n');
    if (signature !== this.signature) {
      this.signature = signature;
      this.build(found);
    }
    for (const chart of this.charts.values()) chart.draw();
  }

  build(found) {
    const left = new Map(found), kept = new Map(), parts = [];
    const take = (test) => {
      const taken = [...left].filter(([, [stage, name]]) => test(stage, name));
      for (const [key] of taken) left.delete(key);
      return taken.map(([, pair]) => pair);
    };
    const chart = (key, spec) => {
      const made = this.charts.get(key) || new Chart({ ...spec, key });
      kept.set(key, made);
      return made;
    };
    for (const [id, title, rows] of LAYOUT) {
      const made = [];
      for (const row of rows) {
        if (row.frontier) {
          const pairs = take((stage) => EVALUATION.test(stage));
          if (pairs.length) made.push(...this.frontiers(chart));
        } else if (row.title) {
          const pairs = take((stage, name) => stage === row.stage && row.pattern.test(name));
          if (pairs.length) made.push(chart(row.title, this.together(row.title, pairs)));
        } else {
          const test = row.pick || ((stage, name) => (row.each instanceof RegExp ? row.each.test(stage)
            : stage === row.each) && row.pattern.test(name));
          for (const pair of take(test)) made.push(chart(pair.join(' '), this.single(...pair, id)));
        }
      }
      if (made.length) parts.push([id, title, made]);
    }
    this.charts = kept;
    this.arrange(parts);
  }

  arrange(parts) {
    const focused = document.activeElement;
    this.root.replaceChildren(...parts.map(([id, title, charts]) =>
      el('section', { id, 'aria-labelledby': `${id}-title` },
      el('h2', { id: `${id}-title` }, title), el('div', { class: 'grid' }, ...charts.map((made) => made.root)))));
    if (this.root.contains(focused)) focused.focus({ preventScroll: true });
    const fixed = [['gallery', 'Samples'], ['evaluations', 'Same prompts'], ['timeline', 'Timeline'],
      ['events', 'Events'], ['config', 'Config']];
    this.nav.replaceChildren(...[...parts.map(([id, title]) => [id, title]), ...fixed]
      .map(([id, title]) => el('a', { href: `#${id}` }, title)));
  }

  single(stage, name, section) {
    const metric = this.lookup(name);
    const evaluated = stage === 'headline';
    const where = evaluated ? (name.startsWith('heldout/') ? '' : ', in evaluations')
      : section === 'others' || section === 'preparation' ? `, ${stage}` : '';
    const title = name.replace(/^heldout\//, 'held-out ').replace(/^train\//, 'reward ').replace(/^details\//, '')
      + where;
    return { title, unit: metric?.unit, help: metric?.help
      || 'Not in the catalogue of metrics: logged by an algorithm of one\'s own.',
      reading: metric?.reading, axis: evaluated ? 'iteration' : 'step', curves: () => this.curves([[stage, name]]) };
  }

  together(title, pairs) {
    const metrics = pairs.map(([, name]) => [name.split('/').pop(), this.lookup(name)]).filter(([, metric]) => metric);
    return { title, unit: metrics[0]?.[1].unit, help: metrics.map(([word, m]) =>
      `${word}: ${m.help} ${m.reading}`).join(' '),
      curves: () => this.curves(pairs) };
  }

  curves(pairs) {
    const runs = this.selected(), several = runs.length > 1, found = [];
    pairs.forEach(([stage, name], p) => runs.forEach((run, r) => {
      const curve = this.curveOf(run, stage, name);
      if (!curve) return;
      const word = name.split('/').slice(-1)[0];
      const label = several ? (pairs.length > 1 ? `${run.id} ${word}` : run.id) : word;
      found.push({ label, tint: several ? run.tint ?? r : p, dash: several ? p : Math.floor(p / 8), curve,
        sem: this.curveOf(run, stage, `${name}/sem`) });
    }));
    return found;
  }

  // Reward against the number of denoising steps: the first and the last evaluation of each judge.
  frontiers(chart) {
    const counts = (run) => run.evaluated().sort((a, b) => a - b);
    const names = new Set(this.selected().flatMap((run) => counts(run).flatMap((n) => run.judges(n))));
    return [...names].map((name) => chart(`frontier ${name}`, {
      title: `held-out ${name.slice(8)} against denoising steps`, axis: 'denoising steps', unit: 'reward',
      help: 'The first and the newest evaluation at each number of denoising steps.',
      reading: 'Higher and further left is better: more reward for less computation.',
      curves: () => this.selected().flatMap((run, r) => ['first', 'newest'].map((which, w) => {
        const x = [], y = [], error = [];
        for (const n of counts(run)) {
          const curve = run.curve(`evaluation@${n}`, name), sem = run.curve(`evaluation@${n}`, `${name}/sem`);
          if (!curve?.x.length || (w === 1 && curve.x.length < 2)) continue;
          const at = w === 0 ? 0 : curve.x.length - 1;
          x.push(n); y.push(curve.y[at]); error.push(sem?.y[at] ?? null);
        }
        const several = this.selected().length > 1;
        return { label: several ? `${run.id} ${which}` : which, dash: several ? 1 - w : 0,
          tint: several ? run.tint ?? r : w, curve: { stride: 1, x, y }, sem: { stride: 1, x, y: error } };
      })),
    }));
  }
}

// A run's main number of denoising steps: its config's, else the one with the most evaluations; null without any.
function headlineSteps(run) {
  const counts = run.evaluated();
  if (counts.includes(run.headline_steps)) return run.headline_steps;
  const size = (n) => Math.max(0, ...Object.values(run.curves[`evaluation@${n}`]).map((curve) => curve.x.length));
  return counts.sort((a, b) => size(b) - size(a))[0] ?? null;
}
