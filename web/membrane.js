// Differences around a hole, continued into it: moebius_jax/imaging/membrane.py in JavaScript, sums in the same order.

import { doubled, halved } from "./pyramid.js";
import { bounds } from "./windows.js";

const SWEEPS = 4;
const MOST = 32; // grey levels a network may be off; what differs by more is something it did not paint

/** What to add to `painted` so that it meets `image` (both [height, width, 3]) at the edge of what is `known`. */
export function correction(image, painted, known, height, width) {
  const difference = new Float64Array(image.length); // by hand: `from` with a function takes ten times as long
  for (let i = 0; i < image.length; i++) difference[i] = Math.min(Math.max(image[i] - painted[i], -MOST), MOST);
  return membrane(difference, known, height, width);
}

/** Puts into `out` ([height, width, 3]) its continuation where it is not `known` ([height, width]), and returns it. */
export function membrane(out, known, height, width) {
  for (let i = 0; i < out.length; i++) if (!known[Math.floor(i / 3)]) out[i] = 0;
  if (known.every(Boolean)) return out;
  const [first, last, low, high] = bounds(known.map((inside) => !inside), height, width);
  const [top, left] = [Math.max(first - 1, 0), Math.max(low - 1, 0)];
  const [h, w] = [Math.min(last + 2, height) - top, Math.min(high + 2, width) - left];
  const [values, inside] = [new Float64Array(3 * h * w), new Uint8Array(h * w)];
  for (let y = 0; y < h; y++) {
    const start = (y + top) * width + left;
    values.set(out.subarray(3 * start, 3 * (start + w)), 3 * y * w);
    inside.set(known.subarray(start, start + w), y * w);
  }
  const map = continued({ values, height: h, width: w }, inside);
  for (let y = 0; y < h; y++) {
    out.set(map.values.subarray(3 * y * w, 3 * (y + 1) * w), 3 * ((y + top) * width + left));
  }
  return out;
}

/** The map of half the size, doubled, and a few sweeps over what is unknown. */
function continued(map, known) {
  if (known.every(Boolean) || !known.some(Boolean)) return map;
  const { height, width } = map;
  const { values } = doubled(continued(...halved(map, known)), height, width);
  known.forEach((inside, i) => inside && values.set(map.values.subarray(3 * i, 3 * i + 3), 3 * i));
  for (let turn = 0; turn < 2 * SWEEPS; turn++) {
    for (let y = 0; y < height; y++) {
      for (let x = (y + turn) % 2; x < width; x += 2) {
        if (!known[y * width + x]) relax(values, height, width, y, x);
      }
    }
  }
  return { values, height, width };
}

/** Makes a position the mean of its neighbours. */
function relax(values, height, width, y, x) {
  const at = 3 * (y * width + x);
  const neighbours = 4 - (y === 0) - (y === height - 1) - (x === 0) - (x === width - 1);
  for (let c = at; c < at + 3; c++) {
    let total = y > 0 ? values[c - 3 * width] : 0;
    if (y < height - 1) total += values[c + 3 * width];
    if (x > 0) total += values[c - 3];
    if (x < width - 1) total += values[c + 3];
    values[c] = total / neighbours;
  }
}
