// The page of a review: what is shown, what keys and buttons do, and what the server says of it.
// Whatever comes from files or from people is set as text, never as markup.

import { Gallery } from "./gallery.js";
import { Context } from "./context.js";

const POLL = 1500, SHOWN_MESSAGE = 5000;
const find = (id) => document.getElementById(id);
const cells = new Map(), images = new Map();
let sample = 0, revision = 0, classes = [], signatures = [], status = "", work = Promise.resolve(), messageTimer = 0;

const gallery = new Gallery(find("scroller"), find("gallery"), showCell);
const context = new Context(find("view"), (key) => gallery.goTo(key) || say("This cell is not among those shown."), showHint);

// --- The server -----------------------------------------------------------------------------------------------------------

async function ask(path, body, method = "POST") {
  const options = body ? { method, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : {};
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Start `unihema review` again; what was confirmed is stored.");
  }
  const values = await answer.json();
  if (answer.ok) return values;
  if (values.cells) values.cells.forEach(takeCell);
  throw new Error(values.error ?? `The server answered ${answer.status}.`);
}

/** Does one thing after another: a key that is pressed twice counts for the cell that has moved up. */
function queue(task) {
  work = work.then(task).catch((error) => { warn(error.message); return refresh().catch(() => {}); });
  return work;
}

function takeCell([image, cell, label, rev, present, lookedAt, drawn, predicted, score, box, attributes, odd]) {
  const key = `${image}:${cell}`, known = cells.get(key);
  const value = { key, image, cell, label, revision: rev, present, lookedAt, drawn, predicted, score, box, attributes, odd: odd > 1, distance: odd };
  if (!known) {
    cells.set(key, value);
    images.get(image)?.cells.push(value);
  } else if (known.revision < rev) Object.assign(known, value);
}

function take(answer) {
  if (!answer.cells) return;
  answer.cells.forEach(takeCell);
  for (const [number, through, rev] of answer.images) Object.assign(images.get(number), { through, revision: rev });
  ({ classes, status, signatures, revision } = answer);
  find("undo").disabled = !answer.undo;
  find("redo").disabled = !answer.redo;
  showClasses();
  showStatus();
  showDifferential(answer.differential);
  show();
}

async function refresh() {
  take(await ask(`api/samples/${sample}/changes?after_revision=${revision}&who=${encodeURIComponent(who())}`));
}

/** Sends a change. The answer has what it changed; what others did before is fetched as well. */
async function send(what, body, method = "POST") {
  const answer = await ask(`api/samples/${sample}/${what}`, { who: who(), ...body }, method);
  if (answer.after !== revision) await refresh();
  else take(answer);
}

async function openSample(number) {
  const answer = await ask(`api/samples/${number}?who=${encodeURIComponent(who())}`);
  sample = number;
  cells.clear();
  images.clear();
  for (const [place, [name, width, height, oneCell]] of Object.entries(answer.files)) {
    images.set(Number(place), { name, width, height, oneCell, cells: [], through: false, revision: 0 });
  }
  answer.cells.forEach(takeCell);
  fill(find("filter-image"), [["", "all"], ...[...images].map(([place, image]) => [String(place), image.name])]);
  fill(find("filter-attribute"), [["", "all"], ...attributes()]);
  const warnings = find("warnings");
  warnings.hidden = !answer.warnings.length;
  warnings.querySelector("summary").textContent = `Warnings (${answer.warnings.length})`;
  warnings.querySelector("ul").replaceChildren(...answer.warnings.map((text) => element("li", text)));
  take(answer);
}

// --- What is shown --------------------------------------------------------------------------------------------------------

function element(name, text = "", properties = {}) {
  const node = document.createElement(name);
  node.textContent = text;
  return Object.assign(node, properties);
}

function fill(select, options) {
  const chosen = select.value;
  select.replaceChildren(...options.map(([value, text]) => element("option", text, { value })));
  if (options.some(([value]) => value === chosen)) select.value = chosen;
}

function attributes() {
  const found = new Map();
  for (const cell of cells.values()) {
    for (const [name, value] of Object.entries(cell.attributes)) found.set(JSON.stringify([name, value]), `${name}: ${value}`);
  }
  return [...found].sort((a, b) => a[1].localeCompare(b[1]));
}

function show() {
  const onlyClass = find("filter-class").value, attribute = find("filter-attribute").value, image = find("filter-image").value;
  const most = find("filter-score").value / 100, fresh = find("filter-new").checked, deleted = find("filter-deleted").checked;
  const odd = find("filter-odd").checked;
  const [name, value] = attribute ? JSON.parse(attribute) : [];
  const order = {
    doubt: (a, b) => b.odd - a.odd || a.score - b.score,
    sure: (a, b) => b.score - a.score,
    image: (a, b) => a.image - b.image || a.cell - b.cell,
  }[find("order").value];
  const groups = new Map(classes.map((row) => [row.name, []]));
  let shown = 0;
  for (const cell of cells.values()) {
    if (cell.present === deleted || (onlyClass && cell.label !== onlyClass) || (image && cell.image !== Number(image))) continue;
    if (cell.score > most || (fresh && cell.lookedAt) || (odd && !cell.odd) || (attribute && cell.attributes[name] !== value)) continue;
    if (!groups.has(cell.label)) groups.set(cell.label, []);
    groups.get(cell.label).push(cell);
    shown += 1;
  }
  const list = [...groups].map(([of, found]) => ({ name: of, cells: found.sort(order) }));
  gallery.show(list);
  const all = [...cells.values()].filter((cell) => cell.present).length;
  const looked = [...cells.values()].filter((cell) => cell.present && cell.lookedAt).length;
  find("shown").textContent = `${shown} shown. ${looked} of ${all} looked at.`;
  find("filter-odd").parentElement.hidden = ![...cells.values()].some((cell) => cell.distance !== null);
  find("filter-score-value").textContent = `${find("filter-score").value} %`;
}

function showClasses() {
  find("classes").replaceChildren(...classes.map((row) => {
    const item = element("li"), name = element("button", "", { className: "name", type: "button" });
    name.append(element("span", row.name), element("span", String(row.count), { className: "count" }));
    name.title = "Go to these cells";
    name.addEventListener("click", () => {
      if (gallery.goToGroup(row.name)) find("gallery").focus();
      else say(`No cell of ${row.name} is shown.`);
    });
    const key = element("button", row.key ?? "→", { className: "key", type: "button" });
    key.title = `Move the selected cells to ${row.name}`;
    key.setAttribute("aria-label", `Move the selected cells to ${row.name}${row.key ? `, key ${row.key}` : ""}`);
    key.addEventListener("click", () => toClass(row.name));
    item.append(name, key);
    item.classList.toggle("empty", !row.count);
    return item;
  }));
  fill(find("filter-class"), [["", "all"], ...classes.map((row) => [row.name, row.name])]);
  find("help-classes").replaceChildren(...classes.filter((row) => row.key).map((row) => {
    const item = element("li");
    item.append(element("kbd", row.key), element("span", ` ${row.name}`));
    return item;
  }));
}

function showStatus() {
  const badge = find("status"), last = signatures.at(-1);
  const signed = status === "final" || status === "amended";
  badge.textContent = signed ? `${status}, ${last.who}, ${last.time.slice(0, 10)}` : status;
  badge.classList.toggle("signed", signed);
  find("sign").textContent = signed ? "Amend" : "Sign";
  for (const id of ["confirm", "delete", "draw", "through", "new-class"]) find(id).disabled = signed;
}

function showDifferential({ total, rows, beside, notes }) {
  const number = (value) => (value === null ? "" : value.toFixed(1));
  find("differential").tBodies[0].replaceChildren(
    ...rows.map((row) => {
      const line = element("tr"), limits = row.low === null ? "" : `${number(row.low)} – ${number(row.high)}`;
      line.append(element("th", row.name, { scope: "row" }), ...[String(row.count), number(row.percent), limits].map((text) => element("td", text)));
      return line;
    }),
  );
  const named = beside.map((row) => `${row.name} ${row.count}${row.per_100 === null ? "" : ` (${number(row.per_100)} per 100)`}`);
  const told = [`${total} white cells.`, ...(named.length ? [`Beside them: ${named.join(", ")}.`] : []), "Limits are of sampling only.", ...notes];
  find("beside").textContent = told.join(" ");
}

function showCell(cell) {
  const image = cell && images.get(cell.image), selected = gallery.selected.size;
  context.show(cell, image, image?.cells ?? []);
  const lines = cell ? [
    ["Class", cell.label],
    ["Predicted", cell.drawn ? "drawn by a person" : `${cell.predicted}, score ${Math.round(100 * cell.score)} %`],
    ...(cell.distance === null ? [] : [["Odd", `${cell.distance.toFixed(2)} (above 1: unlike its class)`]]),
    ["Image", `${image.name}, cell ${cell.cell}`],
    ["Looked at", cell.lookedAt ? "yes" : image.through ? "with its field" : "no"],
  ] : [];
  const named = cell ? Object.entries(cell.attributes) : [];
  for (const [id, list] of [["details", lines], ["attributes", named]]) {
    find(id).replaceChildren(...list.flatMap(([name, text]) => [element("dt", name), element("dd", text)]));
  }
  find("attributes-title").hidden = !named.length;
  find("confirm").textContent = selected > 1 ? `Confirm ${selected}` : "Confirm";
  find("delete").textContent = `${cell && !cell.present ? "Restore" : "Delete"}${selected > 1 ? ` ${selected}` : ""}`;
  find("through").textContent = image?.through ? "Field is confirmed: take back" : "Confirm the rest of this field";
  find("through").hidden = !image;
  find("draw").hidden = !image || image.oneCell;
}

function showHint(text) {
  find("drawing").hidden = !text;
  find("drawing").textContent = text;
  find("draw").textContent = context?.isDrawing ? "Leave drawing" : "Draw a missed cell";
}

function say(text) {
  find("alert").textContent = "";
  find("message").textContent = text;
  clearTimeout(messageTimer);
  messageTimer = setTimeout(() => { find("message").textContent = ""; }, SHOWN_MESSAGE);
}

function warn(text) {
  find("message").textContent = "";
  find("alert").textContent = text;
  clearTimeout(messageTimer);
  messageTimer = setTimeout(() => { find("alert").textContent = ""; }, 2 * SHOWN_MESSAGE);
}

// --- What a person does ---------------------------------------------------------------------------------------------------

let storedName = "";
try { storedName = localStorage.getItem("unihema-reviewer") ?? ""; } catch { /* A browser that stores nothing. */ }
const who = () => storedName;

function setName(name) {
  storedName = name;
  try { localStorage.setItem("unihema-reviewer", name); } catch { /* As above. */ }
  find("reviewer").textContent = name || "Who are you?";
}

/** Asks for one line of text; null where that is cancelled. */
function askText(title, text, label, value = "", yes = "OK") {
  const dialog = find("ask-dialog"), input = find("ask-input");
  find("ask-title").textContent = title;
  find("ask-text").textContent = text;
  find("ask-label").querySelector("span").textContent = label;
  find("ask-yes").textContent = yes;
  input.value = value;
  dialog.returnValue = "no";
  dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes" ? input.value.trim() : null), { once: true });
  });
}

async function named() {
  if (who()) return true;
  const name = await askText("Who are you?", "The log has your name beside everything that you change.", "Name");
  if (name) setName(name);
  return Boolean(name);
}

const targets = () => gallery.selectedCells.map(({ image, cell, revision: seen }) => ({ image, cell, revision: seen }));

function change(kind, told, label) {
  queue(async () => {
    if (!gallery.selected.size || !(await named())) return;
    const seen = targets(), next = gallery.afterSelection();
    await send("changes", label === undefined ? { kind, cells: seen } : { kind, cells: seen, label });
    gallery.goTo(next);
    say(`${seen.length === 1 ? "1 cell" : `${seen.length} cells`} ${told}.`);
  });
}

function toClass(name) {
  if (context.isDrawing) place(name);
  else change("class", `moved to ${name}`, name);
}

function place(label) {
  queue(async () => {
    if (!context.isDrawing || !(await named())) return;
    const { image } = context.cell, known = new Set(cells.keys());
    await send("draw", { image, box: context.fresh, label });
    context.stopDrawing();
    const fresh = [...cells.keys()].find((key) => !known.has(key));
    if (fresh) gallery.goTo(fresh);
    find("gallery").focus();
    say(`A cell of ${label} was added.`);
  });
}

const confirmCells = () => change("confirm", "confirmed");
const deleteCells = () => (gallery.currentCell?.present === false ? change("restore", "restored") : change("delete", "deleted"));

function through() {
  queue(async () => {
    const cell = gallery.currentCell;
    if (!cell || !(await named())) return;
    const image = images.get(cell.image);
    await send("through", { image: cell.image, revision: image.revision, through: !image.through });
    say(image.through ? `All cells of ${image.name} are confirmed.` : `The cells of ${image.name} are open again.`);
  });
}

function backOrForth(direction) {
  queue(async () => {
    if (find(direction).disabled || !(await named())) return;
    await send(direction, {});
    say(direction === "undo" ? "Taken back." : "Done again.");
  });
}

function signOrAmend() {
  queue(async () => {
    if (!(await named())) return;
    if (status === "final" || status === "amended") {
      const why = await askText("Open an amendment", "What was signed stays in the log. Say why it is changed.", "Reason");
      if (why) await send("amend", { why });
      return;
    }
    const seen = revision, left = [...cells.values()].filter((cell) => cell.present && !cell.lookedAt && !images.get(cell.image).through).length;
    const text = left ? `${left} cells were not looked at. Your name stands for all of them as they are.` : "All cells were looked at.";
    const name = await askText("Sign this sample", text, "Your name", who(), "Sign");
    if (!name) return;
    setName(name);
    await send("signature", { revision: seen }, "PUT");
    say(`Signed: ${status}.`);
  });
}

function toggleDrawing() {
  if (context.isDrawing) context.stopDrawing();
  else if (context.cell && !images.get(context.cell.image).oneCell && !find("draw").disabled) context.startDrawing();
}

async function showHistory() {
  const { entries, head } = await ask(`api/samples/${sample}/log`);
  const value = (of) => (of ? [of.label, of.present === false ? "deleted" : "", of.status, of.looked_through ? "looked through" : ""].filter(Boolean).join(" ") : "");
  find("head").textContent = `Last entry: ${head.number}, ${head.hash}`;
  find("history-list").replaceChildren(...entries.reverse().map((entry) => {
    const where = entry.image === null ? "" : `${images.get(entry.image)?.name ?? ""}${entry.cell === null ? "" : ` cell ${entry.cell}`}: `;
    const told = `${entry.time.replace("T", " ").slice(0, 19)} ${entry.who}: ${where}${entry.kind} ${value(entry.old)} → ${value(entry.new)}`;
    return element("li", entry.why ? `${told} (${entry.why})` : told, { value: entry.number });
  }));
  find("history-dialog").showModal();
}

function setZoom(zoom) {
  context.setZoom(zoom);
  for (const button of document.querySelectorAll("[data-zoom]")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.zoom) === context.zoom));
  }
}

const KEYS = {
  ArrowLeft: (event) => gallery.step(-1, event.shiftKey),
  ArrowRight: (event) => gallery.step(1, event.shiftKey),
  ArrowUp: (event) => gallery.vertical(-1, event.shiftKey),
  ArrowDown: (event) => gallery.vertical(1, event.shiftKey),
  PageUp: (event) => gallery.page(-1, event.shiftKey),
  PageDown: (event) => gallery.page(1, event.shiftKey),
  Home: (event) => gallery.step(-Infinity, event.shiftKey),
  End: (event) => gallery.step(Infinity, event.shiftKey),
  " ": () => gallery.toggleCurrent(),
  Enter: (event) => (event.shiftKey ? toggleDrawing() : confirmCells()),
  Delete: deleteCells,
  Backspace: deleteCells,
  Escape: () => gallery.selectCurrent(),
  "+": () => setZoom(context.zoom - 1),
  "-": () => setZoom(context.zoom + 1),
  "?": () => find("help-dialog").showModal(),
};

/** The letter or digit of a key; on a keyboard of another script the Latin letter at its place. */
function letterOf(event) {
  if (/^[a-z0-9]$/i.test(event.key)) return event.key.toLowerCase();
  return /^Key[A-Z]$/.test(event.code) ? event.code.at(-1).toLowerCase() : event.key;
}

function pressed(event) {
  if (document.querySelector("dialog[open]") || event.altKey) return;
  const control = event.ctrlKey || event.metaKey, letter = letterOf(event);
  const typing = event.target.matches("input:not([type=checkbox]):not([type=range]), select, textarea");
  if (control && (letter === "z" || letter === "y") && !typing) {
    event.preventDefault();
    backOrForth(letter === "y" || event.shiftKey ? "redo" : "undo");
    return;
  }
  if (event.key === "?" && !typing) {
    KEYS["?"]();
    return;
  }
  // Single letters count here alone, so that no other key of a browser or a screen reader is taken.
  if (!event.target.closest("#gallery, #view")) return;
  if (control) {
    if (letter === "a") {
      event.preventDefault();
      gallery.selectGroup();
    }
    return;
  }
  if (context.isDrawing) {
    if (event.key === "Escape") context.stopDrawing();
    else if (context.key(event)) event.preventDefault();
    else if (event.key.length === 1) keyOfClass(letter);
    return;
  }
  const action = KEYS[event.key];
  if (action) {
    event.preventDefault();
    action(event);
  } else if (event.key.length === 1) keyOfClass(letter);
}

function keyOfClass(letter) {
  const row = classes.find((each) => each.key === letter);
  if (row) toClass(row.name);
  else say(`No class has the key ${letter}. Press ? for the keys.`);
}

document.addEventListener("keydown", pressed);
for (const id of ["filter-class", "filter-attribute", "filter-image", "filter-score", "filter-odd", "filter-new", "filter-deleted", "order"]) {
  find(id).addEventListener("input", show);
}
find("filter-none").addEventListener("click", () => {
  for (const id of ["filter-class", "filter-attribute", "filter-image"]) find(id).value = "";
  for (const id of ["filter-odd", "filter-new", "filter-deleted"]) find(id).checked = false;
  find("filter-score").value = 100;
  show();
});
find("neighbours").addEventListener("input", () => { context.neighbours = find("neighbours").checked; if (context.cell) context.drawBoxes(); });
for (const button of document.querySelectorAll("[data-zoom]")) button.addEventListener("click", () => setZoom(Number(button.dataset.zoom)));
find("wide").addEventListener("click", () => {
  const wide = document.body.classList.toggle("wide");
  find("wide").setAttribute("aria-pressed", String(wide));
  showCell(gallery.currentCell);
});
find("ask-no").addEventListener("click", () => find("ask-dialog").close("no"));
find("confirm").addEventListener("click", confirmCells);
find("delete").addEventListener("click", deleteCells);
find("draw").addEventListener("click", toggleDrawing);
find("through").addEventListener("click", through);
find("undo").addEventListener("click", () => backOrForth("undo"));
find("redo").addEventListener("click", () => backOrForth("redo"));
find("sign").addEventListener("click", signOrAmend);
find("history").addEventListener("click", () => queue(showHistory));
find("help").addEventListener("click", KEYS["?"]);
find("new-class").addEventListener("click", async () => {
  const name = await askText("Other class", "The selected cells, or the box that is drawn, get a class that is not in the list.", "Class");
  if (name) toClass(name);
});
find("reviewer").addEventListener("click", async () => {
  const name = await askText("Who are you?", "The log has your name beside everything that you change.", "Name", who());
  if (name) {
    setName(name);
    queue(refresh);
  }
});
find("sample").addEventListener("input", () => queue(() => openSample(Number(find("sample").value))));

// --- The beginning --------------------------------------------------------------------------------------------------------

setName(storedName);
queue(async () => {
  const samples = await ask("api/samples");
  fill(find("sample"), samples.map((each) => [String(each.id), each.name]));
  find("sample-label").hidden = samples.length < 2;
  await openSample(0);
  find("gallery").focus();
});
// What others change appears; a page that nobody sees, or that waits for an answer, asks for nothing.
let asking = false;
setInterval(() => {
  if (document.hidden || asking) return;
  asking = true;
  queue(refresh).finally(() => { asking = false; });
}, POLL);
