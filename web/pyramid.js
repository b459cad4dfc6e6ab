// Maps {values, height, width} of three channels at half and at twice their size: moebius_jax/imaging/pyramid.py in
// JavaScript, sums in the same order.

/** The mean of what is `known` ([height, width]) of every 2 x 2; where nothing is, 0 and unknown. */
export function halved({ values, height, width }, known) {
  const [h, w] = [Math.ceil(height / 2), Math.ceil(width / 2)];
  const half = { values: new Float64Array(3 * h * w), height: h, width: w };
  const found = new Uint8Array(h * w);
  for (let y = 0; y < h; y++) {
    for (let x = 0; x < w; x++) {
      const sum = [0, 0, 0];
      let count = 0;
      for (const [v, u] of [[2 * y, 2 * x], [2 * y, 2 * x + 1], [2 * y + 1, 2 * x], [2 * y + 1, 2 * x + 1]]) {
        if (v >= height || u >= width || !known[v * width + u]) continue;
        count += 1;
        for (let c = 0; c < 3; c++) sum[c] += values[3 * (v * width + u) + c];
      }
      found[y * w + x] = count > 0;
      for (let c = 0; c < 3; c++) half.values[3 * (y * w + x) + c] = sum[c] / Math.max(count, 1);
    }
  }
  return [half, found];
}

/** Twice the size, linearly, and of that [height, width]. */
export function doubled(map, height, width) {
  const { values: small, height: h, width: w } = map;
  const tall = new Float64Array(3 * height * w);
  for (let y = 0; y < height; y++) {
    const [near, far] = sources(y, h);
    for (let i = 0; i < 3 * w; i++) tall[3 * y * w + i] = (3 * small[3 * near * w + i] + small[3 * far * w + i]) / 4;
  }
  const values = new Float64Array(3 * height * width);
  for (let x = 0; x < width; x++) {
    const [near, far] = sources(x, w);
    for (let y = 0; y < height; y++) {
      for (let c = 0; c < 3; c++) {
        const [a, b] = [tall[3 * (y * w + near) + c], tall[3 * (y * w + far) + c]];
        values[3 * (y * width + x) + c] = (3 * a + b) / 4;
      }
    }
  }
  return { values, height, width };
}

/** Which of `n` positions a position of twice as many lies in, and which it lies next to. */
function sources(position, n) {
  const near = Math.floor(position / 2);
  return [near, Math.min(Math.max(near + (position % 2 ? 1 : -1), 0), n - 1)];
}

/** What is left of a map when it was halved so often, at its own size again. */
export function coarse(map, halvings) {
  if (!halvings) return map;
  const [half] = halved(map, new Uint8Array(map.height * map.width).fill(1));
  return doubled(coarse(half, halvings - 1), map.height, map.width);
}
