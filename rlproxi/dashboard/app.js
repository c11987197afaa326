// Builds the page: which runs are shown, and which parts are updated when something changes.

import { settings } from './chart.js';
import { Config } from './config.js';
import { byId, duration, el, get, swatch, throttle } from './dom.js';
import { Evaluations, Gallery } from './gallery.js';
import { Sections } from './sections.js';
import { showCards, showEvents } from './status.js';
import { Store } from './store.js';
import { Timeline } from './timeline.js';

const MOST_TOGETHER = 8;
let listing = [], chosen = [];

const QUIET = 600; // seconds without a record, after which a run is not called live
let link = '';

// The word at the top: of the runs that are shown, or of the connection where they may still go on.
function state() {
  const runs = selected(), open = runs.filter((run) => !run.progress?.finished);
  const done = runs.length > 0 && !open.length, ended = open.every((run) => run.progress?.done);
  const silent = Math.min(...open.map((run) => Date.now() / 1000 - (run.progress?.updated ?? 0)));
  const [text, kind] = done ? ['finished', ''] : !runs.length || !link ? ['connecting', '']
    : link === 'closed' || (link === 'lost' && ended) ? ['the server has ended', 'lost']
      : link === 'lost' ? ['reconnecting', 'lost']
        : silent > QUIET ? [`no record for ${duration(silent)}`, 'lost'] : ['live', 'live'];
  if (byId('connection').textContent !== text) byId('connection').textContent = text;
  byId('connection').className = `pill ${kind}`;
}

function connection(now) {
  link = now;
  state();
}

function complain(error) {
  const notice = byId('notice');
  notice.hidden = false;
  notice.textContent = error.message;
}

const store = new Store((run, kinds) => update(run, kinds), connection);
const selected = () => chosen.flatMap((id, tint) => (store.runs.has(id)
  ? [Object.assign(store.runs.get(id), { tint })] : []));
const primary = () => selected()[0];
const gallery = new Gallery(), evaluations = new Evaluations(), timeline = new Timeline(), config = new Config();
let sections;

const curves = throttle(150, () => { sections.update(); status(); });
const ofPrimary = (wait, show) => throttle(wait, () => { if (primary()) show(primary()); });
const status = ofPrimary(300, showCards);
// [kinds of news, what shows them], for the first of the selected runs
const PARTS = [
  [['event', 'cut'], ofPrimary(300, showEvents)],
  [['gallery', 'cut'], ofPrimary(300, (run) => gallery.update(run))],
  [['evaluations'], ofPrimary(1000, (run) => evaluations.update(run))],
  [['points'], ofPrimary(2000, (run) => timeline.update(run))],
  [[], ofPrimary(0, (run) => config.update(run))],
];

function update(run, kinds) {
  state();
  const any = (wanted) => kinds.has('all') || wanted.some((kind) => kinds.has(kind));
  if (any(['points', 'cut'])) curves();
  if (run !== primary()) return;
  status();
  for (const [wanted, show] of PARTS) if (any(wanted)) show();
}

async function choose(ids) {
  chosen = ids.slice(0, MOST_TOGETHER);
  history.replaceState(null, '', `?${chosen.map((id) => `run=${encodeURIComponent(id)}`).join('&')}${location.hash}`);
  byId('title').textContent = chosen.length > 1 ? `${chosen[0]} and ${chosen.length - 1} more` : chosen[0];
  document.title = `${chosen[0]} – rlproxi`;
  await store.select(chosen);
  showRuns();
  for (const run of selected()) update(run, new Set(['all']));
}

function showRuns() {
  const wanted = byId('runs-search').value.toLowerCase();
  byId('runs').hidden = listing.length < 2;
  byId('runs-count').textContent = `(${chosen.length} of ${listing.length})`;
  const focused = document.activeElement?.value;
  byId('runs-list').replaceChildren(...listing.filter((run) => run.id.toLowerCase().includes(wanted)).map((run) => {
    const at = chosen.indexOf(run.id);
    const box = el('input', { type: 'checkbox', value: run.id, checked: at >= 0, onchange: () => {
      const next = box.checked ? [...chosen, run.id] : chosen.filter((id) => id !== run.id);
      if (!next.length || next.length > MOST_TOGETHER) { box.checked = !box.checked; return; }
      choose(next).catch(complain);
    } });
    return el('label', { class: 'run' }, box, swatch(at >= 0 ? `var(--c${at})` : ''),
      `${run.id}${run.finished ? '' : ' (not finished)'}`);
  }));
  if (focused) byId('runs-list').querySelector(`input[value="${CSS.escape(focused)}"]`)?.focus();
}

async function list() {
  listing = await get('api/runs');
  showRuns();
}

async function documents() {
  const names = await get('api/documents');
  byId('documents-body').replaceChildren(names.length
    ? el('ul', {}, ...names.map((name) => el('li', {}, el('a', { href: `docs/${name}` }, `docs/${name}`))))
    : el('p', { class: 'faint' }, 'The folder docs/ of the project explains this page: docs/dashboard.md.'));
}

function controls() {
  const smoothing = byId('smoothing');
  smoothing.addEventListener('input', () => {
    settings.smoothing = Number(smoothing.value);
    byId('smoothing-value').textContent = settings.smoothing ? settings.smoothing.toFixed(2) : 'none';
    sections.update();
  });
  byId('range').addEventListener('change', (event) => { settings.range = event.target.value; sections.update(); });
  byId('runs-search').addEventListener('input', showRuns);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => { sections.update(); timeline.draw(); });
}

async function begin() {
  const [catalogue] = await Promise.all([get('api/catalogue'), list()]);
  sections = new Sections(byId('charts'), byId('parts'), catalogue, selected);
  controls();
  const asked = new URLSearchParams(location.search).getAll('run').filter((id) => listing.some((run) => run.id === id));
  const start = asked.length ? asked : listing.slice(0, 1).map((run) => run.id);
  if (!start.length) throw new Error('There is no run here yet.');
  await choose(start);
  documents().catch(() => {});
  setInterval(() => { state(); status(); }, 5000);
  setInterval(() => list().catch(() => {}), 30000);
}

begin().catch(complain);
