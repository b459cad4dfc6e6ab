// The result back into the photo: moebius_jax/imaging/crop.py's `paste` in JavaScript.

import { correction } from "./membrane.js";
import { resizeSquare } from "./resize.js";
import { rounded } from "./rounding.js";
import { bounds } from "./windows.js";

/**
 * Changes `rgb` ([height, width, 3]) where the window's hole is, fading out over `blur` pixels of the model's square;
 * colours are made to agree with the photo's where the fill ends.
 */
export function paste(rgb, height, width, result, size, window, blur) {
  const { top, left, side, labels, members } = window;
  const rows = [Math.max(top, 0), Math.min(top + side, height)];
  const columns = [Math.max(left, 0), Math.min(left + side, width)];
  const [h, w] = [rows[1] - rows[0], columns[1] - columns[0]];
  const hole = new Uint8Array(h * w);
  for (let y = 0; y < h; y++) {
    for (let x = 0; x < w; x++) hole[y * w + x] = members.has(labels[(y + rows[0]) * width + x + columns[0]]);
  }
  const filled = resizeSquare(result, size, side, 3);
  const fade = Math.min(blur * Math.max(1, side / size), room(hole, h, w, window, height, width) + 1);
  const weight = feather(hole, h, w, fade);
  const [photo, fill] = [new Uint8Array(3 * h * w), new Uint8Array(3 * h * w)];
  for (let y = 0; y < h; y++) {
    const [inPhoto, inFilled] = [(y + rows[0]) * width + columns[0], (y + rows[0] - top) * side + columns[0] - left];
    photo.set(rgb.subarray(3 * inPhoto, 3 * (inPhoto + w)), 3 * y * w);
    fill.set(filled.subarray(3 * inFilled, 3 * (inFilled + w)), 3 * y * w);
  }
  const known = new Uint8Array(h * w);
  for (let i = 0; i < known.length; i++) known[i] = weight[i] === 0;
  const added = correction(photo, fill, known, h, w);
  for (let y = 0; y < h; y++) {
    for (let x = 0; x < w; x++) {
      const share = weight[y * w + x];
      if (!share) continue;
      for (let c = 0; c < 3; c++) {
        const at = 3 * (y * w + x) + c;
        const to = 3 * ((y + rows[0]) * width + x + columns[0]) + c;
        rgb[to] = rounded((fill[at] + added[at]) * share + photo[at] * (1 - share));
      }
    }
  }
}

/** Pixels between the hole and the nearest edge of the window that lies inside the image. */
function room(hole, h, w, { top, left, side }, height, width) {
  const [first, last, low, high] = bounds(hole, h, w);
  let found = side;
  if (top > 0) found = Math.min(found, first);
  if (Math.min(top + side, height) < height) found = Math.min(found, h - 1 - last);
  if (left > 0) found = Math.min(found, low);
  if (Math.min(left + side, width) < width) found = Math.min(found, w - 1 - high);
  return found;
}

/** 1 in the hole, falling to 0 at `fade` pixels from it along a half cosine. */
function feather(hole, h, w, fade) {
  if (fade <= 0 || hole.every(Boolean)) return Float64Array.from(hole);
  const squared = distances(hole, h, w);
  return squared.map((d) => (d < fade * fade ? 0.5 + 0.5 * Math.cos((Math.PI * Math.sqrt(d)) / fade) : 0));
}

/** Squared distance of every pixel to the nearest one of the hole: lower envelopes of parabolas, axis by axis. */
function distances(hole, h, w) {
  const far = 1e12;
  const grid = Float64Array.from(hole, (inside) => (inside ? 0 : far));
  for (let x = 0; x < w; x++) envelope(grid, x, w, h);
  for (let y = 0; y < h; y++) envelope(grid, y * w, 1, w);
  return grid;
}

function envelope(grid, offset, stride, n) {
  const values = Float64Array.from({ length: n }, (_, i) => grid[offset + i * stride]);
  const lowest = new Int32Array(n);
  const from = new Float64Array(n + 1);
  from[0] = -Infinity;
  from[1] = Infinity;
  let k = 0;
  for (let q = 1; q < n; q++) {
    let crossing;
    do {
      const v = lowest[k];
      crossing = (values[q] + q * q - values[v] - v * v) / (2 * (q - v));
    } while (crossing <= from[k] && k-- > 0);
    k += 1;
    lowest[k] = q;
    from[k] = crossing;
    from[k + 1] = Infinity;
  }
  k = 0;
  for (let q = 0; q < n; q++) {
    while (from[k + 1] < q) k += 1;
    grid[offset + q * stride] = (q - lowest[k]) ** 2 + values[lowest[k]];
  }
}
