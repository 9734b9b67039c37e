// The canvas: an image with its objects, zoom and pan, selection, and boxes drawn by hand.
// All coordinates are pixels of the file; `scale` is CSS pixels per pixel of the file.

// lines on dark images and on bright ones: of groups, of boxes added, of objects removed and
// selected, and what surrounds them
const ON_DARK = {
  groups: ["#ffcf4a", "#56b4e9", "#e3739f", "#3fc79a", "#f2884b", "#b69cff"],
  added: "#4fe0e6",
  removed: "#c9ced6",
  selected: "#ffffff",
  halo: "rgba(0, 0, 0, .55)",
  fill: "rgba(255, 255, 255, .22)",
};
const ON_BRIGHT = {
  groups: ["#0a8f43", "#e05a00", "#1769c9", "#c2255c", "#7a5200", "#6436d8"],
  added: "#007f8c",
  removed: "#5c6470",
  selected: "#000000",
  halo: "rgba(255, 255, 255, .65)",
  fill: "rgba(0, 0, 0, .16)",
};
const BRIGHT = 140; // mean grey level, of 255
const HALO_ABOVE = 0.5; // at smaller scales it would hide the objects
const MAX_SCALE = 64;
const SMOOTH_BELOW = 2; // larger pixels are drawn as squares
const DRAG_PX = 4;
const SHARP_AFTER_MS = 180;

export class View {
  // `on` has select(index or null), add([x1, y1, x2, y2] or a point) and place(x, y, scale).
  // An index counts the objects found, then the boxes added.
  constructor(canvas, on) {
    this.canvas = canvas;
    this.on = on;
    this.adds = false;
    this.outlines = true;
    this.boxes = false;
    this.selected = null;
    this.pointers = new Map();
    this.look = ON_DARK;
    this.clear();
    new ResizeObserver(() => this.resize()).observe(canvas);
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const kind of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(kind, (event) => this.up(event));
    }
    canvas.addEventListener("pointerleave", () => this.on.place(null));
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
  }

  clear() {
    this.size = null;
    this.picture = null;
    this.detail = null;
    this.objects = null;
    this.shown = [];
    this.added = [];
    this.removed = [];
    this.layers = new Map();
    this.selected = null;
    this.box = null;
    this.redraw();
  }

  // picture: an Image that shows the whole file, perhaps reduced; source(region, side): the
  // address of a part of it
  setPicture(picture, [height, width], source) {
    this.size = { width, height };
    this.picture = picture;
    this.look = isBright(picture) ? ON_BRIGHT : ON_DARK;
    this.source = source;
    this.detail = null;
    this.fit();
  }

  setObjects(objects) {
    this.objects = objects;
    this.paths = objects.boxes.map((box, index) => outline(box, objects.outlines[index]));
    this.rectangles = objects.boxes.map((box) => rectangle(box));
  }

  // shown: the rows of the objects that are drawn; added: boxes; removed: rows drawn in dashes
  show(shown, added, removed) {
    this.shown = shown;
    this.added = added;
    this.removed = removed;
    if (this.selected !== null && !this.candidates().includes(this.selected)) this.selected = null;
    this.layers = new Map();
    for (const index of shown) {
      const group = (this.objects.groups[index] ?? 1) - 1;
      if (!this.layers.has(group)) {
        this.layers.set(group, { outlines: new Path2D(), boxes: new Path2D() });
      }
      const layer = this.layers.get(group);
      layer.outlines.addPath(this.paths[index]);
      layer.boxes.addPath(this.rectangles[index]);
    }
    this.redraw();
  }

  colour(group) {
    return this.look.groups[group % this.look.groups.length];
  }

  boxOf(index) {
    const found = this.objects?.boxes.length ?? 0;
    return index < found ? this.objects.boxes[index] : this.added[index - found];
  }

  select(index) {
    this.selected = index;
    if (index !== null) this.reveal(this.boxOf(index));
    this.redraw();
  }

  // ---- the window on the image

  fit() {
    if (!this.size) return;
    const { width, height } = this.viewport();
    const margin = 16;
    this.fitted = Math.min((width - margin) / this.size.width, (height - margin) / this.size.height);
    this.fitted = Math.max(this.fitted, 1e-3);
    this.scale = Math.min(this.fitted, MAX_SCALE);
    this.x = this.size.width / 2;
    this.y = this.size.height / 2;
    this.isFitted = true;
    this.redraw();
  }

  viewport() {
    return { width: this.canvas.clientWidth || 1, height: this.canvas.clientHeight || 1 };
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    const { width, height } = this.viewport();
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    if (this.isFitted) this.fit();
    this.draw(); // at once, as a new size has cleared the canvas
  }

  toFile(clientX, clientY) {
    const { left, top } = this.canvas.getBoundingClientRect();
    const { width, height } = this.viewport();
    return [
      this.x + (clientX - left - width / 2) / this.scale,
      this.y + (clientY - top - height / 2) / this.scale,
    ];
  }

  // keeps the point of the file at (clientX, clientY) where it is
  zoomAt(factor, clientX, clientY) {
    if (!this.size) return;
    const [x, y] = this.toFile(clientX, clientY);
    const scale = Math.min(Math.max(this.scale * factor, this.fitted / 2), MAX_SCALE);
    this.x = x + ((this.x - x) * this.scale) / scale;
    this.y = y + ((this.y - y) * this.scale) / scale;
    this.scale = scale;
    this.moved();
  }

  zoom(factor) {
    const { left, top, width, height } = this.canvas.getBoundingClientRect();
    this.zoomAt(factor, left + width / 2, top + height / 2);
  }

  pan(dx, dy) {
    this.x -= dx / this.scale;
    this.y -= dy / this.scale;
    this.moved();
  }

  moved() {
    this.isFitted = false;
    this.x = Math.min(Math.max(this.x, 0), this.size.width);
    this.y = Math.min(Math.max(this.y, 0), this.size.height);
    this.redraw();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.sharpen(), SHARP_AFTER_MS);
  }

  reveal([x1, y1, x2, y2]) {
    const { width, height } = this.viewport();
    const inside =
      Math.abs((x1 + x2) / 2 - this.x) * this.scale < width / 2 &&
      Math.abs((y1 + y2) / 2 - this.y) * this.scale < height / 2;
    if (!inside) {
      this.x = (x1 + x2) / 2;
      this.y = (y1 + y2) / 2;
      this.moved();
    }
  }

  // asks for the visible part of the file if the picture is too coarse for it
  sharpen() {
    if (!this.size || !this.picture) return;
    const ratio = window.devicePixelRatio || 1;
    const coarse = this.picture.naturalWidth / this.size.width;
    if (coarse >= Math.min(1, this.scale * ratio)) return;
    const { width, height } = this.viewport();
    const x = Math.max(0, Math.floor(this.x - width / this.scale / 2));
    const y = Math.max(0, Math.floor(this.y - height / this.scale / 2));
    const w = Math.min(this.size.width - x, Math.ceil(width / this.scale) + 2);
    const h = Math.min(this.size.height - y, Math.ceil(height / this.scale) + 2);
    if (w < 1 || h < 1) return;
    const image = new Image();
    const size = this.size;
    image.onload = () => {
      if (this.size !== size) return;
      this.detail = { image, x, y, w, h };
      this.redraw();
    };
    image.src = this.source(`${x},${y},${w},${h}`);
  }

  // ---- pointers

  down(event) {
    if (!this.size || (event.pointerType === "mouse" && event.button > 1)) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    if (this.pointers.size > 1) {
      this.gesture = "pinch";
      this.box = null;
      return;
    }
    this.start = [event.clientX, event.clientY];
    const draws = event.button === 0 && (this.adds || event.shiftKey);
    this.gesture = draws ? "box" : "press";
  }

  move(event) {
    if (!this.size) return;
    const [x, y] = this.toFile(event.clientX, event.clientY);
    this.on.place(x, y, this.scale);
    const before = this.pointers.get(event.pointerId);
    if (!before) {
      this.canvas.classList.toggle("points", !this.adds && this.at([x, y]) !== null);
      return;
    }
    if (this.gesture === "pinch" && this.pointers.size === 2) {
      const old = [...this.pointers.values()];
      this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
      const now = [...this.pointers.values()];
      const [mx, my] = middle(now);
      const [ox, oy] = middle(old);
      this.pan(mx - ox, my - oy);
      this.zoomAt(distance(now) / Math.max(distance(old), 1), mx, my);
      return;
    }
    this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    const far = Math.hypot(event.clientX - this.start[0], event.clientY - this.start[1]) > DRAG_PX;
    if (this.gesture === "press" && far) {
      this.gesture = "pan";
      this.canvas.classList.add("pans");
    }
    if (this.gesture === "pan") this.pan(event.clientX - before[0], event.clientY - before[1]);
    if (this.gesture === "box" && (far || this.box)) {
      const [a, b] = this.toFile(...this.start);
      this.box = [Math.min(a, x), Math.min(b, y), Math.max(a, x), Math.max(b, y)];
      this.redraw();
    }
  }

  up(event) {
    if (!this.pointers.delete(event.pointerId)) return;
    this.canvas.classList.remove("pans");
    const { gesture, box } = this;
    if (this.pointers.size === 0) {
      this.gesture = null;
      this.box = null;
    }
    if (event.type === "pointercancel" || gesture === "pinch") return;
    const point = this.toFile(event.clientX, event.clientY);
    if (gesture === "press") this.on.select(this.at(point));
    if (gesture === "box") this.on.add(box, point);
    this.redraw();
  }

  wheel(event) {
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 16 : 1;
    this.zoomAt(Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.01 : 0.0016)), event.clientX, event.clientY);
    if (this.size) this.on.place(...this.toFile(event.clientX, event.clientY), this.scale);
  }

  // what can be selected
  candidates() {
    const found = this.objects?.boxes.length ?? 0;
    return [...this.shown, ...this.removed, ...this.added.map((_, index) => found + index)];
  }

  // the smallest object at a point: by its outline, else by its box
  at([x, y]) {
    const found = this.objects?.boxes.length ?? 0;
    const slack = 3 / this.scale;
    let best = null;
    let least = Infinity;
    for (const index of this.candidates()) {
      const [x1, y1, x2, y2] = this.boxOf(index);
      if (x < x1 - slack || x > x2 + slack || y < y1 - slack || y > y2 + slack) continue;
      let size = (x2 - x1) * (y2 - y1);
      if (index < found && this.objects.outlines[index]?.length) {
        const inside = scratch.isPointInPath(this.paths[index], x, y, "evenodd");
        if (!inside) size += 1e9; // its box only
      }
      if (size < least) [best, least] = [index, size];
    }
    return best;
  }

  // ---- drawing

  context() {
    return this.canvas.getContext("2d");
  }

  redraw() {
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    const ratio = window.devicePixelRatio || 1;
    const ctx = this.context();
    ctx.setTransform(1, 0, 0, 1, 0, 0);
    ctx.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (!this.size || !this.picture) return;
    const { width, height } = this.viewport();
    const scale = this.scale * ratio;
    ctx.setTransform(
      scale, 0, 0, scale,
      Math.round((width / 2 - this.x * this.scale) * ratio),
      Math.round((height / 2 - this.y * this.scale) * ratio),
    );
    ctx.imageSmoothingEnabled = this.scale < SMOOTH_BELOW;
    ctx.imageSmoothingQuality = "high";
    ctx.drawImage(this.picture, 0, 0, this.size.width, this.size.height);
    if (this.detail) {
      const { image, x, y, w, h } = this.detail;
      ctx.drawImage(image, x, y, w, h);
    }
    // lines are thinner than a pixel of the screen where objects are tiny
    const thin = Math.min(1, Math.max(0.45, Math.sqrt(this.scale))) / this.scale;
    ctx.lineJoin = "round";
    for (const [group, layer] of this.layers) {
      if (this.outlines) this.line(ctx, layer.outlines, this.colour(group), 1.4 * thin);
      if (this.boxes) this.line(ctx, layer.boxes, this.colour(group), thin);
    }
    ctx.setLineDash([4 * thin, 3 * thin]);
    for (const row of this.removed) this.line(ctx, this.paths[row], this.look.removed, thin);
    ctx.setLineDash([]);
    for (const box of this.added) this.line(ctx, rectangle(box), this.look.added, 1.6 * thin);
    if (this.box) this.line(ctx, rectangle(this.box), this.look.added, 1.6 * thin);
    if (this.selected !== null) {
      const found = this.objects.boxes.length;
      const path = this.selected < found ? this.paths[this.selected] : rectangle(this.boxOf(this.selected));
      ctx.fillStyle = this.look.fill;
      ctx.fill(path, "evenodd");
      this.line(ctx, path, this.look.selected, 2.6 * thin);
    }
  }

  line(ctx, path, colour, width) {
    if (this.scale > HALO_ABOVE) {
      ctx.strokeStyle = this.look.halo;
      ctx.lineWidth = width + 1.4 / this.scale;
      ctx.stroke(path);
    }
    ctx.strokeStyle = colour;
    ctx.lineWidth = width;
    ctx.stroke(path);
  }
}

const scratch = document.createElement("canvas").getContext("2d");

function rectangle([x1, y1, x2, y2]) {
  const path = new Path2D();
  path.rect(x1, y1, x2 - x1, y2 - y1);
  return path;
}

// rings of corners of pixels, which are cut, so that stairs become slopes; an object without a
// mask has its box
function outline(box, rings) {
  if (!rings?.length) return rectangle(box);
  const path = new Path2D();
  for (const points of rings) {
    for (let i = 0; i < points.length; i += 2) {
      const [x, y] = [points[i], points[i + 1]];
      const next = (i + 2) % points.length;
      const [dx, dy] = [points[next] - x, points[next + 1] - y];
      const cut = 0.5 / Math.max(Math.abs(dx), Math.abs(dy), 1);
      if (i) path.lineTo(x + cut * dx, y + cut * dy);
      else path.moveTo(x + cut * dx, y + cut * dy);
      path.lineTo(x + (1 - cut) * dx, y + (1 - cut) * dy);
    }
    path.closePath();
  }
  return path;
}

function isBright(picture) {
  const side = 24;
  const small = new OffscreenCanvas(side, side).getContext("2d");
  small.drawImage(picture, 0, 0, side, side);
  const { data } = small.getImageData(0, 0, side, side);
  let sum = 0;
  for (let i = 0; i < data.length; i += 4) sum += data[i] + data[i + 1] + data[i + 2];
  return sum / (3 * side * side) > BRIGHT;
}

const middle = ([[a, b], [c, d]]) => [(a + c) / 2, (b + d) / 2];
const distance = ([[a, b], [c, d]]) => Math.hypot(a - c, b - d);
