"""Compares small pictures with the full-size ones that they stand for.

Names and counts do not show that a folder is stale, sorted in another order or turned by EXIF tags.
Thumbnails do: that of a small picture must fit its own full-size picture, and no other one, nor its
own turned or mirrored, clearly better. Pictures that look alike fit equally well and pass.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from ..system import files
from . import images

_GRID = 32  # Largest side of a thumbnail, in pixels.
_MOST = 512  # Pictures that are compared; of more, these are spread evenly.
_FLAT = 2.0  # Standard deviation, of 255 levels, below which a thumbnail has no structure.
_COLOUR = 64.0  # Levels; a difference in colour of that much counts as 1.
_FLOOR = 0.002  # A misfit below this is none.
_BETTER = 4.0  # What fits this much better than the own picture is the one that is shown.
_OTHER = 0.15  # A photograph that fits worse shows something else.
_NOISE = 1.5  # In noise, whose pixels depend on the filter, this is too little to tell.
_SMOOTH = 0.2, 0.5  # Smoothness of noise and of photographs.
_TURNS = {
  'turned by 180 degrees': lambda a: a[:, ::-1, ::-1],
  'mirrored': lambda a: a[:, :, ::-1],
  'upside down and mirrored': lambda a: a[:, ::-1],
}
_QUARTER_TURNS = {  # Of square pictures: the size of others gives these away.
  'turned by 90 degrees': lambda a: a.swapaxes(1, 2)[:, ::-1],
  'turned by 270 degrees': lambda a: a.swapaxes(1, 2)[:, :, ::-1],
}


def check(
  full_dir: str,
  small_dir: str,
  pairs: Mapping[str, str],
  names: Sequence[str],
  full_label: str,
  small_label: str,
) -> None:
  """Checks that the small pictures show what the full-size pictures `names` show.

  Args:
    full_dir: the folder of the full-size pictures.
    small_dir: the folder of the small ones.
    pairs: the small picture of each full-size one.
    names: the full-size pictures to check; their neighbours in `pairs` are compared, too.
    full_label: the folder as the message names it.
    small_label: likewise.

  Raises:
    DataError: some do not, or a picture cannot be read.
  """
  order = [name for name in sorted(pairs) if files.is_file(os.path.join(full_dir, name))]
  row = {name: i for i, name in enumerate(order)}
  chosen = [row[name] for name in names][:: -(-len(names) // _MOST)]
  near = sorted({i + k for i in chosen for k in (-1, 0, 1) if 0 <= i + k < len(order)})
  near = near if len(near) <= 2 * _MOST else chosen
  order = [order[i] for i in near]
  full = [os.path.join(full_dir, name) for name in order]
  small = [os.path.join(small_dir, pairs[name]) for name in order]
  problems = find_problems(*read_thumbnails(full, small, f'comparing {small_label}'))
  if not problems:
    return
  first, problem = min(problems.items())
  shows = problem if isinstance(problem, str) else f'shows {order[problem]!r}, not'
  raise images.DataError(
    f'{small_dir}: {len(problems)} of {len(order)} pictures do not match those of {full_label}: '
    f'{pairs[order[first]]!r} {shows} {order[first]!r}. Remove {small_label} (it is made again), '
    'or make it from the pictures that were posed.'
  )


def read_thumbnails(
  full: Sequence[str], small: Sequence[str], label: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns thumbnails of full-size and small pictures, [n, g, g, 3], and which are square, [n].

  If only one of a pair lies on its side, its EXIF tag is applied, as it will be for training.
  """
  headers = [(images.read_header(a), images.read_header(b)) for a, b in zip(full, small)]
  sides = [side for _, header in headers for side in (header.width, header.height)]
  grid = min(_GRID, max(1, min(sides) // 2))  # Half: filters differ at the scale of a pixel.

  def read(i: int) -> list[np.ndarray]:
    pair = headers[i]
    differ = (pair[0].width > pair[0].height) != (pair[1].width > pair[1].height)
    result = []
    for path, header in zip((full[i], small[i]), pair):
      thumbnail = images.thumbnail(path, (grid, grid))
      turn = differ and header.orientation >= 5
      result.append(images.turn(thumbnail, header.orientation) if turn else thumbnail)
      differ = differ and not turn
    return result

  both = np.array(images.in_threads(read, range(len(full)), label))  # [n, 2, g, g, 3]
  square = np.array([max(a.width, a.height) < 1.02 * min(a.width, a.height) for a, _ in headers])
  return both[:, 0], both[:, 1], square


def find_problems(full: np.ndarray, small: np.ndarray, square: np.ndarray) -> dict[int, int | str]:
  """Returns the rows whose small picture does not match, and why.

  Args:
    full: thumbnails, [n, g, g, 3].
    small: likewise.
    square: [n], whether quarter turns are possible.

  Returns:
    By row, the row of the full-size picture that is shown, or a phrase: 'is mirrored against'.
  """
  structure, colour = _misfit(full, small)
  total = structure + colour  # [n, n], full by small
  own = np.diagonal(total)
  flat = np.minimum(_spread(full), _spread(small)) < _FLAT
  others = np.where(np.eye(len(own), dtype=bool), np.inf, total)
  best = others.argmin(0)
  # The exposure may have been changed, so that the colour of pictures with structure is no proof.
  shape = np.where(flat, own, np.diagonal(structure))
  limit = np.where(flat, _OTHER, np.interp(_smoothness(small), _SMOOTH, (_NOISE, _OTHER)))
  foreign = shape > limit
  textured = np.ix_(~flat, ~flat)
  if (~flat).sum() > 2 and shape[~flat].mean() > max(0.2, 0.85 * structure[textured].mean()):
    foreign |= ~flat & (shape > 0.2)  # On the whole, they fit no better than any others.
  problems: dict[int, int | str] = {
    int(i): 'shows something else than' for i in np.flatnonzero(foreign)
  }
  for i in np.flatnonzero((own > _FLOOR) & (others.min(0) < own / _BETTER)):
    problems[int(i)] = int(best[i])
  for kinds, rows in ((_TURNS, own > _FLOOR), (_QUARTER_TURNS, (own > _FLOOR) & square)):
    for kind, turn in kinds.items():
      turned = np.diagonal(sum(_misfit(turn(full), small)))
      for i in np.flatnonzero(rows & (turned < own / _BETTER) & (turned <= others.min(0))):
        problems[int(i)] = f'is {kind} against'
  return problems


def _spread(thumbnails: np.ndarray) -> np.ndarray:
  """Returns the standard deviation of each thumbnail within its channels, [n]."""
  return np.sqrt(thumbnails.var((1, 2)).mean(-1))


def _misfit(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns how badly each `a` fits each `b` in structure and in mean colour, both [n, m].

  Structure is 1 - the correlation, which ignores brightness and contrast. Flat thumbnails have
  none; for these it is the squared difference.
  """
  mean_a, mean_b = a.mean((1, 2)), b.mean((1, 2))  # [n, 3]
  centred_a = (a - mean_a[:, None, None]).reshape(len(a), -1)
  centred_b = (b - mean_b[:, None, None]).reshape(len(b), -1)
  product = centred_a @ centred_b.T / max(1, centred_a.shape[1])  # [n, m]
  spread_a, spread_b = _spread(a)[:, None], _spread(b)[None]
  correlation = product / np.maximum(spread_a * spread_b, 1e-6)
  difference = (spread_a**2 + spread_b**2 - 2 * product) / _COLOUR**2
  is_flat = np.minimum(spread_a, spread_b) < _FLAT
  structure = np.where(is_flat, np.clip(difference, 0, 1), 1 - correlation)
  colour = np.square(mean_a[:, None] - mean_b[None]).mean(-1) / _COLOUR**2
  return structure, colour


def _smoothness(thumbnails: np.ndarray) -> np.ndarray:
  """Returns the correlation of neighbouring pixels, 0 to 1, [n]: about 0.9 in photographs.

  In noise it is 0. Its small pictures depend on how they were reduced.
  """
  if thumbnails.shape[1] < 4:
    return np.zeros(len(thumbnails))
  centred = thumbnails - thumbnails.mean((1, 2), keepdims=True)
  along_x = (centred[:, :, 1:] * centred[:, :, :-1]).mean((1, 2, 3))
  along_y = (centred[:, 1:] * centred[:, :-1]).mean((1, 2, 3))
  variance = np.maximum(np.square(centred).mean((1, 2, 3)), 1e-6)
  return np.clip((along_x + along_y) / (2 * variance), 0, 1)
