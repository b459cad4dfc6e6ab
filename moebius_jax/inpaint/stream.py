"""Images of any size through a sampler that works on one square: cut, batch, run, paste.

With `SamplingOptions.refine`, a window that was shrunk to the square is then painted again in tiles.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8

from moebius_jax.errors import UserError
from moebius_jax.hardware import device_errors
from moebius_jax.imaging import crop, masks, release
from moebius_jax.imaging.enlarge import Enlargement, Tile, sides
from moebius_jax.imaging.regions import Window, plan_windows
from moebius_jax.inpaint.sampler import Sampler, SamplingOptions, StepCallback
from moebius_jax.schema import AtLeast0, AtLeastZero, checked

Rgb = UInt8[np.ndarray, "H W 3"]
Mode = Literal["crop", "release"]
LARGEST_WINDOW = 2**14  # pixels a side: 20 to 60 GB while it is pasted
MOST_WINDOWS = 2**12  # of an image: their tiles are numbered from there on, so that no two squares draw alike
UNMATCHED_BLUR = 4.0  # pixels: hides an edge, where nothing else does
AHEAD = 4  # batches of items that may wait for one before them, in memory


@checked
class InpaintOptions:
    """How images meet the model's square.

    Attributes:
        mode: "crop" keeps the image's size: it cuts around the mask and pastes back. "release" does what
            the release does: everything is squashed to the model's square and stays there.
        invert_mask: black = repaint.
        mask_dilation: side of the square masks are dilated with, in pixels of the image ("crop") or of the
            model ("release").
        mask_blur: width of the fade of the result into the image, in pixels of the model's square (of a
            refined picture, the image's); "crop" only. None: 0 where colours are matched, else 4.
        padding_mask_crop: pixels of context around a region; None leaves half its size. "crop" only.
        match_color: the result's colours are made to agree with the image's around the hole: all along its
            edge ("crop"), on average ("release", as the release can). None: in "crop" mode alone.
        paste: keep the known pixels of the original; False returns the model's whole picture ("release"
            only).

    Raises:
        UserError: a value is out of range.
    """

    mode: Mode = "crop"
    invert_mask: bool = False
    mask_dilation: AtLeastZero = 0
    mask_blur: AtLeast0 | None = None
    padding_mask_crop: AtLeastZero | None = None
    match_color: bool | None = None
    paste: bool = True

    def __post_init__(self) -> None:
        if self.mode == "crop" and not self.paste:
            raise UserError("paste=False needs mode='release': a cropped result has no other place to go")

    @property
    def matches_color(self) -> bool:
        """`match_color`, or what it is by default."""
        return self.mode == "crop" if self.match_color is None else self.match_color

    @property
    def blur(self) -> float:
        """`mask_blur`, or what it is by default."""
        if self.mask_blur is not None:
            return self.mask_blur
        return 0.0 if self.matches_color else UNMATCHED_BLUR


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One image to inpaint.

    Attributes:
        rgb: [H, W, 3].
        mask: grey levels [H, W], white = repaint; in "crop" mode of the image's size.
        seed, index: what its random numbers come from, each 0 to 2³² - 1.
        noise: [h, w, c] to start from, instead of drawn; all items of a stream have it, or none. Its hole
            must fit one square.
        name, mask_name: for messages.
        tag: whatever the caller wants back with the result.
    """

    rgb: Rgb
    mask: UInt8[np.ndarray, "h w"]
    seed: int = 0
    index: int = 0
    noise: Float[np.ndarray, "h w c"] | None = None
    name: str = "image"
    mask_name: str = "mask"
    tag: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What became of an item: its picture, or the error that kept it from having one."""

    item: Item
    rgb: Rgb | None = None
    error: UserError | None = None


@dataclasses.dataclass(kw_only=True)
class _Row:
    """One square of one item on its way through the sampler; of a window that is painted again, a tile."""

    image: Rgb
    hole: Bool[np.ndarray, "S S"]
    window: Window | None
    number: int
    job: "_Job"
    enlargement: Enlargement | None = None
    tile: Tile | None = None


@dataclasses.dataclass(kw_only=True)
class _Job:
    """An item and what of it is done; items are numbered as they come."""

    item: Item
    number: int = 0
    rgb: Rgb | None = None
    left: int = 0
    error: UserError | None = None

    @property
    def is_done(self) -> bool:
        return self.left == 0 or self.error is not None

    def result(self) -> Result:
        return Result(item=self.item, rgb=None if self.error else self.rgb, error=self.error)


def inpaint_stream(
    sampler: Sampler,
    items: Iterable[Item],
    options: InpaintOptions,
    sampling: SamplingOptions,
    *,
    batch_size: int,
    callback: StepCallback | None = None,
) -> Iterator[Result]:
    """Inpaints items as they come and yields results in the same order.

    The squares of several items share batches of one fixed size; the last is filled up with repetitions.
    While the devices work on one batch, the next is prepared and the one before is pasted.

    Args:
        sampler: runs batches.
        items: read lazily.
        options, sampling: how.
        batch_size: a multiple of the sampler's devices.
        callback: see `Sampler`.
    """
    rows: collections.deque[_Row] = collections.deque()
    tiles: collections.deque[_Row] = collections.deque()
    jobs: collections.deque[_Job] = collections.deque()
    running: _Batch | None = None
    source = iter(items)
    numbers = itertools.count()
    exhausted = False
    while not exhausted or rows or tiles or running:
        while not exhausted and max(len(rows), len(tiles)) < batch_size and len(jobs) < AHEAD * batch_size:
            item = next(source, None)
            if item is None:
                exhausted = True
            else:
                job = _prepare(item, options, sampler, rows)
                job.number = next(numbers)
                jobs.append(job)
                while jobs and jobs[0].is_done:
                    yield jobs.popleft().result()
        started = None
        # Tiles first, so that pictures are finished in their order, but in full batches where more may come.
        if len(tiles) >= batch_size or (tiles and not rows):
            started = _start(sampler, tiles, sampling.refining, batch_size, callback)
        elif rows:
            started = _start(sampler, rows, sampling, batch_size, callback)
        if running and (again := _finish(running, options, sampling)):
            tiles = collections.deque(sorted((*tiles, *again), key=lambda row: row.job.number))
        running = started
        while jobs and jobs[0].is_done:
            yield jobs.popleft().result()


def _prepare(item: Item, options: InpaintOptions, sampler: Sampler, rows: collections.deque[_Row]) -> _Job:
    """Cuts an item into rows; an item with nothing to repaint has none."""
    job = _Job(item=item)
    try:
        new = (_squash if options.mode == "release" else _cut)(item, options, sampler, job)
    except UserError as error:
        job.error = error
        return job
    except MemoryError:
        job.error = _too_large(item)
        return job
    if item.noise is not None and len(new) > 1:
        job.error = UserError(
            f"{item.name}: its hole takes {len(new)} squares, and latents are for one; mode='release' makes "
            "it one"
        )
        return job
    job.left = len(new)
    rows.extend(new)
    return job


def _squash(item: Item, options: InpaintOptions, sampler: Sampler, job: _Job) -> list[_Row]:
    grey = masks.grey_levels(item.mask, invert=options.invert_mask, name=item.mask_name)
    image, hole = release.prepare(item.rgb, grey, sampler.image_size, options.mask_dilation)
    job.rgb = image
    if options.paste and not hole.any():
        return []
    return [_Row(image=image, hole=hole, window=None, number=0, job=job)]


def _cut(item: Item, options: InpaintOptions, sampler: Sampler, job: _Job) -> list[_Row]:
    if item.mask.shape != item.rgb.shape[:2]:
        (h, w), (H, W) = item.mask.shape, item.rgb.shape[:2]
        raise UserError(
            f"{item.mask_name}: the mask is {w} x {h} pixels and {item.name} is {W} x {H}; they must agree"
        )
    job.rgb = item.rgb
    grey = masks.grey_levels(item.mask, invert=options.invert_mask, name=item.mask_name)
    hole = masks.dilate(grey > masks.THRESHOLD, options.mask_dilation)
    if not hole.any():
        return []
    size = sampler.image_size
    new = []
    for number, window in enumerate(plan_windows(hole, size, options.padding_mask_crop)):
        if window.side > LARGEST_WINDOW:
            raise UserError(
                f"{item.name}: the hole and what is around it need a square of {window.side} pixels; "
                f"expected {LARGEST_WINDOW} or fewer. Repaint a smaller part, or a smaller copy"
            )
        image, square = crop.cut(item.rgb, hole, window, size)
        masks.warn_if_thin(square, size // sampler.config.latent_size, window.side / size, item.mask_name)
        new.append(_Row(image=image, hole=square, window=window, number=number, job=job))
    return new


@dataclasses.dataclass(kw_only=True)
class _Batch:
    rows: list[_Row]
    images: jax.Array
    finite: jax.Array


def _start(
    sampler: Sampler,
    rows: collections.deque[_Row],
    sampling: SamplingOptions,
    batch_size: int,
    callback: StepCallback | None,
) -> _Batch | None:
    """Starts a batch of the first rows; those of items that have failed are dropped."""
    taken: list[_Row] = []
    while rows and len(taken) < batch_size:
        row = rows.popleft()
        if row.job.error is None:
            taken.append(row)
    if not taken:
        return None
    with device_errors(f"a batch of {batch_size} squares"):
        filled = taken + [taken[0]] * (batch_size - len(taken))
        seeds = np.array([(row.job.item.seed, row.job.item.index, row.number) for row in filled], np.uint32)
        images, finite = sampler(
            np.stack([row.image for row in filled]),
            np.stack([row.hole for row in filled]),
            seeds,
            sampling,
            callback,
            _given_noise(filled),
        )
    return _Batch(rows=taken, images=images, finite=finite)


def _given_noise(rows: list[_Row]) -> Float[np.ndarray, "B h w c"] | None:
    if rows[0].job.item.noise is None or rows[0].tile is not None:
        return None
    return np.stack([row.job.item.noise for row in rows])


def _finish(batch: _Batch, options: InpaintOptions, sampling: SamplingOptions) -> list[_Row]:
    """Takes a batch's squares back; returns what is to be painted again of them."""
    # Dispatch is asynchronous: the devices' errors come here.
    with device_errors(f"a batch of {len(batch.images)} squares"):
        images, finite = np.asarray(batch.images), np.asarray(batch.finite)
    again = []
    for row, image, is_finite in zip(batch.rows, images, finite, strict=False):
        job = row.job
        job.left -= 1
        if job.error is not None:
            continue
        if not is_finite:
            job.error = UserError(
                f"{job.item.name}: the network produced NaN or infinite numbers; if it computes in float16 "
                "they may have left its range: use bfloat16 or float32 (dtype, vae_dtype)"
            )
            continue
        try:
            again += _put(row, image, options, sampling)
        except MemoryError:
            job.error = _too_large(job.item)
    return again


def _put(row: _Row, image: Rgb, options: InpaintOptions, sampling: SamplingOptions) -> list[_Row]:
    """Pastes what was painted; of a window that is not as large yet, returns the tiles it goes on with."""
    job, window = row.job, row.window
    if window is None:
        job.rgb = image
        if options.paste:
            job.rgb = release.paste(row.image, image, row.hole, compensate=options.matches_color)
        return []
    enlargement = row.enlargement
    if enlargement is not None and not enlargement.put(row.tile, image):
        return []  # others of its size are on their way
    if enlargement is None and sampling.refine and sides(window.side, len(image)):
        enlargement = Enlargement(job.item.rgb, window, row.image, row.hole, image)
    if enlargement is not None and (tiles := enlargement.next_tiles()):
        job.left += len(tiles)
        return [_tile_row(tile, enlargement, row) for tile in tiles]
    result = image if enlargement is None else enlargement.painted
    job.rgb = crop.paste(job.rgb, result, window, blur=options.blur, match_color=options.matches_color)
    return []


def _tile_row(tile: Tile, enlargement: Enlargement, row: _Row) -> _Row:
    """`row` is any of the window's."""
    number = row.number % MOST_WINDOWS + MOST_WINDOWS * tile.number
    return dataclasses.replace(
        row, image=tile.image, hole=tile.hole, number=number, enlargement=enlargement, tile=tile
    )


def _too_large(item: Item) -> UserError:
    return UserError(f"{item.name}: too large for this machine's memory")
