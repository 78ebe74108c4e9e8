// What lies around a cell, at three zooms, and drawing one that was missed.

// Sides of the part that is shown, in sides of the cell; the last zoom is the whole field.
const ZOOMS = [2.5, 8, null];
// The whole of a slide is no view: pixels along a side at most.
const LARGEST_FIELD = 4096;
const LONGEST = 1024, MOST_BOXES = 600;

export class Context {
  /**
   * @param {HTMLElement} view holds the image and the boxes
   * @param {(key: string) => void} onChoose told which cell's box was clicked
   * @param {(text: string) => void} onHint told what to do while drawing
   */
  constructor(view, onChoose, onHint) {
    this.view = view;
    this.image = view.querySelector("img");
    this.boxes = view.querySelector("#boxes");
    this.onChoose = onChoose;
    this.onHint = onHint;
    this.zoom = 1;
    this.neighbours = true;
    this.cell = this.part = this.fresh = null;
    this.isDrawing = false;
    view.addEventListener("pointerdown", (event) => this.press(event));
    view.addEventListener("pointermove", (event) => this.drag(event));
    view.addEventListener("pointerup", () => { this.from = null; });
    this.image.addEventListener("error", () => this.onHint("This image cannot be shown: it is not where it was, or another one."));
  }

  /** Shows a cell of a file {name, width, height}; `all` are the cells of its image. */
  show(cell, file, all) {
    if (this.isDrawing && cell?.image !== this.cell?.image) this.stopDrawing();
    Object.assign(this, { cell, file, all });
    if (!cell) {
      this.image.removeAttribute("src");
      this.boxes.replaceChildren();
      return;
    }
    if (!this.isDrawing) this.part = this.partAt(this.zoom);
    const [left, top, right, bottom] = this.part;
    const longest = Math.min(LONGEST, Math.ceil(this.view.clientWidth * (window.devicePixelRatio || 1)) || 640);
    const source = `api/images/${cell.image}/view?left=${left}&top=${top}&right=${right}&bottom=${bottom}&longest=${longest}`;
    if (this.image.getAttribute("src") !== source) this.image.src = source;
    this.image.style.aspectRatio = `${right - left} / ${bottom - top}`;
    this.view.setAttribute("aria-label", `Context of ${cell.label} in ${file.name}`);
    this.drawBoxes();
  }

  partAt(zoom) {
    const [left, top, right, bottom] = this.cell.box, { width, height } = this.file;
    const side = ZOOMS[zoom] === null
      ? Math.min(Math.max(width, height), LARGEST_FIELD)
      : Math.max(16, Math.ceil(Math.max(right - left, bottom - top) * ZOOMS[zoom]));
    // The whole of it where it fits; moved into the image where it would reach out.
    const [w, h] = [Math.min(side, width), Math.min(side, height)];
    const x = Math.max(0, Math.min(Math.round((left + right - w) / 2), width - w));
    const y = Math.max(0, Math.min(Math.round((top + bottom - h) / 2), height - h));
    return [x, y, x + w, y + h];
  }

  setZoom(zoom) {
    this.zoom = Math.max(0, Math.min(zoom, ZOOMS.length - 1));
    if (this.cell) {
      this.part = this.partAt(this.zoom);
      this.show(this.cell, this.file, this.all);
    }
  }

  drawBoxes() {
    const [left, top, right, bottom] = this.part, nodes = [];
    if (this.neighbours) {
      for (const other of this.all) {
        const [l, t, r, b] = other.box;
        if (other === this.cell || !other.present || r < left || l > right || b < top || t > bottom) continue;
        const node = this.boxNode(other.box, "box");
        node.title = other.label;
        node.dataset.key = other.key;
        nodes.push(node);
        if (nodes.length === MOST_BOXES) break;
      }
    }
    nodes.push(this.boxNode(this.cell.box, "box current"));
    if (this.fresh) nodes.push(this.boxNode(this.fresh, "box fresh"));
    this.boxes.replaceChildren(...nodes);
  }

  boxNode([l, t, r, b], name) {
    const [left, top, right, bottom] = this.part, node = document.createElement("div");
    node.className = name;
    node.style.left = `${100 * (l - left) / (right - left)}%`;
    node.style.top = `${100 * (t - top) / (bottom - top)}%`;
    node.style.width = `${100 * (r - l) / (right - left)}%`;
    node.style.height = `${100 * (b - t) / (bottom - top)}%`;
    return node;
  }

  startDrawing() {
    const [left, top, right, bottom] = this.part;
    const [l, t, r, b] = this.cell.box;
    // As large as the cell at hand, in the middle of the view.
    const [w, h] = [Math.min(r - l, (right - left) / 2), Math.min(b - t, (bottom - top) / 2)];
    const [x, y] = [(left + right) / 2, (top + bottom) / 2];
    this.fresh = [x - w / 2, y - h / 2, x + w / 2, y + h / 2];
    this.isDrawing = true;
    this.view.classList.add("drawing");
    this.view.focus();
    this.onHint("Drag a box around the missed cell, or move it with the arrows and size it with Shift and arrows. Then press the "
      + "key of its class, or click the key in the list. Esc leaves it.");
    this.drawBoxes();
  }

  stopDrawing() {
    this.isDrawing = false;
    this.fresh = this.from = null;
    this.view.classList.remove("drawing");
    this.onHint("");
    if (this.cell) this.drawBoxes();
  }

  /** Moves or sizes the box that is being drawn; whether the key was one for that. */
  key(event) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!way) return false;
    const step = Math.max(1, (this.part[2] - this.part[0]) / 100), [dx, dy] = way.map((value) => value * step);
    let [l, t, r, b] = this.fresh;
    if (event.shiftKey) [r, b] = [Math.max(l + 2, r + dx), Math.max(t + 2, b + dy)];
    else [l, t, r, b] = [l + dx, t + dy, r + dx, b + dy];
    this.fresh = [l, t, r, b];
    this.drawBoxes();
    return true;
  }

  pointAt(event) {
    const frame = this.image.getBoundingClientRect(), [left, top, right, bottom] = this.part;
    const x = left + (right - left) * (event.clientX - frame.left) / frame.width;
    const y = top + (bottom - top) * (event.clientY - frame.top) / frame.height;
    return [Math.max(left, Math.min(x, right)), Math.max(top, Math.min(y, bottom))];
  }

  press(event) {
    if (!this.cell) return;
    if (this.isDrawing) {
      this.from = this.pointAt(event);
      this.view.setPointerCapture(event.pointerId);
      event.preventDefault();
      this.view.focus();
    } else if (event.target.dataset.key) this.onChoose(event.target.dataset.key);
  }

  drag(event) {
    if (!this.isDrawing || !this.from) return;
    const [x, y] = this.pointAt(event), [x0, y0] = this.from;
    this.fresh = [Math.min(x, x0), Math.min(y, y0), Math.max(x, x0), Math.max(y, y0)];
    this.drawBoxes();
  }
}
