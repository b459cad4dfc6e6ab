// The page: a photo, strokes over it, the result in its place.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.webgpu.min.mjs";
import { Inpainter } from "./inpaint.js";

ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
ort.env.forceWasm = new URLSearchParams(location.search).has("wasm");

const MEGAPIXELS = 24; // a canvas of a phone holds hardly more
const element = (id) => document.getElementById(id);
const photo = element("photo").getContext("2d", { willReadFrequently: true });
const strokes = element("strokes").getContext("2d", { willReadFrequently: true });
const state = { inpainter: null, original: null, result: null, paths: [], isBusy: false };

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
}

const ready = Inpainter.load(ort, "model", (done, total) => say(`Loading the network … ${percent(done, total)}`))
  .then((inpainter) => {
    state.inpainter = inpainter;
    offerSchedules(inpainter.manifest);
    say(`Ready (${inpainter.provider === "webgpu" ? "WebGPU" : "WebAssembly"}).`);
    enable();
  })
  .catch((error) => say(`The network cannot be loaded: ${error.message}`, true));

/** Every schedule of the export; the model's own comes first. */
function offerSchedules({ schedules, solver, steps, refine }) {
  element("refining").hidden = !refine;
  const all = Object.entries(schedules).flatMap(([name, tables]) => Object.keys(tables).map((n) => [name, n]));
  const isOwn = ([name, n]) => name === solver && Number(n) === steps;
  const sorted = [...all.filter(isOwn), ...all.filter((one) => !isOwn(one))];
  element("steps").replaceChildren(...sorted.map(([name, n]) => new Option(`${n} (${name})`, `${name} ${n}`)));
}

class Stopped extends Error {}

const percent = (done, total) => `${Math.round((100 * done) / total)} %`;

function enable(isBusy = state.isBusy) {
  state.isBusy = isBusy;
  element("run").disabled = !state.inpainter || !state.original;
  element("run").textContent = isBusy ? "Stop" : "Inpaint";
  element("before").disabled = isBusy || !state.result;
  element("file").disabled = isBusy;
}

async function open(file) {
  if (!file || state.isBusy) return;
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    say(`${file.name || "That"} is not a picture this browser can read.`, true);
    return;
  }
  const { width, height } = bitmap;
  if (width * height > MEGAPIXELS * 1e6) {
    say(`${width} x ${height} pixels are more than the ${MEGAPIXELS} megapixels this page takes.`, true);
    return;
  }
  for (const { canvas } of [photo, strokes]) Object.assign(canvas, { width, height });
  photo.drawImage(bitmap, 0, 0);
  Object.assign(state, { original: photo.getImageData(0, 0, width, height), result: null, paths: [] });
  state.name = (file.name || "photo").replace(/\.[^.]*$/, "");
  element("download").hidden = true;
  say(state.inpainter ? `${width} x ${height} pixels. Paint over what should go.` : "Loading the network …");
  enable();
}

/** Strokes are kept as paths, so that one can be taken back. */
function draw({ width, points }) {
  Object.assign(strokes, { lineCap: "round", lineJoin: "round", strokeStyle: "#ff3366", lineWidth: width });
  strokes.beginPath();
  strokes.moveTo(...points[0]);
  for (const point of points) strokes.lineTo(...point);
  strokes.stroke();
}

function redraw() {
  strokes.clearRect(0, 0, strokes.canvas.width, strokes.canvas.height);
  state.paths.forEach(draw);
}

function paintFrom(event) {
  if (!state.original || state.isBusy) return;
  const canvas = strokes.canvas;
  const scale = canvas.width / canvas.getBoundingClientRect().width;
  const at = ({ offsetX, offsetY }) => [offsetX * scale, offsetY * scale];
  const path = { width: element("brush").value * scale, points: [at(event)] };
  state.paths.push(path);
  const move = (next) => {
    path.points.push(at(next));
    draw(path);
  };
  move(event);
  canvas.setPointerCapture(event.pointerId);
  canvas.onpointermove = move;
  canvas.onpointerup = canvas.onpointercancel = () => (canvas.onpointermove = null);
}

async function run() {
  if (state.isBusy) {
    state.isStopped = true;
    return;
  }
  const { width, height } = photo.canvas;
  const painted = strokes.getImageData(0, 0, width, height).data;
  const hole = Uint8Array.from({ length: width * height }, (_, i) => (painted[4 * i + 3] > 127 ? 1 : 0));
  if (!hole.some(Boolean)) {
    say("Nothing is marked: paint over what should go.", true);
    return;
  }
  const [solver, steps] = element("steps").value.split(" ");
  const bar = element("progress");
  enable(true);
  bar.hidden = false;
  bar.value = 0;
  state.isStopped = false;
  const started = performance.now();
  try {
    state.result = await inpaintPixels(state.result ?? state.original, hole, {
      seed: Number(element("seed").value),
      solver,
      steps: Number(steps),
      refine: element("refine").checked,
      onStep: (done, total) => {
        if (state.isStopped) throw new Stopped();
        bar.value = done / total;
        say(`Painting … ${percent(done, total)}`);
      },
    });
    photo.putImageData(state.result, 0, 0);
    state.paths = [];
    redraw();
    await offer();
    say(`Done in ${((performance.now() - started) / 1000).toFixed(1)} s.`);
  } catch (error) {
    if (error instanceof Stopped) say("Stopped; nothing is changed.");
    else say(`That failed: ${error.message}`, true);
  } finally {
    bar.hidden = true;
    enable(false);
  }
}

/** ImageData in, ImageData out; alpha stays. Also what tests call. */
async function inpaintPixels(pixels, hole, options) {
  await ready;
  const { width, height, data } = pixels;
  const rgb = Uint8Array.from({ length: 3 * width * height }, (_, i) => data[4 * Math.floor(i / 3) + (i % 3)]);
  const painted = await state.inpainter.inpaint(rgb, hole, height, width, options);
  const out = new ImageData(Uint8ClampedArray.from(data), width, height);
  for (let i = 0; i < painted.length; i++) out.data[4 * Math.floor(i / 3) + (i % 3)] = painted[i];
  return out;
}

async function offer() {
  const blob = await new Promise((done) => photo.canvas.toBlob(done, "image/png"));
  const link = element("download");
  URL.revokeObjectURL(link.href);
  Object.assign(link, { href: URL.createObjectURL(blob), download: `${state.name}_inpainted.png`, hidden: false });
}

element("file").onchange = (event) => open(event.target.files[0]);
element("run").onclick = run;
element("undo").onclick = () => {
  state.paths.pop();
  redraw();
};
element("clear").onclick = () => {
  state.paths = [];
  redraw();
};
element("strokes").onpointerdown = paintFrom;
element("before").onpointerdown = () => photo.putImageData(state.original, 0, 0);
element("before").onpointerup = element("before").onpointerleave = () =>
  state.result && photo.putImageData(state.result, 0, 0);
const stage = element("stage");
stage.ondragover = (event) => {
  event.preventDefault();
  stage.classList.add("over");
};
stage.ondragleave = () => stage.classList.remove("over");
stage.ondrop = (event) => {
  event.preventDefault();
  stage.classList.remove("over");
  open(event.dataTransfer.files[0]);
};
document.onpaste = (event) => open([...event.clipboardData.files][0]);
globalThis.moebius = { ready, inpaintPixels };
