// jax.random's numbers: threefry2x32, keys folded from integers, uniform and normal float32.

const ROTATIONS = [
  [13, 15, 26, 6],
  [17, 29, 16, 24],
];

/** threefry2x32 of one pair under a key [high, low]; 20 rounds. */
function threefry([k0, k1], x0, x1) {
  const keys = [k0, k1, (k0 ^ k1 ^ 0x1bd11bda) >>> 0];
  x0 = (x0 + k0) >>> 0;
  x1 = (x1 + k1) >>> 0;
  for (let i = 0; i < 5; i++) {
    for (const r of ROTATIONS[i % 2]) {
      x0 = (x0 + x1) >>> 0;
      x1 = ((x1 << r) | (x1 >>> (32 - r))) >>> 0;
      x1 = (x1 ^ x0) >>> 0;
    }
    x0 = (x0 + keys[(i + 1) % 3]) >>> 0;
    x1 = (x1 + keys[(i + 2) % 3] + i + 1) >>> 0;
  }
  return [x0, x1];
}

/** jax.random.key of a seed below 2^32. */
export const key = (seed) => [0, seed >>> 0];

/** jax.random.fold_in. */
export const foldIn = (key, data) => threefry(key, 0, data >>> 0);

/** `count` numbers of jax.random.normal, float32. */
export function normal(key, count) {
  const numbers = new Float32Array(count);
  const bits = new Uint32Array(1);
  const asFloat = new Float32Array(bits.buffer);
  const low = Math.fround(-1 + 2 ** -24); // the smallest above -1
  const span = Math.fround(1 - low);
  for (let i = 0; i < count; i++) {
    const [a, b] = threefry(key, 0, i);
    bits[0] = ((a ^ b) >>> 9) | 0x3f800000;
    const uniform = Math.max(low, Math.fround(Math.fround((asFloat[0] - 1) * span) + low));
    numbers[i] = Math.SQRT2 * inverseErf(uniform);
  }
  return numbers;
}

const NEAR = [2.81022636e-8, 3.43273939e-7, -3.5233877e-6, -4.39150654e-6, 0.00021858087,
  -0.00125372503, -0.00417768164, 0.246640727, 1.50140941];
const FAR = [-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
  -0.0076224613, 0.00943887047, 1.00167406, 2.83297682];

/** Giles' approximation in single precision, which XLA uses. */
function inverseErf(x) {
  let w = -Math.log1p(-x * x);
  const coefficients = w < 5 ? NEAR : FAR;
  w = w < 5 ? w - 2.5 : Math.sqrt(w) - 3;
  return coefficients.reduce((sum, c) => sum * w + c, 0) * x;
}
