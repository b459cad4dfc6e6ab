// Rounding as Python and NumPy do it: of two whole numbers that are equally near, the even one.

export function toEven(value) {
  const floor = Math.floor(value);
  if (value - floor !== 0.5) return Math.round(value);
  return floor % 2 ? floor + 1 : floor;
}

/** A level of a picture. */
export const rounded = (level) => Math.min(Math.max(toEven(level), 0), 255);
