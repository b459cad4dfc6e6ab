// A window that was painted smaller than it is, painted again in tiles: moebius_jax/imaging/enlarge.py in JavaScript.

import { correction } from "./membrane.js";
import { coarse } from "./pyramid.js";
import { resizeHole, resizeSquare } from "./resize.js";
import { rounded, toEven } from "./rounding.js";

const LEAST_FACTOR = 1.25; // a picture that is enlarged by less is sharp enough
const STRIDE = 0.75; // of a tile: from one to the next
const FINE = 3; // 2³ = 8 pixels: a tile adds what is finer
const GRAIN = 3; // grey levels: what a tile adds is less by so much, and nothing below

/** The sizes a window is painted again at, each with the tiles that hold a part of its hole: {number, top, left}. */
export function planTiles(window, height, width, size) {
  let number = 0;
  const own = ownHole(window, height, width);
  return sides(window.side, size).map((side) => {
    const hole = resizeHole(own, window.side, side);
    const at = starts(side, size);
    const holds = (top, left) => {
      for (let y = top; y < top + size; y++) {
        for (let x = left; x < left + size; x++) if (hole[y * side + x]) return true;
      }
      return false;
    };
    const corners = at.flatMap((top) => at.map((left) => [top, left])).filter(([top, left]) => holds(top, left));
    return { side, tiles: corners.map(([top, left]) => ({ number: ++number, top, left })) };
  });
}

/**
 * A window {rgb, hole, side} as it was cut, painted at its own size. `first` is it as the model saw it, {size, image,
 * hole}, and as it `painted` it; `paint(image, hole, number)` paints a tile.
 */
export async function enlarge(window, stages, first, paint) {
  const { size } = first;
  const added = correction(first.image, first.painted, first.hole.map((inside) => !inside), size, size);
  let [picture, from] = [Uint8Array.from(first.painted, (level, i) => rounded(level + added[i])), size];
  for (const { side, tiles } of stages) {
    const known = resizeSquare(window.rgb, window.side, side, 3);
    const open = resizeHole(window.hole, window.side, side);
    picture = resizeSquare(picture, from, side, 3);
    picture = picture.map((level, i) => (open[Math.floor(i / 3)] ? level : known[i]));
    const sums = { side, colors: new Float32Array(side * side * 3), weights: new Float32Array(side * side) };
    for (const tile of tiles) {
      const image = cutTile(picture, side, size, tile, 3);
      const painted = await paint(image, cutTile(open, side, size, tile, 1), tile.number);
      add(sums, size, tile, image, painted);
    }
    picture = picture.map((level, i) => {
      const weight = sums.weights[Math.floor(i / 3)];
      return weight ? rounded(sums.colors[i] / weight) : level;
    });
    from = side;
  }
  return picture;
}

/** A tile fades out towards its edges, and adds what is fine alone. */
function add({ side, colors, weights }, size, { top, left }, image, painted) {
  const detail = fine(Float64Array.from(painted, (level, i) => level - image[i]), size);
  const ramp = (i) => Math.min(i + 1, size - i);
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      const weight = Math.min(ramp(y), ramp(x)) / size;
      const [at, here] = [(top + y) * side + left + x, y * size + x];
      weights[at] += weight;
      for (let c = 0; c < 3; c++) colors[3 * at + c] += weight * (image[3 * here + c] + detail[3 * here + c]);
    }
  }
}

/** What a tile adds to the picture it began from, of what it changed. */
function fine(change, size) {
  const { values } = coarse({ values: change, height: size, width: size }, FINE);
  return change.map((level, i) => Math.sign(level - values[i]) * Math.max(Math.abs(level - values[i]) - GRAIN, 0));
}

/** Sizes to paint a window of `side` pixels at, after `size`, growing evenly by a factor of 2 or less. */
function sides(side, size) {
  if (side < LEAST_FACTOR * size) return [];
  const steps = Math.ceil(Math.log2(side / size) - 1e-6);
  return Array.from({ length: steps }, (_, k) => toEven(size * (side / size) ** ((k + 1) / steps)));
}

/** Where tiles begin along one side, evenly spread. */
function starts(side, size) {
  const last = Math.ceil((side - size) / (STRIDE * size));
  const step = (side - size) / last; // the last is where it must be, whatever steps add up to
  return Array.from({ length: last + 1 }, (_, i) => (i < last ? toEven(i * step) : side - size));
}

/** The part of the hole that the window fills, over all of it. */
function ownHole({ top, left, side, labels, members }, height, width) {
  const own = new Uint8Array(side * side);
  for (let y = Math.max(top, 0); y < Math.min(top + side, height); y++) {
    for (let x = Math.max(left, 0); x < Math.min(left + side, width); x++) {
      if (members.has(labels[y * width + x])) own[(y - top) * side + x - left] = 1;
    }
  }
  return own;
}

function cutTile(data, side, size, { top, left }, channels) {
  const out = new Uint8Array(size * size * channels);
  for (let y = 0; y < size; y++) {
    const start = ((top + y) * side + left) * channels;
    out.set(data.subarray(start, start + size * channels), y * size * channels);
  }
  return out;
}
