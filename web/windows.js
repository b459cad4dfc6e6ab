// Where squares are cut around a hole: moebius_jax/imaging/regions.py in JavaScript, rule by rule.

const MERGE_GROWTH = 1.25;

/** Windows that together cover `hole` ([height, width] of 0 and 1): {top, left, side, labels, members} each. */
export function planWindows(hole, height, width, modelSize) {
  const least = Math.min(modelSize, height, width);
  const most = Math.max(height, width);
  const side = ([top, left, bottom, right]) => {
    const extent = Math.max(bottom - top, right - left);
    return Math.min(Math.max(extent + 2 * Math.floor((extent + 1) / 2), least), most);
  };
  const { labels, boxes } = regions(hole, height, width, Math.max(1, Math.floor(least / 8)));
  const groups = [];
  boxes.forEach((region, i) => {
    let box = region;
    let members = [i + 1];
    for (;;) {
      const near = groups.findIndex(
        ({ box: other }) => side(union(box, other)) <= MERGE_GROWTH * Math.max(side(box), side(other)),
      );
      if (near < 0) break;
      const [group] = groups.splice(near, 1);
      box = union(box, group.box);
      members = [...members, ...group.members];
    }
    groups.push({ box, members });
  });
  groups.sort((a, b) => compare([...a.box, ...a.members], [...b.box, ...b.members]));
  return groups.map(({ box, members }) => {
    const s = side(box);
    const [top, left] = [place(box[0], box[2], s, height), place(box[1], box[3], s, width)];
    return { top, left, side: s, labels, members: new Set(members) };
  });
}

function compare(a, b) {
  for (let i = 0; i < Math.min(a.length, b.length); i++) if (a[i] !== b[i]) return a[i] - b[i];
  return a.length - b.length;
}

const union = (a, b) => [
  Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[2], b[2]), Math.max(a[3], b[3]),
];

function place(low, high, side, length) {
  if (side >= length) return -Math.floor((side - length) / 2);
  return Math.min(Math.max(Math.floor((low + high - side) / 2), 0), length - side);
}

/** Connected regions; pixels in the same or in touching cells of a coarse grid count as connected. */
function regions(hole, height, width, cell) {
  const rows = Math.ceil(height / cell);
  const columns = Math.ceil(width / cell);
  const coarse = new Uint8Array(rows * columns);
  const cellOf = (y, x) => Math.floor(y / cell) * columns + Math.floor(x / cell);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) if (hole[y * width + x]) coarse[cellOf(y, x)] = 1;
  }
  const numbers = labelled(coarse, rows, columns);
  const labels = new Int32Array(height * width);
  const boxes = [];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (!hole[y * width + x]) continue;
      const label = numbers[cellOf(y, x)];
      labels[y * width + x] = label;
      boxes[label - 1] = union(boxes[label - 1] ?? [y, x, y + 1, x + 1], [y, x, y + 1, x + 1]);
    }
  }
  return { labels, boxes };
}

/** Numbers of the 8-connected regions, in the order their first cells come in. */
function labelled(coarse, rows, columns) {
  const numbers = new Int32Array(coarse.length);
  let count = 0;
  for (let first = 0; first < coarse.length; first++) {
    if (!coarse[first] || numbers[first]) continue;
    count += 1;
    const todo = [first];
    numbers[first] = count;
    while (todo.length) {
      const at = todo.pop();
      const y = Math.floor(at / columns);
      const x = at % columns;
      for (let v = Math.max(y - 1, 0); v <= Math.min(y + 1, rows - 1); v++) {
        for (let u = Math.max(x - 1, 0); u <= Math.min(x + 1, columns - 1); u++) {
          const next = v * columns + u;
          if (coarse[next] && !numbers[next]) {
            numbers[next] = count;
            todo.push(next);
          }
        }
      }
    }
  }
  return numbers;
}

/** First and last row, first and last column of a hole [height, width]. */
export function bounds(hole, height, width) {
  let [top, bottom, left, right] = [height, -1, width, -1];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (!hole[y * width + x]) continue;
      [top, bottom] = [Math.min(top, y), y];
      [left, right] = [Math.min(left, x), Math.max(right, x)];
    }
  }
  return [top, bottom, left, right];
}

/** A window of a map [height, width, channels] of bytes, mirrored where it reaches beyond the edges. */
export function extract(data, height, width, channels, { top, left, side }) {
  const out = new Uint8Array(side * side * channels);
  for (let y = 0; y < side; y++) {
    const row = mirror(top + y, height);
    for (let x = 0; x < side; x++) {
      const column = mirror(left + x, width);
      for (let c = 0; c < channels; c++) {
        out[(y * side + x) * channels + c] = data[(row * width + column) * channels + c];
      }
    }
  }
  return out;
}

function mirror(index, length) {
  if (length === 1) return 0;
  const period = 2 * (length - 1);
  const folded = ((index % period) + period) % period;
  return folded < length ? folded : period - folded;
}
