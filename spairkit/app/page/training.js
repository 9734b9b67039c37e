// The panel of the training: how it goes, and its model.

const WIDTH = 260;
const HEIGHT = 90;
const LEFT = 34;
const BOTTOM = 16;

const byId = (id) => document.getElementById(id);

export function showTraining(training, isUsed) {
  const runs = training?.status === "running" || training?.status === "stopping";
  byId("train").hidden = runs;
  byId("stop").hidden = !runs;
  byId("stop").disabled = training?.status === "stopping";
  byId("take").hidden = !training?.has_model || isUsed;
  byId("training-progress").hidden = !runs;
  byId("lines").hidden = !training?.lines.length;
  byId("training-words").textContent = words(training);
  if (!training) {
    byId("curve").hidden = true;
    return;
  }
  const progress = byId("training-progress");
  if (training.steps) progress.value = training.step / training.steps;
  else progress.removeAttribute("value"); // it has not begun to count
  const lines = byId("lines");
  const text = training.lines.join("\n");
  if (lines.textContent !== text) {
    lines.textContent = text;
    lines.scrollTop = lines.scrollHeight;
  }
  drawCurve(training.curve.filter((point) => Number.isFinite(point.found)));
}

function words(training) {
  if (!training) {
    return "SPAIR learns the objects of this folder without labels, in minutes on a CPU.";
  }
  const step = training.steps ? ` Step ${training.step} of ${training.steps}.` : "";
  return {
    running: `Training in ${training.run}.${step}`,
    stopping: "Saving …",
    done: `Done: ${training.run}.${training.is_doubtful ? " It shows signs of failure: look before you trust it." : ""}`,
    stopped: `Stopped and saved in ${training.run}.${step}`,
    failed: training.is_doubtful
      ? `Done, but the model shows signs of failure: ${training.run}/report.html says which.`
      : "The training ended with an error:",
  }[training.status];
}

// objects found at each validation
function drawCurve(points) {
  byId("curve").hidden = points.length < 2;
  if (points.length < 2) return;
  const svg = byId("curve").querySelector("svg");
  const top = Math.max(...points.map((point) => point.found), 1);
  const last = points[points.length - 1];
  const x = (step) => LEFT + ((WIDTH - LEFT - 4) * step) / Math.max(last.step, 1);
  const y = (found) => HEIGHT - BOTTOM - ((HEIGHT - BOTTOM - 8) * found) / top;
  const line = points.map((p, i) => `${i ? "L" : "M"}${x(p.step).toFixed(1)} ${y(p.found).toFixed(1)}`);
  svg.replaceChildren(
    make("line", { x1: LEFT, x2: WIDTH, y1: y(0), y2: y(0) }),
    make("line", { x1: LEFT, x2: WIDTH, y1: y(top), y2: y(top) }),
    make("text", { x: LEFT - 5, y: y(0), "text-anchor": "end" }, "0"),
    make("text", { x: LEFT - 5, y: y(top) + 7, "text-anchor": "end" }, top.toFixed(1)),
    make("text", { x: WIDTH, y: HEIGHT - 3, "text-anchor": "end" }, `step ${last.step}`),
    make("path", { d: line.join("") }),
  );
  const ap = Number.isFinite(last.ap) ? `, AP ${last.ap.toFixed(3)}` : "";
  byId("curve").querySelector("figcaption").textContent =
    `Objects in a crop at each validation; last ${last.found.toFixed(1)}${ap}`;
}

function make(name, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}
