// The page: state, panels and keys. The server holds corrections; this page sends each change.

import { download, get, send } from "./api.js";
import { View } from "./view.js";
import { showTraining } from "./training.js";

const POLL_MS = 700;
const IDLE_POLL_MS = 4000;
const COUNT_AFTER_MS = 120;
const DEFAULT_SIDE = 20; // px of a box added by click where nothing was found
const UNDO_DEPTH = 200;

const byId = (id) => document.getElementById(id);
const several = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
const round = (value) => Math.round(value * 100) / 100;

const interval = ([low, high]) =>
  low === high ? low.toLocaleString("en") : `${low.toLocaleString("en")} to ${high.toLocaleString("en")}`;

const page = {
  names: [],
  state: null,
  index: null,
  isFinding: false, // the selected image is shown, and its objects are not known
  objects: null, // of the selected image
  without: new Set(), // groups
  mostSide: 0, // of all images seen
  undo: new Map(), // by image: corrections before each change
  saving: Promise.resolve(),
};

const view = new View(byId("canvas"), { select, add, place });

// ---- messages

let messageTimer;
function tell(text) {
  const message = byId("message");
  message.textContent = text;
  message.hidden = false;
  clearTimeout(messageTimer);
  messageTimer = setTimeout(() => (message.hidden = true), 7000);
}

const guarded = (work) => async (...given) => {
  try {
    return await work(...given);
  } catch (error) {
    if (error.name !== "AbortError") tell(error.message);
    return undefined;
  }
};

// ---- what the server says

async function poll() {
  try {
    await takeState(await get("api/state"));
  } catch (error) {
    tell(error.message);
  }
  const state = page.state;
  const runs = ["running", "stopping"].includes(state?.training?.status);
  const soon = state?.busy || runs;
  setTimeout(poll, document.hidden ? IDLE_POLL_MS : soon ? POLL_MS : IDLE_POLL_MS);
}

async function takeState(state) {
  const before = page.state;
  page.state = state;
  byId("folder").textContent = state.folder ?? "";
  byId("folder").title = state.folder ?? "";
  byId("empty").hidden = state.folder !== null;
  byId("main").hidden = state.folder === null;
  for (const part of document.querySelectorAll(".model, .saves")) part.hidden = state.folder === null;
  if (state.folder === null) return;
  document.title = `${state.folder.split("/").filter(Boolean).pop()} · spairkit`;
  if (!before) {
    page.names = (await get("api/images")).names;
    makeList();
    byId("threshold").value = Math.max(0.5, state.least_threshold);
  }
  showModels(state);
  showTraining(state.training, state.uses_training);
  showProgress(state);
  const anew = before && (before.model !== state.model || before.generation !== state.generation);
  if (anew) forget();
  if (JSON.stringify(before?.groups) !== JSON.stringify(state.groups)) {
    showGroups(state);
    if (page.objects && !anew) await readObjects();
  }
  const threshold = byId("threshold");
  if (Number(threshold.min) !== state.least_threshold) threshold.min = state.least_threshold;
  // without waiting, as an image may take long
  if (page.index === null && page.names.length) guarded(choose)(0);
  else if (anew) guarded(choose)(page.index);
  if (!before || before.done !== state.done || anew || before.busy !== state.busy) countSoon();
}

function forget() {
  page.objects = null;
  page.without.clear();
  page.mostSide = 0;
  for (const entry of byId("list").children) entry.querySelector(".n").textContent = "";
}

function showModels(state) {
  const select = byId("model");
  const names = state.models.map((name) => (name === "watershed" ? "Watershed, no training" : name));
  if (select.length !== names.length) select.replaceChildren(...names.map((name, i) => new Option(name, i)));
  if (document.activeElement !== select) select.value = state.model;
}

function showProgress(state) {
  const bar = byId("progress");
  bar.hidden = !state.busy;
  bar.value = (state.done + state.share) / Math.max(state.images, 1);
  const words = [];
  if (state.busy && !state.done) words.push(state.phase);
  else if (state.busy) words.push(state.done < state.images ? `${state.done} of ${several(state.images, "image")}` : state.phase);
  else words.push(`in ${several(state.images, "image")}`);
  if (state.num_unreadable) words.push(`${state.num_unreadable} cannot be read`);
  byId("progress-words").textContent = words.join("; ");
  byId("progress-words").title = state.unreadable.join("\n");
  byId("total-interval").textContent = state.interval ? `model, 90 %: ${interval(state.interval)}` : "";
  byId("total-interval").title = "The model's 90 % interval, before filters and corrections";
  if (page.isFinding && state.share > 0) {
    byId("busy").textContent = `${state.phase}, ${Math.round(100 * state.share)} %`;
  }
  const isDone = state.done === state.images;
  for (const id of ["save-coco", "save-csv"]) {
    byId(id).disabled = !isDone;
    byId(id).title = isDone ? "" : "All images must be done first";
  }
  showNotes();
}

function showNotes() {
  const { state, objects } = page;
  const notes = [...state.doubts];
  if (state.error) notes.unshift(state.error);
  if (objects?.misfit) notes.push(`This model does not fit this image: ${objects.misfit}.`);
  else if (state.misfits) notes.push(`This model does not fit ${several(state.misfits, "image")}; train one on this folder.`);
  byId("notes").textContent = notes.join(" ");
}

// ---- the list of images

function makeList() {
  const entries = page.names.map((name, index) => {
    const entry = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.title = name;
    const image = new Image(44, 44);
    image.loading = "lazy";
    image.alt = "";
    image.src = `api/images/${index}/thumbnail`;
    image.addEventListener("error", () => entry.classList.add("bad"));
    const words = document.createElement("span");
    words.className = "name";
    words.textContent = name;
    const number = document.createElement("span");
    number.className = "n";
    button.append(image, words, number);
    button.addEventListener("click", guarded(() => choose(index)));
    entry.append(button);
    return entry;
  });
  byId("list").replaceChildren(...entries);
}

let countTimer;
function countSoon() {
  clearTimeout(countTimer);
  countTimer = setTimeout(guarded(count), COUNT_AFTER_MS);
}

function filterQuery() {
  const { threshold, least, largest } = filter();
  const query = new URLSearchParams({ threshold, least });
  if (Number.isFinite(largest)) query.set("largest", largest);
  if (page.without.size) query.set("without", [...page.without].join(","));
  return query;
}

async function count() {
  await page.saving;
  const { images, total } = await get(`api/counts?${filterQuery()}`);
  byId("total").textContent = total.toLocaleString("en");
  byId("total-words").textContent = total === 1 ? "object" : "objects";
  const entries = byId("list").children;
  images.forEach((number, index) => {
    const shown = number === null ? "" : number.toLocaleString("en");
    const place = entries[index].querySelector(".n");
    if (place.textContent !== shown) place.textContent = shown;
  });
}

// ---- the selected image

let reading;
async function choose(index) {
  reading?.abort();
  reading = new AbortController();
  const { signal } = reading;
  page.index = index;
  page.objects = null;
  page.isFinding = false;
  view.clear();
  showEditing();
  showCount();
  byId("list").querySelector('[aria-current="true"]')?.removeAttribute("aria-current");
  const button = byId("list").children[index].firstChild;
  button.setAttribute("aria-current", "true");
  button.scrollIntoView({ block: "nearest", inline: "nearest" });
  const source = (region) => `api/images/${index}/picture${region ? `?region=${region}` : ""}`;
  const picture = new Image();
  picture.src = source();
  byId("busy").hidden = false;
  byId("busy").textContent = "opening the image …";
  const shown = picture.decode().then(() => {
    if (signal.aborted) return;
    view.setPicture(picture, [picture.naturalHeight, picture.naturalWidth], source);
    colourChips();
    page.isFinding = !page.objects;
    if (page.isFinding) byId("busy").textContent = "finding objects …";
  }).catch(() => {});
  try {
    await Promise.all([shown, readObjects(signal)]);
    if (signal.aborted) return;
    const isReduced = picture.naturalWidth && picture.naturalWidth !== page.objects.size[1];
    if (isReduced) view.setPicture(picture, page.objects.size, source);
    byId("busy").hidden = true;
  } catch (error) {
    if (signal.aborted) return;
    page.isFinding = false;
    byId("busy").textContent = error.message; // in place of the image
  }
}

async function readObjects(signal) {
  const index = page.index;
  let objects = null;
  while (objects === null) {
    objects = await get(`api/images/${index}/objects`, signal);
    if (page.index !== index) return;
  }
  page.objects = objects;
  page.isFinding = false;
  page.mostSide = Math.max(page.mostSide, ...objects.sides, 1);
  showSizes();
  view.setObjects(objects);
  drawHistogram();
  refresh();
}

function filter() {
  const most = Number(byId("largest").max);
  const largest = Number(byId("largest").value);
  return {
    threshold: Number(byId("threshold").value),
    least: Number(byId("least").value),
    largest: largest >= most ? Infinity : largest,
  };
}

function isFiltered() {
  const { threshold, least, largest } = filter();
  const usual = Math.max(0.5, page.state.least_threshold);
  return threshold !== usual || least > 0 || Number.isFinite(largest) || page.without.size > 0;
}

function shownRows() {
  const { objects, without } = page;
  if (!objects) return [];
  const { threshold, least, largest } = filter();
  const hidden = new Set(objects.covers);
  const rows = [];
  objects.scores.forEach((score, row) => {
    const side = objects.sides[row];
    if (score > threshold && side >= least && side <= largest && !hidden.has(row) && !without.has(objects.groups[row])) {
      rows.push(row);
    }
  });
  return rows;
}

// rows of the objects that were removed, if they are to be shown
function removedRows() {
  const { covers, removed } = page.objects;
  return byId("show-removed").checked ? covers.slice(0, removed.length).filter((row) => row !== null) : [];
}

function refresh() {
  const { objects } = page;
  if (!objects) return;
  const rows = shownRows();
  view.show(rows, objects.added, removedRows());
  showCount(rows.length + objects.added.length);
  showEditing();
  showNotes();
}

function showCount(number) {
  const { objects, state } = page;
  byId("count").textContent = number === undefined ? "–" : number.toLocaleString("en");
  byId("count-words").textContent = "in this image";
  let words = "";
  if (objects?.interval) {
    words = `Model, 90 % interval: ${interval(objects.interval)}`;
    const before = [];
    if (isFiltered()) before.push("filters");
    if (objects.removed.length || objects.added.length) before.push("corrections");
    if (before.length) words += `, before ${before.join(" and ")}`;
    if (state.rough) words += " (rough: not calibrated)";
  }
  byId("interval").textContent = words;
}

function showEditing() {
  const { objects, state } = page;
  const changes = objects ? objects.removed.length + objects.added.length : 0;
  byId("remove").disabled = view.selected === null;
  byId("remove").textContent = isRemoved(view.selected) ? "Restore" : "Remove";
  byId("undo").disabled = !(page.undo.get(page.index)?.length);
  byId("reset").disabled = !changes;
  byId("add").disabled = !objects;
  byId("selection").textContent = selection();
  const made = [];
  if (objects?.removed.length) made.push(`${objects.removed.length} removed`);
  if (objects?.added.length) made.push(`${objects.added.length} added`);
  byId("saved").textContent = made.length
    ? `${made.join(", ")}; saved in ${state.corrections}`
    : `Corrections are saved in ${state?.corrections ?? "a file"}`;
}

// says what is selected
function selection() {
  const { objects } = page;
  if (!objects) return "";
  if (view.adds) return "Click to add an object, or drag a box.";
  if (view.selected === null) return "Click an object to select it.";
  const [x1, y1, x2, y2] = view.boxOf(view.selected);
  const size = `${(x2 - x1).toFixed(1)} × ${(y2 - y1).toFixed(1)} px`;
  const score = objects.scores[view.selected];
  if (score === undefined) return `Added by hand, ${size}`;
  return `${isRemoved(view.selected) ? "Removed; confidence" : "Confidence"} ${score.toFixed(2)}, ${size}`;
}

const isRemoved = (index) => index !== null && page.objects !== null && removedRows().includes(index);

// ---- corrections

function select(index) {
  view.select(index);
  showEditing();
}

function place(x, y, scale) {
  byId("place").textContent = x === null ? "" : `${Math.floor(x)}, ${Math.floor(y)} px · ${Math.round(scale * 100)} %`;
}

// sends the corrections of the selected image; changes follow each other in order
const correct = guarded(async (change, isUndo = false) => {
  const { index } = page;
  const work = page.saving.then(async () => {
    if (page.index !== index || !page.objects) return;
    const { removed, added, revision } = page.objects;
    const next = change({ removed, added });
    let answer;
    try {
      answer = await send("PUT", `api/images/${index}/corrections`, { revision, ...next });
    } catch (error) {
      if (error.status === 409) {
        page.undo.delete(index);
        await readObjects();
      }
      throw error;
    }
    if (!isUndo) {
      const past = page.undo.get(index) ?? [];
      past.push({ removed, added });
      page.undo.set(index, past.slice(-UNDO_DEPTH));
    }
    if (page.index !== index) return;
    Object.assign(page.objects, answer);
    view.selected = null;
    refresh();
    countSoon();
  });
  page.saving = work.catch(() => {});
  await work;
});

// removes the selected object, or restores it if it is removed
function remove() {
  const index = view.selected;
  if (index === null || !page.objects) return undefined;
  const found = page.objects.boxes.length;
  if (isRemoved(index)) {
    const which = page.objects.covers.indexOf(index);
    return correct(({ removed, added }) => ({ removed: removed.filter((_, number) => number !== which), added }));
  }
  const box = view.boxOf(index);
  return correct(({ removed, added }) =>
    index < found
      ? { removed: [...removed, box], added }
      : { removed, added: added.filter((_, number) => number !== index - found) },
  );
}

// a box that was dragged, or one of the median size round a point
function add(box, [x, y]) {
  if (!page.objects) return undefined;
  const [height, width] = page.objects.size;
  const [w, h] = medianSize();
  const [x1, y1, x2, y2] = box ?? [x - w / 2, y - h / 2, x + w / 2, y + h / 2];
  const made = [Math.max(x1, 0), Math.max(y1, 0), Math.min(x2, width), Math.min(y2, height)].map(round);
  if (made[2] - made[0] < 1 || made[3] - made[1] < 1) return undefined;
  return correct(({ removed, added }) => ({ removed, added: [...added, made] }));
}

function medianSize() {
  const boxes = [...shownRows().map((row) => page.objects.boxes[row]), ...page.objects.added];
  if (!boxes.length) return [DEFAULT_SIDE, DEFAULT_SIDE];
  const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];
  return [median(boxes.map((box) => box[2] - box[0])), median(boxes.map((box) => box[3] - box[1]))];
}

function undo() {
  const past = page.undo.get(page.index)?.pop();
  return past && correct(() => past, true);
}

function reset() {
  return correct(() => ({ removed: [], added: [] }));
}

function setAdding(adds) {
  view.adds = adds;
  byId("add").setAttribute("aria-pressed", String(adds));
  byId("canvas").classList.toggle("adds", adds);
  showEditing();
}

// selects the next object in reading order
function step(by) {
  if (!page.objects) return;
  const all = view.candidates();
  if (!all.length) return;
  const at = all.indexOf(view.selected);
  select(all[at < 0 ? (by > 0 ? 0 : all.length - 1) : (at + by + all.length) % all.length]);
}

// ---- filters

function showSizes() {
  const most = Math.ceil(page.mostSide);
  for (const id of ["least", "largest"]) {
    const slider = byId(id);
    const wasAll = id === "largest" && Number(slider.value) >= Number(slider.max);
    if (Number(slider.max) !== most) slider.max = most;
    if (wasAll) slider.value = most;
  }
  showValues();
}

function showValues() {
  const { threshold, least, largest } = filter();
  byId("threshold-value").textContent = threshold.toFixed(2);
  byId("least-value").textContent = `${least} px`;
  byId("largest-value").textContent = Number.isFinite(largest) ? `${largest} px` : "any";
  drawHistogram();
}

// how many objects of this image have which confidence
function drawHistogram() {
  const canvas = byId("histogram");
  const ctx = canvas.getContext("2d");
  ctx.clearRect(0, 0, canvas.width, canvas.height);
  const scores = page.objects?.scores ?? [];
  if (!scores.length) return;
  const { min, max } = byId("threshold");
  const bins = new Array(48).fill(0);
  const place = (score) => ((score - min) / (max - min)) * bins.length;
  for (const score of scores) bins[Math.min(Math.max(Math.floor(place(score)), 0), bins.length - 1)] += 1;
  const most = Math.max(...bins);
  const style = getComputedStyle(document.documentElement);
  const limit = place(filter().threshold);
  const width = canvas.width / bins.length;
  bins.forEach((number, bin) => {
    if (!number) return;
    const height = Math.max((number / most) * canvas.height, 3);
    ctx.fillStyle = style.getPropertyValue(bin + 0.5 > limit ? "--accent" : "--rule");
    ctx.fillRect(bin * width + 1, canvas.height - height, width - 2, height);
  });
}

function showGroups(state) {
  byId("groups").hidden = !state.groups.length;
  const chips = state.groups.map((group, index) => {
    const [x1, y1, x2, y2] = group.box;
    const side = Math.ceil(Math.max(x2 - x1, y2 - y1) * 1.3) + 2;
    const corner = [(x1 + x2 - side) / 2, (y1 + y2 - side) / 2].map((value) => Math.max(Math.round(value), 0));
    const chip = document.createElement("button");
    chip.type = "button";
    chip.setAttribute("aria-pressed", "true");
    chip.title = "Switch these objects off or on";
    chip.setAttribute("aria-label", `Cluster ${index + 1}, ${several(group.count, "object")}`);
    const image = new Image(28, 28);
    image.alt = "";
    image.src = `api/images/${group.image}/picture?side=64&region=${corner.join(",")},${side},${side}`;
    const dot = document.createElement("span");
    dot.className = "dot";
    chip.append(image, dot, group.count.toLocaleString("en"));
    chip.addEventListener("click", () => {
      const number = index + 1;
      if (!page.without.delete(number)) page.without.add(number);
      chip.setAttribute("aria-pressed", String(!page.without.has(number)));
      refresh();
      countSoon();
    });
    return chip;
  });
  byId("chips").replaceChildren(...chips);
  colourChips();
}

// the colours of groups depend on the image
function colourChips() {
  document.querySelectorAll(".chips .dot").forEach((dot, index) => {
    dot.style.background = view.colour(index);
  });
}

// ---- buttons and keys

for (const id of ["threshold", "least", "largest"]) {
  byId(id).addEventListener("input", () => {
    const [least, largest] = [byId("least"), byId("largest")];
    if (Number(least.value) > Number(largest.value)) (id === "least" ? largest : least).value = byId(id).value;
    showValues();
    refresh();
    countSoon();
  });
}
byId("add").addEventListener("click", () => setAdding(!view.adds));
byId("remove").addEventListener("click", remove);
byId("undo").addEventListener("click", undo);
byId("reset").addEventListener("click", reset);
byId("zoom-in").addEventListener("click", () => view.zoom(1.4));
byId("zoom-out").addEventListener("click", () => view.zoom(1 / 1.4));
byId("zoom-fit").addEventListener("click", () => view.fit());
byId("show-removed").addEventListener("change", refresh);
for (const name of ["outlines", "boxes"]) {
  byId(`show-${name}`).addEventListener("change", (event) => {
    view[name] = event.target.checked;
    view.redraw();
  });
}
byId("save-coco").addEventListener("click", guarded(() => save("coco", "annotations.json")));
byId("save-csv").addEventListener("click", guarded(() => save("csv", "objects.csv")));
byId("model").addEventListener("change", guarded(async (event) => {
  event.target.blur();
  await takeState(await send("PUT", "api/model", { model: Number(event.target.value) }));
}));
byId("train").addEventListener("click", guarded(async () => takeState(await send("POST", "api/training"))));
byId("stop").addEventListener("click", guarded(async () => takeState(await send("DELETE", "api/training"))));
byId("take").addEventListener("click", guarded(async () => takeState(await send("PUT", "api/training/model"))));

async function save(form, name) {
  await page.saving;
  await download(`api/export/${form}?${filterQuery()}`, name);
}

const KEYS = {
  Delete: remove,
  Backspace: remove,
  Escape: () => (view.adds ? setAdding(false) : select(null)),
  a: () => setAdding(!view.adds),
  "+": () => view.zoom(1.4),
  "=": () => view.zoom(1.4),
  "-": () => view.zoom(1 / 1.4),
  0: () => view.fit(),
  "]": () => neighbour(1),
  "[": () => neighbour(-1),
  PageDown: () => neighbour(1),
  PageUp: () => neighbour(-1),
};
const CANVAS_KEYS = {
  ArrowRight: () => step(1),
  ArrowLeft: () => step(-1),
  ArrowDown: () => neighbour(1),
  ArrowUp: () => neighbour(-1),
  Enter: () => view.adds && add(null, [view.x, view.y]),
};

function neighbour(by) {
  const index = page.index + by;
  if (index >= 0 && index < page.names.length) guarded(choose)(index);
}

document.addEventListener("keydown", (event) => {
  if (!page.state?.folder || event.altKey) return;
  if (event.ctrlKey || event.metaKey) {
    if (event.key !== "z") return;
    event.preventDefault();
    undo();
    return;
  }
  // sliders and lists have keys of their own
  if (event.target.matches("select, [type=range]") && /^(Arrow|Page)/.test(event.key)) return;
  const onCanvas = event.target === byId("canvas") || event.target === document.body;
  const act = KEYS[event.key] ?? (onCanvas ? CANVAS_KEYS[event.key] : undefined);
  if (!act) return;
  event.preventDefault();
  act();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawHistogram);

// the cookie does from now on; the token is not to stay in the address
history.replaceState(null, "", "/");
showValues();
poll();
