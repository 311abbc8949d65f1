"use strict";

const STRIDE = 10; // tokens that the up and down keys move by

class Viewer {
  constructor(content, kept) {
    Object.assign(this, { content, kept });
    this.marked = new Set(content.marked.flatMap(([start, end]) =>
      Array.from({ length: end - start }, (_, i) => start + i)));
    this.every = [...content.tokens.keys()];
    this.state = { side: content.sides.at(-1), point: content.points[0], layer: null, head: null };
    this.current = content.marked.length ? content.marked[0][0] : 0;
    this.makeHeader();
    this.makeControls();
    this.makeHeads();
    this.makeText();
    this.render();
  }

  // What stays the same.

  makeHeader() {
    const { about, question, expected, missing } = this.content;
    about.forEach(([name, value], place) => {
      if (place) get("about").append(" · ");
      get("about").append(make("span", name, { className: "name" }), ` ${value}`);
    });
    get("question").textContent = question || "Plain text: nothing is asked.";
    if (expected.length) get("question").append(" ", make("span", `Expected: ${expected.join(", ")}`, { className: "hint" }));
    missing.forEach((line) => get("missing").append(make("li", line)));
    get("needle").hidden = !this.marked.size;
  }

  makeControls() {
    const { sides, points, heads, numbers } = this.content;
    const compared = sides.length > 1 ? [...sides, "difference"] : sides;
    this.radios(get("side"), "side", compared, (side) => side, this.state.side, (side) => { this.state.side = side; });
    const presses = [...new Set(points.map((point) => point.press))];
    presses.forEach((press) => get("press").append(make("option", press, { value: press })));
    get("press").onchange = () => this.choosePress(get("press").value);
    for (const [id, names] of [["layer", numbers], ["head", [...Array(heads).keys()]]]) {
      get(id).append(make("option", "all", { value: "" }));
      names.forEach((name, i) => get(id).append(make("option", String(name), { value: String(i) })));
      get(id).onchange = () => this.choose(id, get(id).value === "" ? null : Number(get(id).value));
    }
    const measures = [...(this.marked.size ? ["answer"] : []), ...(this.kept.masses ? ["attention"] : []), "tokens"];
    const names = { answer: "the answer's tokens", attention: "the teacher's attention", tokens: "all tokens" };
    measures.forEach((name) => get("measure").append(make("option", names[name], { value: name })));
    get("measure").onchange = () => this.renderHeads();
    get("needle").onclick = () => this.nextMarked(0);
    get("controls").onsubmit = (event) => event.preventDefault();
    new ResizeObserver(() => { // the map stays below the switches, however many lines they take
      document.documentElement.style.setProperty("--controls", `${get("controls").offsetHeight}px`);
    }).observe(get("controls"));
    this.ratios();
  }

  radios(fieldset, name, values, label, chosen, choose) {
    fieldset.querySelectorAll("label").forEach((old) => old.remove());
    for (const value of values) {
      const input = make("input", "", { type: "radio", name, value: String(value), checked: value === chosen });
      input.onchange = () => { choose(value); this.render(); };
      const around = make("label");
      around.append(input, label(value));
      fieldset.append(around);
    }
  }

  ratios() {
    const own = this.content.points.filter((point) => point.press === this.state.point.press);
    this.radios(get("ratio"), "ratio", own.map((point) => point.ratio), percent, this.state.point.ratio, (ratio) => {
      this.state.point = own.find((point) => point.ratio === ratio);
    });
  }

  makeHeads() {
    const { layers, heads, numbers } = this.content;
    this.cells = [];
    const body = get("heads").appendChild(make("tbody"));
    for (let head = 0; head < heads; head++) {
      const row = body.appendChild(make("tr"));
      row.append(make("th", `head ${head}`, { scope: "row" }));
      for (let layer = 0; layer < layers; layer++) {
        const button = make("button", "", { type: "button", tabIndex: this.cells.length ? -1 : 0 });
        button.onclick = () => this.pickCell(layer, head);
        row.appendChild(make("td")).append(button);
        this.cells[layer * heads + head] = button;
      }
    }
    const foot = get("heads").appendChild(make("tfoot")).appendChild(make("tr"));
    foot.append(make("th", "layer", { scope: "row" }));
    for (let layer = 0; layer < layers; layer++) foot.append(make("td", layers > 12 && layer % 5 ? "" : String(numbers[layer])));
    get("heads").onkeydown = (event) => this.moveCell(event);
  }

  makeText() {
    const inside = document.createDocumentFragment();
    let line = null, mark = null;
    this.spans = this.content.tokens.map((text, token) => {
      if (!line) { line = inside.appendChild(make("div", "", { className: "line" })); mark = null; }
      const span = make("span", text, { tabIndex: token === this.current ? 0 : -1 });
      span.dataset.token = token;
      if (!text) span.classList.add("part");
      if (/^\s*\n\s*$/.test(text)) span.classList.add("end");
      if (!this.marked.has(token)) mark = null;
      else mark ??= line.appendChild(make("mark"));
      (mark ?? line).append(span);
      if (text.endsWith("\n")) line = null;
      return span;
    });
    const text = get("text");
    text.append(inside);
    const tokenOf = (event) => event.target.closest?.("[data-token]")?.dataset.token;
    text.onpointerover = (event) => { const token = tokenOf(event); if (token) this.describe(Number(token)); };
    text.onpointerleave = () => this.describe(this.current);
    text.onclick = (event) => { const token = tokenOf(event); if (token) this.move(Number(token)); };
    text.onfocus = () => this.move(this.current);
    text.addEventListener("focusin", (event) => { const token = tokenOf(event); if (token) this.describe(Number(token)); });
    text.onkeydown = (event) => this.key(event);
  }

  // What a user does.

  choosePress(press) {
    const own = this.content.points.filter((point) => point.press === press);
    const distance = (point) => Math.abs(point.ratio - this.state.point.ratio);
    this.state.point = own.reduce((best, point) => (distance(point) < distance(best) ? point : best));
    this.ratios();
    this.render();
  }

  choose(name, value) {
    this.state[name] = value;
    get(name).value = value === null ? "" : String(value);
    this.render();
  }

  pickCell(layer, head) {
    const again = this.state.layer === layer && this.state.head === head;
    this.state.layer = again ? null : layer;
    this.choose("head", again ? null : head);
    get("layer").value = again ? "" : String(layer);
    this.focusCell(layer * this.content.heads + head);
  }

  moveCell(event) {
    const at = this.cells.indexOf(event.target), { heads, layers } = this.content;
    const steps = { ArrowRight: heads, ArrowLeft: -heads, ArrowDown: 1, ArrowUp: -1 };
    if (at < 0 || !(event.key in steps)) return;
    event.preventDefault();
    const to = at + steps[event.key], acrossHeads = Math.abs(steps[event.key]) === 1 && heads > 1;
    if (to < 0 || to >= heads * layers) return;
    if (!acrossHeads || Math.floor(to / heads) === Math.floor(at / heads)) this.focusCell(to);
  }

  focusCell(index) {
    this.cells.forEach((cell, place) => { cell.tabIndex = place === index ? 0 : -1; });
    this.cells[index].focus();
  }

  key(event) {
    const last = this.spans.length - 1;
    const targets = {
      ArrowRight: this.current + 1, ArrowLeft: this.current - 1, ArrowDown: this.current + STRIDE,
      ArrowUp: this.current - STRIDE, Home: 0, End: last,
    };
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key.toLowerCase() === "n" && this.marked.size) this.nextMarked(this.current + 1);
    else if (event.key in targets) this.move(Math.min(last, Math.max(0, targets[event.key])));
    else return;
    event.preventDefault();
  }

  nextMarked(from) {
    const starts = this.content.marked.map(([start]) => start);
    this.move(starts.find((start) => start >= from) ?? starts[0], true);
  }

  move(token, centred = false) {
    this.spans[this.current].tabIndex = -1;
    this.current = token;
    this.spans[token].tabIndex = 0;
    this.spans[token].focus({ preventScroll: true });
    this.spans[token].scrollIntoView({ block: centred ? "center" : "nearest" });
    this.describe(token);
  }

  // What changes with the switches.

  get shownSides() {
    return this.state.side === "difference" ? this.content.sides : [this.state.side];
  }

  render() {
    const { layer, head, point } = this.state;
    this.chosen = this.kept.chosen(layer, head);
    this.counts = {};
    for (const side of this.content.sides)
      if (side in point.kept) this.counts[side] = this.kept.counts(point.kept[side], this.chosen);
    this.mass = this.kept.masses ? this.kept.mass(this.chosen) : null;
    this.ranks = this.mass ? ranks(this.mass) : null;
    const shares = this.spans.map((_, token) => this.share(token));
    this.spans.forEach((span, token) => shade(span, shares[token]));
    this.most = this.scaled(get("text"), shares);
    this.renderAnswers();
    this.renderSummary();
    this.renderHeads();
    this.describe(this.current);
  }

  /** Of a token: the share of the chosen heads that keep it; in the difference, trained minus base. */
  share(token) {
    const of = (side) => (this.counts[side] ? this.counts[side][token] / this.chosen.length : 0);
    const compared = this.shownSides.every((side) => this.counts[side]);
    if (!compared) return 0;
    return this.state.side === "difference" ? of("trained") - of("base") : of(this.state.side);
  }

  /** A difference is drawn in full colour where it is largest; shares are drawn as they are. Returns the largest. */
  scaled(element, shares) {
    const most = shares.reduce((largest, share) => Math.max(largest, Math.abs(share)), 0);
    element.style.setProperty("--scale", this.state.side === "difference" && most ? 1 / most : 1);
    return most;
  }

  renderAnswers() {
    const { content, state } = this, [head, body] = get("answers").children;
    head.replaceChildren(make("tr"));
    ["Removed", "Pairs kept", ...content.sides].forEach((name) => head.firstChild.append(make("th", name, { scope: "col" })));
    body.replaceChildren();
    const own = content.points.filter((point) => point.press === state.point.press);
    for (const point of [content.full, ...own]) {
      const row = body.appendChild(make("tr")), chosen = point === state.point;
      row.append(make("th", point === content.full ? "nothing: full cache" : `${percent(point.ratio)}, ${point.press}`, { scope: "row" }));
      if (chosen) row.setAttribute("aria-current", "true");
      const pairs = row.appendChild(make("td", point.pairs === null ? "–" : number(point.pairs)));
      pairs.dataset.name = "pairs";
      for (const side of content.sides) {
        const cell = row.appendChild(make("td")), answer = point.answers[side];
        cell.dataset.name = side;
        if (!answer) { cell.textContent = "–"; continue; }
        if (answer.right !== null)
          cell.append(make("span", answer.right ? "✓ right " : "✗ wrong ", { className: answer.right ? "right" : "wrong" }));
        cell.append(answer.text || "(empty)");
      }
    }
  }

  renderSummary() {
    const { content, state, chosen } = this;
    const where = state.layer === null && state.head === null ? "all layers and heads" :
      `layer ${content.numbers[state.layer] ?? "all"}, head ${state.head ?? "all"}`;
    const mean = (measure, side) => chosen.reduce((sum, index) => sum + this.headShare(measure, side, index), 0) / chosen.length;
    const parts = content.sides.map((side) => {
      if (!this.counts[side]) return `${side}: unknown`;
      const shares = [];
      if (this.marked.size) shares.push(`${percent(mean("answer", side))} of the answer's tokens`);
      if (this.kept.masses) shares.push(`${percent(mean("attention", side))} of the teacher's attention`);
      return `${side} keeps ${[...shares, `${percent(mean("tokens", side))} of all tokens`].join(", ")}`;
    });
    get("summary").textContent = `${state.point.press}, ${percent(state.point.ratio)} removed, ${where}: ${parts.join("; ")}.`;
    const difference = state.side === "difference";
    const most = Math.round(this.most * chosen.length), heads = most === 1 ? "head" : "heads";
    get("low").textContent = difference ? `base keeps it in ${most} ${heads} more` : "kept by no head";
    get("high").textContent = difference ? `trained in ${most} ${heads} more` : `by all ${chosen.length}`;
    get("scale").className = difference ? "difference" : "";
  }

  headShare(measure, side, index) {
    const set = this.state.point.kept[side];
    if (set === undefined) return 0;
    if (measure === "attention") return this.kept.shareOfMass(set, index);
    return this.kept.shareOfTokens(set, index, measure === "answer" ? [...this.marked] : this.every);
  }

  renderHeads() {
    const measure = get("measure").value, { heads, numbers } = this.content, { side, layer, head } = this.state;
    const drawn = this.cells.map((cell, index) => {
      const shares = this.shownSides.map((one) => this.headShare(measure, one, index));
      const own = [Math.floor(index / heads), index % heads];
      const shown = side === "difference" ? shares[1] - shares[0] : shares[0];
      shade(cell, shown);
      const label = `layer ${numbers[own[0]]}, head ${own[1]}: ${shares.map(percent).join(" against ")}`;
      cell.setAttribute("aria-label", label);
      cell.title = label;
      cell.setAttribute("aria-pressed", String(layer === own[0] && head === own[1]));
      return shown;
    });
    this.scaled(get("heads"), drawn);
  }

  describe(token) {
    const { tokens } = this.content, heads = this.chosen.length;
    const kept = this.content.sides.filter((side) => this.counts[side])
      .map((side) => `${this.counts[side][token]} of ${heads} heads (${side})`);
    const lines = [`Token ${token + 1} of ${tokens.length}, ${JSON.stringify(tokens[token])}`];
    if (kept.length) lines.push(`kept by ${kept.join(", ")}`);
    if (this.mass)
      lines.push(`teacher's attention ${number(this.mass[token])}, rank ${this.ranks[token]} of ${tokens.length}`);
    get("token").textContent = lines.join(" · ");
  }
}

const content = JSON.parse(get("data").textContent);
Kept.of(content).then((kept) => { window.viewer = new Viewer(content, kept); }, (error) => {
  get("summary").textContent = `The data of this page cannot be read: ${error}`;
});
