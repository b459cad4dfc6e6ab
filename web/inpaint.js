// Inpainting with the programs of export.py: the steps of docs/export.md, the random numbers of the Python package.

import { foldIn, key, normal } from "./random.js";
import { enlarge, planTiles } from "./enlarge.js";
import { resizeHole, resizeSquare } from "./resize.js";
import { rounded } from "./rounding.js";
import { extract, planWindows } from "./windows.js";
import { paste } from "./paste.js";

const MOST_WINDOWS = 2 ** 12; // of an image: their tiles are numbered from there on
const DRAW = { imagePosterior: 0, maskedPosterior: 1, noise: 2, noiseOffset: 3 };

export class Inpainter {
  /** `ort` is onnxruntime-web; `folder` the URL of an export; `onProgress` is told bytes and total. */
  static async load(ort, folder, onProgress = () => {}) {
    const manifest = await (await found(`${folder}/manifest.json`)).json();
    if (manifest.format !== "moebius-jax-export" || manifest.kind !== "onnx") {
      throw new Error(`${folder}: not an export for onnxruntime (export.py MODEL FOLDER --format onnx)`);
    }
    const files = Object.entries(manifest.programs).map(([name, { files }]) => [name, files[0]]);
    const total = files.reduce((sum, [, { bytes }]) => sum + bytes, 0);
    let done = 0;
    const sessions = {};
    const provider = await provides(ort);
    for (const [name, { file, bytes }] of files) {
      const content = new Uint8Array(await (await found(`${folder}/${file}`)).arrayBuffer());
      sessions[name] = await ort.InferenceSession.create(content, { executionProviders: [provider] });
      done += bytes;
      onProgress(done, total);
    }
    return new Inpainter(ort, manifest, sessions, provider);
  }

  constructor(ort, manifest, sessions, provider) {
    Object.assign(this, { ort, manifest, sessions, provider });
  }

  /**
   * Paints `hole` ([height, width] of 0 and 1) of `rgb` ([height, width, 3] of bytes); returns new bytes.
   * Options: seed, index, solver and steps (of the manifest's schedules), blur, guidanceScale, onStep(done, total);
   * refine: whether a large hole is painted again in tiles, where the model is meant to be.
   */
  async inpaint(rgb, hole, height, width, options = {}) {
    const { seed = 0, index = 0, blur = 0, refine = true, onStep = () => {} } = options;
    // Exports of before had no schedule of their own.
    const { solver = this.manifest.solver ?? "ddim", steps = this.manifest.steps ?? 20 } = options;
    const { guidanceScale = this.manifest.guidance_scale } = options;
    const table = this.manifest.schedules[solver]?.[steps];
    if (!table) throw new Error(`no schedule of ${steps} steps of ${solver} in this export`);
    const size = this.manifest.image_size;
    const out = Uint8Array.from(rgb);
    const windows = hole.some(Boolean) ? planWindows(hole, height, width, size) : [];
    const again = table.refining && refine;
    const plans = windows.map((window) => (again ? planTiles(window, height, width, size) : []));
    const tiles = plans.flat().reduce((sum, { tiles }) => sum + tiles.length, 0);
    const total = windows.length * table.timesteps.length + (again ? tiles * table.refining.timesteps.length : 0);
    let done = 0;
    const tick = () => onStep(++done, total);
    const random = (number) => foldIn(foldIn(key(seed), index), number);
    for (const [number, window] of windows.entries()) {
      const { side } = window;
      const cut = { rgb: extract(rgb, height, width, 3, window), hole: extract(hole, height, width, 1, window), side };
      const image = resizeSquare(cut.rgb, side, size, 3);
      const open = resizeHole(cut.hole, side, size);
      const painted = await this.square(image, open, random(number), table, guidanceScale, tick);
      if (!plans[number].length) {
        paste(out, height, width, painted, size, window, blur);
        continue;
      }
      const first = { size, image, hole: open, painted };
      const paint = (tile, inside, k) => {
        const numbered = random((number % MOST_WINDOWS) + MOST_WINDOWS * k);
        return this.square(tile, inside, numbered, table.refining, guidanceScale, tick);
      };
      const whole = await enlarge(cut, plans[number], first, paint);
      paste(out, height, width, whole, side, window, blur);
    }
    return out;
  }

  /** One square of the model's size: bytes in, bytes out. */
  async square(rgb, hole, random, table, guidanceScale, onStep) {
    const { image_size: size, factor, latent_shape: shape, noise_offset: offset } = this.manifest;
    const [h, w, c] = shape;
    const count = h * w * c;
    const image = Float32Array.from(rgb, (level) => level / 127.5 - 1);
    const visible = image.map((value, i) => value * (1 - hole[Math.floor(i / 3)]));
    const draw = (which, n) => normal(foldIn(random, which), n);
    const imageLatents = await this.encode(image, draw(DRAW.imagePosterior, count));
    const maskedLatents = await this.encode(visible, draw(DRAW.maskedPosterior, count));
    const mask = Float32Array.from({ length: h * w }, (_, i) => {
      const [y, x] = [Math.floor(i / w), i % w];
      return hole[y * factor * size + x * factor];
    });
    const [noise, constant] = [draw(DRAW.noise, count), draw(DRAW.noiseOffset, c)];
    let latents = imageLatents.map(
      (value, i) => table.start_alpha * value + table.start_sigma * (noise[i] + offset * constant[i % c]),
    );
    let before = new Float32Array(count);
    for (const [i, timestep] of table.timesteps.entries()) {
      const step = await this.run("step", {
        latents: [latents, [1, ...shape]],
        before: [before, [1, ...shape]],
        mask: [mask, [1, h, w, 1]],
        masked_latents: [maskedLatents, [1, ...shape]],
        timestep: [Int32Array.of(timestep), [1]],
        coefficients: [Float32Array.from(table.coefficients[i]), [5]],
        guidance_scale: [Float32Array.of(guidanceScale), [1]],
      });
      [latents, before] = [step.new_latents, step.clean];
      onStep();
    }
    const { images } = await this.run("decoder", { latents: [latents, [1, ...shape]] });
    if (!images.every(Number.isFinite)) throw new Error("the network produced NaN or infinite numbers");
    return Uint8Array.from(images, (value) => rounded((value / 2 + 0.5) * 255));
  }

  async encode(image, noise) {
    const size = this.manifest.image_size;
    const { mean, std } = await this.run("encoder", { images: [image, [1, size, size, 3]] });
    return mean.map((value, i) => value + std[i] * noise[i]);
  }

  async run(name, inputs) {
    const feeds = {};
    for (const [input, [data, dims]] of Object.entries(inputs)) {
      // A program need not have an input it does not look at.
      if (!this.sessions[name].inputNames.includes(input)) continue;
      feeds[input] = new this.ort.Tensor(data instanceof Int32Array ? "int32" : "float32", data, dims);
    }
    const outputs = await this.sessions[name].run(feeds);
    await new Promise((next) => setTimeout(next)); // WebAssembly leaves the page no time to draw, or to hear a click
    return Object.fromEntries(Object.entries(outputs).map(([output, tensor]) => [output, tensor.data]));
  }
}

async function found(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  return response;
}

/** WebGPU where there is an adapter, else WebAssembly. */
async function provides(ort) {
  if (ort.env.forceWasm) return "wasm";
  const adapter = await navigator.gpu?.requestAdapter?.().catch(() => null);
  return adapter ? "webgpu" : "wasm";
}
