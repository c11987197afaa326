// Which curves are shown together, under which heading. Curves without a place come last, so none is left out.

import { Chart } from './chart.js';
import { el } from './dom.js';
import { EVALUATION } from './store.js';

const named = (stage, ...names) => names.map((name) => ({ stage, name }));
const together = (stage, pattern, title) => ({ stage, name: pattern, title });

// Each row takes the curves whose stage and name match: one plot for each, or one `title`d plot of all.
const LAYOUT = [
  ['rewards', 'Rewards and distance', [
    ...named('rl', 'reward/mean'),
    ...named('headline', /^heldout\/[^/]+$/, 'distance/total', 'spectrum/worst', 'diversity'),
    ...named('rl', 'reward/std', /^reward\//),
    ...named('headline', /^train\/[^/]+$/), { stage: EVALUATION, name: /./, frontier: true },
    together('headline', /^details\//, 'Share judged right, by attribute')]],
  ['policy', 'Is the policy update sound?', named('rl', 'kl', 'clip_fraction', 'ratio/first_max_deviation',
    'ratio/max_deviation', 'ratio/mean', 'advantages/zero_variance_groups')],
  ['optimisation', 'Optimisation', named('rl', 'loss', 'lr', 'grad_norm')],
  ['looks', 'Parts of the distance', [
    ...named('headline', 'distance/layout', 'distance/texture'), ...named('rl', /^(diversity|distance)/),
    together('headline', /^spectrum\/rows\//, 'Spectrum along rows, by period in pixels'),
    together('headline', /^spectrum\/columns\//, 'Spectrum along columns, by period in pixels')]],
  ['speed', 'Where the time goes', [
    together('rl', /^seconds\//, 'Seconds by role'), together('rl', /^idle\//, 'Idle share by role'),
    ...named('rl', 'images_per_second', 'images_per_second/gpu', 'staleness/mean', 'bytes_in_flight',
      'bytes/weights')]],
  ['faults', 'Restarts and what was dropped', named('rl', 'restarts', 'groups/masked', 'samples/masked')],
  ['pretraining', 'Pre-training', named('pretrain', 'loss', 'lr', 'grad_norm', 'images_per_second', /./)],
  ['preparation', 'Preparation', named(/^(prepare|encode|curate)/, /./)],
  ['others', 'Everything else', named(/./, /./)],
];

const SPECTRUM = 'Power of the images at a period, over that of real data. 1 is like the data; above 1 the images '
  + 'have too much of the period, for example a grid; below 1 too little, for example blur.';

const matches = (wanted, text) => (wanted instanceof RegExp ? wanted.test(text) : wanted === text);

export class Sections {
  constructor(root, nav, catalogue, selected) {
    Object.assign(this, { root, nav, selected, charts: new Map(), signature: '' });
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
      const headline = `evaluation@${run.headline}`;
      for (const [stage, curves] of Object.entries(run.curves)) {
        const known = stage === headline ? 'headline' : stage;
        for (const name of Object.keys(curves)) {
          if (!name.endsWith('/sem')) found.set(`${known} ${name}`, { stage: known, name });
        }
      }
    }
    const signature = [...found.keys()].sort().join('\n');
    if (signature !== this.signature) {
      this.signature = signature;
      this.build([...found.values()]);
    }
    for (const chart of this.charts.values()) chart.draw();
  }

  build(left) {
    const before = this.charts, parts = [];
    this.charts = new Map();
    for (const [id, title, rows] of LAYOUT) {
      const charts = [];
      for (const row of rows) {
        const taken = left.filter(({ stage, name }) => matches(row.stage, stage) && matches(row.name, name));
        left = left.filter((curve) => !taken.includes(curve));
        for (const spec of this.plots(row, taken, id)) {
          charts.push(before.get(spec.key) ?? new Chart(spec));
          this.charts.set(spec.key, charts.at(-1));
        }
      }
      if (charts.length) parts.push([id, title, charts]);
    }
    this.arrange(parts);
  }

  // The plots of a row for the curves that it takes.
  plots(row, taken, section) {
    if (!taken.length) return [];
    if (row.frontier) return this.frontiers();
    return row.title ? [this.together(row.title, taken)] : taken.map((curve) => this.single(curve, section));
  }

  arrange(parts) {
    const focused = document.activeElement;
    this.root.replaceChildren(...parts.map(([id, title, charts]) =>
      el('section', { id, 'aria-labelledby': `${id}-title` },
      el('h2', { id: `${id}-title` }, title), el('div', { class: 'grid' }, ...charts.map((made) => made.root)))));
    if (this.root.contains(focused)) focused.focus({ preventScroll: true });
    const first = [['evaluations', 'Before and after']];
    const last = [['gallery', 'Samples'], ['timeline', 'Timeline'], ['events', 'Events'], ['config', 'Config'],
      ['documents', 'Documents']];
    this.nav.replaceChildren(...[...first, ...parts, ...last].map(([id, title]) => el('a', { href: `#${id}` }, title)));
  }

  single({ stage, name }, section) {
    const metric = this.lookup(name), evaluated = stage === 'headline';
    const where = evaluated ? (name.startsWith('heldout/') ? '' : ', in evaluations')
      : section === 'others' || section === 'preparation' ? `, ${stage}` : '';
    const title = name.replace(/^heldout\//, 'held-out ').replace(/^train\//, 'reward ').replace(/^details\//, '');
    return { key: `${stage} ${name}`, title: title + where, unit: metric?.unit,
      help: metric ? `${metric.help} ${metric.reading}` : name.startsWith('spectrum/') ? SPECTRUM
        : 'Not in the catalogue of metrics: logged by an algorithm of one\'s own.',
      axis: evaluated ? 'iteration' : 'step', curves: () => this.curves([{ stage, name }]) };
  }

  together(title, taken) {
    const metrics = taken.map(({ name }) => ({ word: name.split('/').pop(), ...this.lookup(name) }));
    const known = metrics.filter((metric) => metric.help);
    return { key: title, title, unit: known[0]?.unit,
      help: taken[0].name.startsWith('spectrum/') ? SPECTRUM
        : known.map(({ word, help, reading }) => `${word}: ${help} ${reading}`).join(' '),
      axis: taken[0].stage === 'headline' ? 'iteration' : 'step',
      curves: () => this.curves(taken) };
  }

  curves(taken) {
    const runs = this.selected(), several = runs.length > 1;
    return taken.flatMap(({ stage, name }, at) => runs.map((run) => {
      const word = name.split('/').pop(), own = taken.length > 1 ? `${run.id} ${word}` : run.id;
      return { label: several ? own : word, tint: several ? run.tint : at, dash: several ? at : Math.floor(at / 8),
        curve: this.curveOf(run, stage, name), sem: this.curveOf(run, stage, `${name}/sem`) };
    })).filter(({ curve }) => curve);
  }

  // Reward against the number of denoising steps: the first and the newest evaluation of each judge.
  frontiers() {
    const names = new Set(this.selected().flatMap((run) => run.evaluated().flatMap((n) => run.judges(n))));
    return [...names].map((name) => ({
      key: `frontier ${name}`, title: `held-out ${name.slice(8)} against denoising steps`, axis: 'denoising steps',
      unit: 'reward', help: 'The first and the newest evaluation at each number of denoising steps. '
        + 'Higher and further left is better: more reward for less computation.',
      curves: () => this.selected().flatMap((run) => [this.frontier(run, name, 'first'),
        this.frontier(run, name, 'newest')]),
    }));
  }

  frontier(run, name, which) {
    const several = this.selected().length > 1, newest = which === 'newest';
    const found = run.evaluated().sort((a, b) => a - b).map((n) => ({ n, y: run.curve(`evaluation@${n}`, name)?.y ?? [],
      sem: run.curve(`evaluation@${n}`, `${name}/sem`)?.y ?? [] })).filter(({ y }) => y.length > (newest ? 1 : 0));
    const x = found.map(({ n }) => n), column = (key) => found.map((one) => one[key].at(newest ? -1 : 0) ?? null);
    return { label: several ? `${run.id} ${which}` : which, dash: several && !newest ? 1 : 0,
      tint: several ? run.tint : Number(newest), curve: { x, y: column('y') }, sem: { x, y: column('sem') } };
  }
}
