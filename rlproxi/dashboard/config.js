// The config as it was resolved, line by line with its full key, to be searched.

import { byId, el, get, runPath } from './dom.js';

export class Config {
  constructor() {
    this.search = el('input', { type: 'search', maxlength: '100', autocomplete: 'off', oninput: () => this.show() });
    this.text = el('pre', { tabindex: '0', 'aria-label': 'Config' });
    this.count = el('span', { class: 'faint', role: 'status' });
    byId('config-body').append(el('label', { class: 'field' }, 'Find a key or a value', this.search), this.count,
      this.text);
    this.lines = [];
  }

  async update(run) {
    if (this.run === run.id) return;
    this.run = run.id;
    try {
      const { text, headline_steps: steps } = await get(runPath(run.id, '/config'));
      if (this.run !== run.id) return;
      this.lines = text.split('\n').filter((line) => line.trim());
      run.headline_steps = steps;
    } catch (error) {
      this.lines = [`# ${error.message}`];
    }
    this.show();
  }

  // [{key: 'grpo.lr', text: the line}], the key from the indentation.
  keyed() {
    const path = [];
    return this.lines.map((line) => {
      const indent = line.search(/\S/), found = /^\s*(?:- )?([\w.-]+):/.exec(line);
      while (path.length && path[path.length - 1].indent >= indent) path.pop();
      if (found) path.push({ indent, name: found[1] });
      return { key: path.map((part) => part.name).join('.'), text: line };
    });
  }

  show() {
    const wanted = this.search.value.trim().toLowerCase();
    const found = this.keyed().filter(({ key, text }) => !wanted || key.toLowerCase().includes(wanted)
      || text.toLowerCase().includes(wanted));
    this.text.textContent = (wanted ? found.map(({ key, text }) =>
      `${key}: ${text.replace(/^\s*(- )?[\w.-]+:\s*/, '').trim()}`) : this.lines).join('\n')
      || 'There is no config.yaml.';
    this.count.textContent = wanted ? `${found.length} of ${this.lines.length} lines` : '';
  }
}
