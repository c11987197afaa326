// The state of the run: cards at the top, warnings and alarms below.

import { byId, duration, el, number, whole, withUnit } from './dom.js';

const time = (seconds) => new Date(seconds * 1000).toLocaleString([], { dateStyle: 'short', timeStyle: 'medium' });

function card(label, value, note = '', bad = false) {
  return el('div', { class: bad ? 'card bad' : 'card' }, label, el('b', {}, value),
    el('span', { class: 'faint' }, note));
}

// Why the newest score is missing: the newest warning about a score, of an evaluation or of training.
function withoutScore(run, stage) {
  const found = (run.events.warning || []).filter(({ message }) => /no score|missing|NaN/.test(message)
    && message.startsWith('evaluation:') === stage.startsWith('evaluation@'));
  return found.at(-1)?.message.replace(/^evaluation: /, '') ?? 'the log gives no reason';
}

export function showCards(run) {
  const { progress: p, counts, events, headline } = run;
  const share = p.total ? ` of ${whole(p.total)}` : '';
  const silent = p.updated ? Date.now() / 1000 - p.updated : null;
  const restarts = events.resume.filter((record) => record.restart).length;
  const cards = [
    p.finished ? card('Stage', 'finished', `the last stage was ${p.stage}`)
      : card('Stage', p.stage || 'not begun', p.done ? 'done' : p.step === null ? 'no step logged yet'
        : `step ${whole(p.step)}${share}`),
    ...(p.finished ? [] : [card('Time left', duration(p.eta), p.eta !== null ? 'to the end of this stage'
      : p.done ? 'the stage is done' : 'no pace known')]),
    ...(p.seconds_per_step === null ? [] : [card('A step', duration(p.seconds_per_step), 'over the last steps')]),
  ];
  const rate = run.newest('rl', 'images_per_second') ?? run.newest('pretrain', 'images_per_second');
  const perGpu = run.newest('rl', 'images_per_second/gpu');
  cards.push(card('Images a second', number(rate, 3), perGpu === null ? '' : `${number(perGpu, 3)} for each GPU`));
  const reward = (label, stage, name) => {
    const value = run.newest(stage, name), known = value !== null && value !== undefined;
    cards.push(known ? card(label, number(value), `began at ${number(run.curve(stage, name).y[0])}`)
      : card(label, 'no score', withoutScore(run, stage), true));
  };
  if (run.curve('rl', 'reward/mean')) reward('Training reward', 'rl', 'reward/mean');
  for (const name of run.judges(headline)) reward(`Held-out ${name.slice(8)}`, `evaluation@${headline}`, name);
  for (const role of ['rollout', 'reward', 'learner']) {
    const idle = run.newest('rl', `idle/${role}`);
    if (idle !== null) cards.push(card(`Idle, ${role}`, withUnit(idle, 'share'), 'of the last step'));
  }
  const own = run.newest('rl', 'restarts');
  cards.push(card('Restarts', number(own ?? restarts), own === null ? 'of stages'
    : `of roles; stages went on ${restarts} times`, (own ?? restarts) > 0));
  const [dropped, lost] = ['groups/masked', 'samples/masked'].map((name) => run.newest('rl', name));
  if (dropped !== null || lost !== null) {
    const missing = `${number(lost ?? 0)} samples without a score`;
    cards.push(card('Dropped, last step', `${number(dropped ?? 0)} groups`, missing, dropped > 0 || lost > 0));
  }
  cards.push(card('Alarms', number(counts.alarm || 0), `${counts.warning || 0} warnings`, Boolean(counts.alarm)));
  cards.push(card('Last record', silent === null ? '–' : silent < 3 ? 'now' : `${duration(silent)} ago`,
    p.updated ? time(p.updated) : ''));
  byId('cards').replaceChildren(...cards);
  showNotice(run);
}

function showNotice(run) {
  const parts = [], alarm = run.events.alarm.at(-1);
  if (alarm) parts.push(`Alarm at iteration ${alarm.step}: ${alarm.message}`);
  const read = Math.floor(run.read * 100);
  if (!run.exact) parts.push(`The log is large: what you see is a sample of it, ${read} % is read.`);
  if (run.malformed) parts.push(`${run.malformed} lines of the log are not readable and left out.`);
  if (run.refused) parts.push('The log holds more curves than this page keeps; some are left out.');
  const notice = byId('notice'), text = parts.join(' ');
  notice.hidden = !text;
  notice.classList.toggle('alarm', Boolean(alarm));
  if (notice.textContent !== text) notice.textContent = text; // a screen reader reads it only when it changes
}

export function showEvents(run) {
  const words = {
    alarm: (r) => r.message, warning: (r) => r.message, note: (r) => r.message,
    best: (r) => `iteration ${r.step}: held-out ${number(r.heldout)}, saved as models/best`,
    resume: (r) => (r.restart ? `${r.stage} went on from step ${r.step}` : `${r.stage} began at step ${r.step}`),
    stage: (r) => `${r.name} ${r.status === 'done' ? `done in ${duration(r.seconds)}` : 'begins'}`,
    reward: (r) => `${r.name} is scored by ${r.scorer}${r.class ? ` (${r.class})` : ''}`,
  };
  const all = Object.entries(words).flatMap(([kind, say]) =>
    (run.events[kind] || []).map((record) => [kind, record, say(record)]));
  all.sort((a, b) => (b[1].time || 0) - (a[1].time || 0));
  const loud = all.filter(([kind]) => kind === 'alarm' || kind === 'warning');
  const list = (entries) => el('ul', { class: 'list', tabindex: '0', 'aria-label': 'Events, newest first' },
    ...entries.slice(0, 300).map(([kind, record, text]) => el('li', { class: kind },
    el('span', { class: 'faint' }, record.time ? `${time(record.time)} ` : ''), el('b', {}, `${kind}: `), text)));
  const open = byId('events-body').querySelector('details')?.open;
  byId('events-body').replaceChildren(
    loud.length ? list(loud) : el('p', {}, 'No warnings, no alarms.'),
    el('details', { open: Boolean(open) }, el('summary', {}, `All that happened (${all.length})`), list(all)));
}
