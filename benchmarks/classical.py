"""Is the network that comes along better than painting without one? LPIPS in the hole, beside classics.

    python -m benchmarks.classical PHOTOS --size 128 --squares 8      # at the network's own size
    python -m benchmarks.classical PHOTOS --size 512 --squares 16     # cut out, inpainted, pasted back

Random squares of at least SIZE pixels of every photograph in a folder that is as large, with LaMa's
medium and thick masks, the same for all methods: OpenCV's Telea and Navier-Stokes, scikit-image's
biharmonic equation. Means with 95 % intervals of 10,000 bootstrap draws; pictures of the best, the median
and the worst case with `--picture`. Needs the `eval` extra and opencv-python-headless.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import parser, report, told
from moebius_jax import MoebiusInpaintPipeline
from moebius_jax.data.random_masks import mask_generator
from moebius_jax.evaluation.metrics.lpips import LPIPS
from moebius_jax.imaging.picture import SUFFIXES, read_picture
from moebius_jax.sharding import make_mesh

# Of image [H, W, 3], hole [H, W] and the number of the case.
Method = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
MASKS = ("medium_512", "thick_512")
CLASSICS = ("Telea", "Navier-Stokes", "biharmonic")
RADIUS = 3  # pixels of OpenCV's neighbourhood, its examples' own


def methods(model: str, settings: dict[str, object]) -> dict[str, Method]:
    import cv2
    from skimage.restoration import inpaint_biharmonic

    pipeline = MoebiusInpaintPipeline.from_pretrained(model)

    def opencv(flag: int) -> Method:
        return lambda image, hole, _: cv2.inpaint(image, hole.astype(np.uint8), RADIUS, flag)

    def biharmonic(image: np.ndarray, hole: np.ndarray, _: int) -> np.ndarray:
        found = inpaint_biharmonic(image / 255, hole, split_into_regions=True, channel_axis=-1)
        return np.uint8(np.round(found.clip(0, 1) * 255))

    def ours(image: np.ndarray, hole: np.ndarray, number: int) -> np.ndarray:
        # At a strength below 1 the start holds a trace of the original, the larger the fewer steps there are.
        options = {"mask_blur": 0, "output_type": "np", "image_indices": [number], "strength": 1.0}
        return pipeline([image], [np.uint8(hole) * 255], **options, **settings).images[0]

    classics = (opencv(cv2.INPAINT_TELEA), opencv(cv2.INPAINT_NS), biharmonic)
    return {model: ours, **dict(zip(CLASSICS, classics, strict=True))}


def cases(folder: Path, size: int, squares: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and holes, the same in every run."""
    found = []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES):
        image = Image.fromarray(read_picture(path).rgb)
        short = min(image.size)
        if short < size:
            continue
        rng = np.random.default_rng([len(found), size])
        for k in range(squares):
            side = int(np.exp(rng.uniform(np.log(size), np.log(short))))
            x, y = (int(rng.integers(n - side + 1)) for n in image.size)
            square = image.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.LANCZOS)
            found.append((np.asarray(square), mask_generator(MASKS[k % len(MASKS)])(rng, size)))
    return found


def interval(values: np.ndarray) -> str:
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(10_000, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{values.mean():.4f} ({low:.4f} to {high:.4f})"


def main() -> int:
    options = parser(__doc__, timed=False)
    options.add_argument("photos", type=Path)
    options.add_argument("--model", default="tiny")
    options.add_argument("--size", type=int, default=128)
    options.add_argument("--squares", type=int, default=8, help="of each photograph")
    options.add_argument("--steps", type=int, help="default: the model's")
    options.add_argument("--scheduler", help="default: the model's")
    options.add_argument("--refine", type=float, help="as sample.py's; default: the model's")
    options.add_argument("--match-color", action=argparse.BooleanOptionalAction, help="as sample.py's")
    options.add_argument("--picture", type=Path, help="original, hole, all methods: best, median, worst case")
    add = options.add_argument
    add("--against", nargs="*", choices=CLASSICS, default=CLASSICS, help="the last takes minutes at 512 px")
    args = options.parse_args()
    distance = LPIPS("alex", make_mesh())
    todo = cases(args.photos, args.size, args.squares)
    print(f"{len(todo)} cases, {np.mean([hole.mean() for _, hole in todo]):.0%} hole", file=sys.stderr)
    scores, results = {}, {}
    settings = {
        "num_inference_steps": args.steps,
        "scheduler": args.scheduler,
        "match_color": args.match_color,
        "refine": args.refine,
    }
    for name, method in methods(args.model, settings).items():
        if name not in (args.model, *args.against):
            continue
        results[name] = [method(image, hole, i) for i, (image, hole) in enumerate(todo)]
        scores[name] = np.array(
            [
                float(distance(result[None], image[None], hole[None])[1][0])
                for result, (image, hole) in zip(results[name], todo, strict=True)
            ]
        )
        print(f"{name}: {interval(scores[name])}", file=sys.stderr)
    ours = scores[args.model]
    if args.picture:
        draw(args.picture, todo, results, ours - np.min([s for n, s in scores.items() if n != args.model], 0))
    rows = [
        {
            "method": name,
            "LPIPS in the hole (95 %)": interval(values),
            "less than it": "" if name == args.model else interval(values - ours),
            "better in": "" if name == args.model else f"{(ours < values).mean():.0%}",
        }
        for name, values in scores.items()
    ]
    return report(told(rows), args)


def draw(path: Path, todo: list, results: dict[str, list[np.ndarray]], lead: np.ndarray) -> None:
    """Three rows: furthest ahead of the best classical method, in the middle, furthest behind."""
    order = np.argsort(lead)
    rows = []
    for i in (order[0], order[len(order) // 2], order[-1]):
        image, hole = todo[i]
        grey = np.where(hole[..., None], 255, image)
        rows.append(np.hstack([image, grey, *(pictures[i] for pictures in results.values())]))
    Image.fromarray(np.uint8(np.vstack(rows))).save(path, quality=90)


if __name__ == "__main__":
    sys.exit(main())
