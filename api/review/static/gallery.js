// The gallery: cells by class, of which only those in sight are in the document, however many there are.

const TILE = 88, GAP = 10, HEADING = 36, AFTER = 14, OVERSCAN = 500;

export class Gallery {
  /**
   * @param {HTMLElement} scroller what scrolls
   * @param {HTMLElement} list the listbox within it
   * @param {(cell: object|null) => void} onCurrent told which cell has the focus
   */
  constructor(scroller, list, onCurrent) {
    Object.assign(this, { scroller, list, onCurrent });
    this.groups = [];
    this.flat = [];
    this.place = new Map();
    this.selected = new Set();
    this.current = null;
    this.anchor = null;
    this.nodes = new Map();
    this.columns = 1;
    this.frame = 0;
    scroller.addEventListener("scroll", () => this.soon(), { passive: true });
    new ResizeObserver(() => this.layout()).observe(scroller);
    list.addEventListener("click", (event) => this.click(event));
  }

  /** Shows these groups, each {name, cells}. What was selected stays so where it is still shown. */
  show(groups) {
    const before = this.place.get(this.current);
    this.groups = groups.filter((group) => group.cells.length);
    this.flat = this.groups.flatMap((group) => group.cells);
    this.place = new Map(this.flat.map((cell, number) => [cell.key, number]));
    for (const key of this.selected) if (!this.place.has(key)) this.selected.delete(key);
    if (!this.place.has(this.current)) {
      // The next one has moved up.
      const next = this.flat[Math.min(before ?? 0, this.flat.length - 1)];
      this.current = this.anchor = next ? next.key : null;
      if (next && !this.selected.size) this.selected.add(next.key);
    }
    if (!this.place.has(this.anchor)) this.anchor = this.current;
    this.layout();
    this.onCurrent(this.currentCell);
  }

  get currentCell() {
    return this.flat[this.place.get(this.current)] ?? null;
  }

  get selectedCells() {
    return [...this.selected].map((key) => this.flat[this.place.get(key)]);
  }

  /** Where each group and row lies. */
  layout() {
    const width = this.scroller.clientWidth - 24;
    this.columns = Math.max(1, Math.floor((width + GAP) / (TILE + GAP)));
    this.rows = [];
    let top = 12, first = 0;
    this.groups.forEach((group, number) => {
      group.top = top;
      group.first = first;
      top += HEADING;
      for (let start = 0; start < group.cells.length; start += this.columns) {
        this.rows.push({ top, group: number, start, end: Math.min(start + this.columns, group.cells.length) });
        top += TILE + GAP;
      }
      first += group.cells.length;
      top += AFTER;
    });
    this.list.style.height = `${top}px`;
    this.draw();
  }

  soon() {
    if (!this.frame) this.frame = requestAnimationFrame(() => { this.frame = 0; this.draw(); });
  }

  /** Brings the document to what is in sight; nodes that stay in sight stay the same. */
  draw() {
    const from = this.scroller.scrollTop - OVERSCAN, to = this.scroller.scrollTop + this.scroller.clientHeight + OVERSCAN;
    const wanted = new Map();
    for (let number = this.firstRow(from); number < this.rows.length && this.rows[number].top < to; number++) {
      const row = this.rows[number], group = this.groups[row.group];
      const holder = this.holder(group, wanted);
      for (let place = row.start; place < row.end; place++) {
        const cell = group.cells[place];
        const node = this.nodes.get(cell.key) ?? this.tile(cell);
        if (node.parentNode !== holder) holder.append(node);
        node.style.transform = `translate(${(place - row.start) * (TILE + GAP)}px, ${row.top - group.top}px)`;
        this.dress(node, cell, group.first + place);
        wanted.set(cell.key, node);
      }
    }
    for (const [key, node] of this.nodes) if (wanted.get(key) !== node) node.remove();
    this.nodes = wanted;
    const current = this.nodes.get(this.current);
    if (current) this.list.setAttribute("aria-activedescendant", current.id);
    else this.list.removeAttribute("aria-activedescendant");
  }

  firstRow(from) {
    let low = 0, high = this.rows.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.rows[middle].top + TILE < from) low = middle + 1; else high = middle;
    }
    return low;
  }

  holder(group, wanted) {
    const key = `class ${group.name}`;
    let node = wanted.get(key) ?? this.nodes.get(key);
    if (!node) {
      node = document.createElement("div");
      node.setAttribute("role", "group");
      const heading = document.createElement("div");
      heading.className = "heading";
      heading.setAttribute("aria-hidden", "true");
      heading.append(document.createTextNode(group.name), document.createElement("span"));
      heading.lastChild.className = "count";
      node.append(heading);
      this.list.append(node);
    }
    node.style.transform = `translateY(${group.top}px)`;
    node.firstChild.lastChild.textContent = String(group.cells.length);
    node.setAttribute("aria-label", `${group.name}, ${group.cells.length} cells`);
    wanted.set(key, node);
    return node;
  }

  tile(cell) {
    const node = document.createElement("div");
    node.className = "cell";
    node.id = `cell-${cell.image}-${cell.cell}`;
    node.dataset.key = cell.key;
    node.setAttribute("role", "option");
    node.style.width = node.style.height = `${TILE}px`;
    const image = document.createElement("img");
    image.alt = "";
    image.decoding = "async";
    image.draggable = false;
    image.src = `api/images/${cell.image}/cells/${cell.cell}`;
    node.append(image);
    for (const name of ["score", "mark", "odd"]) {
      const badge = document.createElement("span");
      badge.className = name;
      badge.setAttribute("aria-hidden", "true");
      node.append(badge);
    }
    return node;
  }

  dress(node, cell, place) {
    const [, score, mark, odd] = node.children;
    score.textContent = cell.drawn ? "drawn" : `${Math.round(100 * cell.score)}`;
    mark.textContent = cell.lookedAt ? "✓" : "";
    mark.hidden = !cell.lookedAt;
    odd.textContent = "odd";
    odd.hidden = !cell.odd;
    node.classList.toggle("deleted", !cell.present);
    node.classList.toggle("current", cell.key === this.current);
    node.setAttribute("aria-selected", String(this.selected.has(cell.key)));
    node.setAttribute("aria-posinset", String(place + 1));
    node.setAttribute("aria-setsize", String(this.flat.length));
    node.setAttribute("aria-label", [
      cell.label,
      cell.drawn ? "drawn" : `score ${Math.round(100 * cell.score)} per cent`,
      cell.odd ? "odd" : "",
      cell.present ? "" : "deleted",
      cell.lookedAt ? "looked at" : "not looked at",
    ].filter(Boolean).join(", "));
  }

  click(event) {
    const node = event.target.closest(".cell");
    if (!node) return;
    this.go(this.place.get(node.dataset.key), { extend: event.shiftKey, toggle: event.ctrlKey || event.metaKey });
  }

  /** Gives the focus to the cell at a place, and selects it. */
  go(place, { extend = false, toggle = false } = {}) {
    const cell = this.flat[Math.max(0, Math.min(place, this.flat.length - 1))];
    if (!cell) return;
    this.current = cell.key;
    if (extend) {
      const [from, to] = [this.place.get(this.anchor), this.place.get(cell.key)].sort((a, b) => a - b);
      this.selected = new Set(this.flat.slice(from, to + 1).map((each) => each.key));
    } else {
      this.anchor = cell.key;
      if (!toggle) this.selected = new Set([cell.key]);
      else if (!this.selected.delete(cell.key)) this.selected.add(cell.key);
    }
    this.reveal();
    this.draw();
    this.onCurrent(cell);
  }

  /** The cell that comes after what is selected, in its class where there is one: with it work goes on. */
  afterSelection() {
    const places = [...this.selected].map((key) => this.place.get(key));
    const last = Math.max(...places), group = this.groups.find((each) => last < each.first + each.cells.length);
    const end = group.first + group.cells.length;
    const free = (place) => !this.selected.has(this.flat[place].key);
    for (let place = last + 1; place < end; place++) if (free(place)) return this.flat[place].key;
    for (let place = last; place >= group.first; place--) if (free(place)) return this.flat[place].key;
    return this.flat[end]?.key ?? null;
  }

  /** Goes to a cell wherever it is shown; false where it is not. */
  goTo(key) {
    if (!this.place.has(key)) return false;
    this.go(this.place.get(key));
    return true;
  }

  goToGroup(name) {
    const group = this.groups.find((each) => each.name === name);
    if (!group) return false;
    this.go(group.first);
    this.scroller.scrollTop = group.top - 12;
    return true;
  }

  selectGroup() {
    const place = this.place.get(this.current);
    const group = this.groups.findLast((each) => each.first <= place);
    if (group) this.selected = new Set(group.cells.map((cell) => cell.key));
    this.draw();
    this.onCurrent(this.currentCell);
  }

  toggleCurrent() {
    this.go(this.place.get(this.current), { toggle: true });
  }

  selectCurrent() {
    this.go(this.place.get(this.current));
  }

  /** The place above or below, in the column that is seen. */
  vertical(step, extend) {
    const place = this.place.get(this.current);
    const at = this.rows.findIndex((row) => place < this.groups[row.group].first + row.end);
    const row = this.rows[at], next = this.rows[Math.max(0, Math.min(at + step, this.rows.length - 1))];
    if (!row || next === row) return;
    const column = place - this.groups[row.group].first - row.start;
    this.go(this.groups[next.group].first + Math.min(next.start + column, next.end - 1), { extend });
  }

  page(direction, extend) {
    this.vertical(direction * Math.max(1, Math.floor(this.scroller.clientHeight / (TILE + GAP)) - 1), extend);
  }

  step(by, extend) {
    this.go((this.place.get(this.current) ?? 0) + by, { extend });
  }

  reveal() {
    const place = this.place.get(this.current);
    const row = this.rows.find((each) => place < this.groups[each.group].first + each.end);
    if (!row) return;
    const low = row.start === 0 ? row.top - HEADING - 12 : row.top - GAP, high = row.top + TILE + GAP;
    if (low < this.scroller.scrollTop) this.scroller.scrollTop = low;
    else if (high > this.scroller.scrollTop + this.scroller.clientHeight) {
      this.scroller.scrollTop = high - this.scroller.clientHeight;
    }
  }
}
