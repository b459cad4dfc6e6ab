// Pillow's resampling of 8-bit maps, to the bit: two passes of fixed-point weights.

const BITS = 22;
const SUPPORT = 3;
const lanczos = (x) => (Math.abs(x) < SUPPORT ? sinc(x) * sinc(x / SUPPORT) : 0);

function sinc(x) {
  if (x === 0) return 1;
  return Math.sin(x * Math.PI) / (x * Math.PI);
}

/** For each output position, where its input starts and the weights from there on. */
function weights(from, to) {
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  const reach = SUPPORT * stretch;
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const start = Math.max(Math.trunc(centre - reach + 0.5), 0);
    const end = Math.min(Math.trunc(centre + reach + 0.5), from);
    const raw = [];
    for (let x = start; x < end; x++) raw.push(lanczos((x - centre + 0.5) / stretch));
    const sum = raw.reduce((a, b) => a + b, 0);
    const fixed = raw.map((w) => {
      const value = (sum ? w / sum : w) * 2 ** BITS;
      return Math.trunc(value < 0 ? value - 0.5 : value + 0.5);
    });
    return { start, fixed };
  });
}

/** One pass along rows; `data` is [rows, from, channels] of bytes. */
function pass(data, rows, from, to, channels) {
  const table = weights(from, to);
  const out = new Uint8Array(rows * to * channels);
  for (let y = 0; y < rows; y++) {
    for (let x = 0; x < to; x++) {
      const { start, fixed } = table[x];
      for (let c = 0; c < channels; c++) {
        let sum = 1 << (BITS - 1);
        let at = (y * from + start) * channels + c;
        for (const w of fixed) {
          sum += data[at] * w;
          at += channels;
        }
        out[(y * to + x) * channels + c] = Math.min(Math.max(Math.floor(sum / 2 ** BITS), 0), 255);
      }
    }
  }
  return out;
}

function transposed(data, rows, columns, channels) {
  const out = new Uint8Array(data.length);
  for (let y = 0; y < rows; y++) {
    for (let x = 0; x < columns; x++) {
      for (let c = 0; c < channels; c++) {
        out[(x * rows + y) * channels + c] = data[(y * columns + x) * channels + c];
      }
    }
  }
  return out;
}

/** A square hole of 0 and 1 at another side; a pixel is a hole if any of those it stands for is. */
export function resizeHole(hole, from, to) {
  if (from === to) return hole;
  const out = new Uint8Array(to * to);
  if (from < to) {
    // Added up, as Pillow does: what lies between two pixels may fall to either.
    const source = [];
    for (let at = (from / to) * 0.5; source.length < to; at += from / to) source.push(Math.floor(at));
    return out.map((_, i) => hole[source[Math.floor(i / to)] * from + source[i % to]]);
  }
  const start = (i) => Math.floor((2 * from * i + to) / (2 * to)); // of the pixels whose centres lie in it
  const ends = Array.from({ length: to }, (_, i) => [start(i), start(i + 1)]);
  const wide = new Uint8Array(from * to);
  for (let y = 0; y < from; y++) {
    const row = hole.subarray(y * from, (y + 1) * from);
    ends.forEach(([start, end], x) => (wide[y * to + x] = row.subarray(start, end).some(Boolean)));
  }
  ends.forEach(([start, end], y) => {
    for (let v = start; v < end; v++) for (let x = 0; x < to; x++) out[y * to + x] |= wide[v * to + x];
  });
  return out;
}

/** A square picture [from, from, channels] of bytes at another side. */
export function resizeSquare(data, from, to, channels) {
  if (from === to) return data;
  const wide = pass(data, from, from, to, channels); // rows first, as Pillow does
  const turned = transposed(wide, from, to, channels);
  return transposed(pass(turned, to, from, to, channels), to, to, channels);
}
