// The resolved config, whose lines can be searched by their full key.

import { byId, el, field, get, runPath } from './dom.js';

export class Config {
  constructor() {
    this.search = el('input', { type: 'search', maxlength: '100', autocomplete: 'off', oninput: () => this.show() });
    this.text = el('pre', { tabindex: '0', 'aria-label': 'Config' });
    this.count = el('span', { class: 'faint', role: 'status' });
    byId('config-body').append(field('Find a key or a value', this.search), this.count, this.text);
    this.lines = [];
  }

  async update(run) {
    if (this.run === run.id) return;
    this.run = run.id;
    const text = await get(runPath(run.id, '/config')).then((answer) => answer.text, (error) => `# ${error.message}`);
    if (this.run !== run.id) return;
    this.lines = text.split('\n').filter((line) => line.trim());
    this.show();
  }

  // [{key: 'rl.lr', text: the line}], the key from the indentation.
  keyed() {
    const path = [];
    return this.lines.map((line) => {
      const indent = line.search(/\S/), found = /^\s*(?:- )?([\w.-]+):/.exec(line);
      while (path.length && path.at(-1).indent >= indent) path.pop();
      if (found) path.push({ indent, name: found[1] });
      return { key: path.map((part) => part.name).join('.'), text: line };
    });
  }

  show() {
    const wanted = this.search.value.trim().toLowerCase();
    const found = this.keyed().filter(({ key, text }) => `${key}\n${text}`.toLowerCase().includes(wanted))
      .map(({ key, text }) => `${key}: ${text.replace(/^\s*(- )?[\w.-]+:\s*/, '').trim()}`);
    this.text.textContent = (wanted ? found : this.lines).join('\n') || 'There is no config.yaml.';
    this.count.textContent = wanted ? `${found.length} of ${this.lines.length} lines` : '';
  }
}
