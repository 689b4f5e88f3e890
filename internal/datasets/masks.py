"""Masks: which pixels of a photograph count, in training and in metrics.

A mask has the full size of its photograph or the size that is used. Its black (0) pixels do not
count; in lossy formats, those below half. A `dynamic_mask_a.png` is instant-ngp's, whose rule is
the reverse: its black pixels count. In photographs without a mask all pixels count.

A mask is found by its name. That of images/sub/a.jpg is, in this order of preference,
`masks/sub/a.jpg.png` (COLMAP), `masks/sub/a.jpg`, `masks/sub/a.png` (nerfstudio), or
`masks/a.png` if no other photograph is called a; the folder may also be mask/, or masks_4/ at
factor 4. `a_mask.png`, `a.mask.png`, `mask_a.png` and `dynamic_mask_a.png` count in these folders
and beside the photograph. Endings and case may differ. A transforms.json can name others.
"""

from __future__ import annotations

import collections
import itertools
import os
import re
import unicodedata
from collections.abc import Container, Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from ..system import files, warnings
from . import images

FOLDER = 'masks'

_IS_MASKS = re.compile(r'masks?', re.IGNORECASE)  # A folder of masks.
_IS_PYRAMID = re.compile(r'masks?_(\d+)', re.IGNORECASE)
_IGNORED = re.compile(r'(masks?|images?|rgb)(_\d+)?', re.IGNORECASE)  # Folders without meaning.
_AFFIX = re.compile(r'^(dynamic[_-])?masks?[_.-]+|[_.-]+(dynamic[_-])?masks?$', re.IGNORECASE)
_INVERTED = re.compile(r'dynamic[_-]mask', re.IGNORECASE)
_LIKE_MASKS = re.compile(r'mask|segment|silhouette|matte|^alphas?$', re.IGNORECASE)
_ARCHIVE = re.compile(r'\.(zip|7z|rar|tgz|tar(\.\w+)?)$', re.IGNORECASE)
_LOSSY = (*images.JPEG, '.webp')
# Formats in which masks come, but which cannot be read.
_FOREIGN = ('.npy', '.npz', '.gif', '.exr', '.tga', '.jp2', '.heic', '.avif', '.pbm', '.mat')
_COMPARED = 16  # Photographs with several masks, of which these are compared.


def photographs(names: Sequence[str], posed: Iterable[str] = ()) -> list[str]:
  """Returns the pictures of a folder that are not masks of others; `posed` ones never are."""
  posed = set(posed)
  marked = {name: None for name in names if name not in posed and _is_marked(name)}
  found = pair([name for name in names if name not in marked], list(marked)) if marked else {}
  beside = {mask for several in found.values() for mask in several}
  return [name for name in names if name not in beside]


def pair(pictures: Sequence[str], masks: Sequence[str]) -> dict[str, list[str]]:
  """Returns the masks of each picture that has any, best first, by their names alone.

  Names are paths with '/'. A mask belongs to the pictures that its name fits best.
  """
  index = _index(masks)
  twins = collections.Counter(images.stem(_split(name)[1]).casefold() for name in pictures)
  found, best = {}, {}
  for picture in pictures:
    levels = found[picture] = {}  # By mask; 0 is the best fit.
    for level, key in enumerate(_keys(picture, twins)):
      for mask in index.get(key, ()):
        levels.setdefault(mask, level)
    for mask, level in levels.items():
      best[mask] = min(level, best.get(mask, level))
  kept = {
    picture: sorted((m for m, level in levels.items() if level == best[m]), key=levels.get)
    for picture, levels in found.items()
  }
  return {picture: several for picture, several in kept.items() if several}


def _index(masks: Sequence[str]) -> dict[tuple[str, str, str], list[str]]:
  """Returns masks by (part of the name, folder, text): the parts that can name a picture."""
  index = collections.defaultdict(list)
  for mask in masks:
    folder, base = _split(mask)
    inner = images.stem(base)
    stripped = _AFFIX.sub('', inner)
    texts = {('same', base), ('inner', inner)} | ({('stripped', stripped)} - {('stripped', inner)})
    texts |= {('bare', images.stem(t)) for t in (inner, stripped) if _has_ending(t)}
    for kind, text in texts:
      index[kind, folder, text].append(mask)
      index[f'{kind} folded', folder.casefold(), text.casefold()].append(mask)
  return index


def _has_ending(name: str) -> bool:
  return name.lower().endswith(images.EXTENSIONS)


def _keys(picture: str, twins: collections.Counter) -> list[tuple[str, str, str]]:
  """Returns what to look for in `pair`'s index, best first."""
  folder, base = _split(picture)
  stem = images.stem(base)
  exact = [('inner', base), ('same', base), ('inner', stem)]
  exact += [('stripped', base), ('stripped', stem), ('bare', stem)]
  keys = [(kind, folder, text) for kind, text in exact]
  keys += [(f'{kind} folded', folder.casefold(), text.casefold()) for kind, text in exact]
  if folder and twins[stem.casefold()] == 1:
    keys += [(f'{kind} folded', '', text.casefold()) for kind, text in exact]
  return keys


def _split(name: str) -> tuple[str, str]:
  """Returns the folder, without parts such as images/ and masks/, and the file's name."""
  *parts, base = unicodedata.normalize('NFC', name).split('/')
  return '/'.join(part for part in parts if not _IGNORED.fullmatch(part)), base


def _is_marked(name: str) -> bool:
  """Whether a picture's name or folder says that it is a mask."""
  *parts, base = name.split('/')
  return bool(_AFFIX.search(images.stem(base))) or any(map(_IS_MASKS.fullmatch, parts))


def find(
  data_dir: str,
  pictures: Sequence[str],
  named: Sequence[str | None],
  unregistered: Sequence[str] = (),
  factor: int = 0,
) -> list[str | None]:
  """Returns the mask of each full-size picture, or None. All paths are relative to data_dir.

  Args:
    data_dir: the capture.
    pictures: the posed pictures.
    named: for each, the mask that the capture names itself, or None to look for one.
    unregistered: pictures without a pose. Their masks are not missed.
    factor: the downsampling factor.

  Warns of masks without a photograph, photographs without a mask, several masks of one photograph,
  and files and folders that look like masks and are not used.

  Raises:
    DataError: no mask of a folder of masks belongs to a photograph.
  """
  folders = {
    os.path.join(data_dir, name): [f'{name}/{mask}' for mask in list_masks(f'{data_dir}/{name}')]
    for name in find_folders(data_dir, factor)
  }
  pool = [*itertools.chain(*folders.values()), *_beside(data_dir, pictures)]
  paths = {mask: os.path.join(data_dir, mask) for mask in pool}
  found, used = match(data_dir, pictures, paths, named, unregistered)
  for folder, masks in folders.items():
    check_paired(folder, masks, used, pictures[0], required=not all(named))
  _warn_of_unused(data_dir, [mask for mask in found if mask], {*pictures, *pool})
  return found


def match(
  where: str,
  pictures: Sequence[str],
  paths: Mapping[str, str],
  named: Sequence[str | None] | None = None,
  unregistered: Sequence[str] = (),
) -> tuple[list[str | None], set[str]]:
  """Returns the mask of each picture, or None, and the masks that belong to any picture.

  `paths` has the path of each mask by the name that `pair` gets. Other arguments as for `find`;
  `where` is for the warnings.
  """
  pairs = pair([*pictures, *unregistered], list(paths))
  named = named or [None] * len(pictures)
  unnamed = {p: pairs[p] for p, mask in zip(pictures, named) if not mask and p in pairs}
  found = [mask or pairs.get(picture, [None])[0] for mask, picture in zip(named, pictures)]
  bare = [picture for picture, mask in zip(pictures, found) if not mask]
  if bare and any(found):
    warnings.warn(
      f'{where}: {len(found) - len(bare)} of {len(found)} photographs have a mask. In the '
      f'others all pixels count: {warnings.some(bare)}. {_expected(bare[0])}'
    )
  inverted = [mask for mask in found if mask and _is_inverted(mask)]
  if inverted:
    warnings.warn(
      f"{where}: {len(inverted)} masks follow instant-ngp's rule, since their names start with "
      f'dynamic_mask: their white pixels do not count. {warnings.some(inverted)}.'
    )
  _warn_of_several(where, unnamed, paths)
  return found, set(named) | set(itertools.chain(*pairs.values()))


def list_masks(folder: str) -> list[str]:
  """Lists the masks below a folder, also in formats that cannot be read."""
  return images.list_images(folder, images.EXTENSIONS + _FOREIGN)


def check_paired(
  where: str, masks: Sequence[str], used: Container[str], picture: str, required: bool = True
) -> None:
  """Warns if some masks are not `used`; raises a DataError if none is, but must be.

  `picture` is an example of a photograph.
  """
  unused = [mask for mask in masks if mask not in used]
  if not unused:
    return
  if required and len(unused) == len(masks):
    raise images.DataError(
      f'{where}: has {len(masks)} masks, but none has the name of a photograph: '
      f'{warnings.some(unused)}. {_expected(picture)} Rename them, or move the folder elsewhere to '
      'use all pixels.'
    )
  warnings.warn(
    f'{where}: {len(unused)} of {len(masks)} masks have no photograph and are not used: '
    f'{warnings.some(unused)}. {_expected(picture)}'
  )


def _expected(picture: str) -> str:
  name = re.sub(r'^images/', '', picture)
  stem = images.stem(name)
  return f'The mask of {picture!r} is {FOLDER}/{name}.png, {FOLDER}/{stem}.png or {stem}_mask.png.'


def find_folders(data_dir: str, factor: int = 0) -> list[str]:
  """Returns the folders of masks; masks_<factor>/ counts only without masks/."""
  names = sorted(name for name in os.listdir(data_dir) if _is_folder_of(data_dir, name))
  whole = [name for name in names if _IS_MASKS.fullmatch(name)]
  small = [name for name in names if (m := _IS_PYRAMID.fullmatch(name)) and int(m[1]) == factor]
  return sorted(whole, key=lambda name: name != FOLDER) or small


def _is_folder_of(data_dir: str, name: str) -> bool:
  is_like = _LIKE_MASKS.search(name) and name[0] != '.'
  return bool(is_like) and files.is_folder(f'{data_dir}/{name}')


def _beside(data_dir: str, pictures: Sequence[str]) -> list[str]:
  """Lists the masks in the top-level folders of the photographs, which may be data_dir itself."""
  found = []
  for folder in sorted({picture.partition('/')[0] for picture in pictures if '/' in picture}):
    found += [f'{folder}/{name}' for name in images.list_images(os.path.join(data_dir, folder))]
  if any('/' not in picture for picture in pictures):
    found += [n for n in sorted(os.listdir(data_dir)) if _has_ending(n)]
  posed = set(pictures)
  return [name for name in found if name not in posed and _is_marked(name)]


def _warn_of_unused(data_dir: str, used: Sequence[str], known: set[str]) -> None:
  """Warns of files and folders in data_dir that seem to be masks, but are not used."""
  known = {name.partition('/')[0] for name in known.union(used)}
  for name in sorted(os.listdir(data_dir)):
    is_folder = _is_folder_of(data_dir, name)
    if {name, re.sub(r'_\d+$', '', name)} & known or (_IS_PYRAMID.fullmatch(name) and used):
      continue
    if is_folder and (count := len(list_masks(f'{data_dir}/{name}'))):
      warnings.warn(
        f'{os.path.join(data_dir, name)}: its {count} files are not used. If they are the masks, '
        f'rename the folder to {FOLDER}/.'
      )
    elif 'mask' in name.lower() and _ARCHIVE.search(name) and not used:
      warnings.warn(
        f'{os.path.join(data_dir, name)}: is not used. If it has the masks, unpack it to {FOLDER}/.'
      )
    elif _is_marked(f'_{images.stem(name)}') and _has_ending(name):
      warnings.warn(
        f'{os.path.join(data_dir, name)}: is not used. If it is the mask of all photographs, name '
        f"it in the 'mask_path' of a transforms.json, or copy it to {FOLDER}/ for each photograph."
      )


def _warn_of_several(where: str, pairs: Mapping[str, list[str]], paths: Mapping[str, str]) -> None:
  """Warns of photographs with several masks that differ (some are compared)."""
  several = {picture: masks for picture, masks in pairs.items() if len(masks) > 1}
  sample = list(several)[:: -(-len(several) // _COMPARED) or 1]

  def differ(picture: str) -> bool:
    first, *others = (decode(paths[mask]) for mask in several[picture])
    return not all(np.array_equal(first, other) for other in others)

  different = [p for p, d in zip(sample, images.in_threads(differ, sample)) if d] if sample else []
  if different:
    first, *others = several[different[0]]
    warnings.warn(
      f'{where}: {len(several)} photographs have several masks, which differ. That of '
      f'{different[0]!r} is {first!r}, not {warnings.some(others)}. Remove the wrong ones.'
    )


def check(data_dir: str, mask: str, full: tuple[int, int], used: tuple[int, int]) -> None:
  """Checks the size of a mask.

  Args:
    data_dir: the capture.
    mask: the mask, relative to data_dir.
    full: (width, height) of the full-size picture.
    used: (width, height) of the picture that is used.

  Raises:
    DataNotFoundError: the mask is missing.
    DataError: it is not a picture, or has neither size.
  """
  path = images.inside(data_dir, mask)
  header = images.read_header(path)
  if (header.width, header.height) not in (tuple(full), tuple(used)):
    raise images.DataError(
      f'{path}: is {header.width}x{header.height} pixels, but its picture has {full[0]}x{full[1]}. '
      'A mask must have the size of its picture.'
    )


def _is_inverted(path: str) -> bool:
  return bool(_INVERTED.match(os.path.basename(path)))


def decode(path: str) -> np.ndarray:
  """Decodes a mask: which pixels count, bool [h, w] in the mask's own size."""
  bright = images.decode(path, 'mask').max(-1) > (127 if path.lower().endswith(_LOSSY) else 0)
  return ~bright if _is_inverted(path) else bright


def read(path: str, size: tuple[int, int]) -> np.ndarray:
  """Reads which pixels count, bool [h, w], at the (width, height) `size`.

  A downsampled pixel counts if all its full-size pixels do.

  Raises:
    DataNotFoundError, DataError: the file is missing, not a picture, too small, or excludes all
      pixels.
  """
  counts = decode(path)
  if counts.shape[::-1] != tuple(size):
    if counts.shape[1] < size[0] or counts.shape[0] < size[1]:
      raise images.DataError(
        f'{path}: is {counts.shape[1]}x{counts.shape[0]} pixels, smaller than its picture as used, '
        f'{size[0]}x{size[1]}. A mask must have the size of its picture.'
      )
    share = Image.fromarray(counts.astype(np.float32)).resize(size, Image.Resampling.BOX)
    counts = np.asarray(share) > 1 - 1e-5
  if not counts.any():
    colour = 'white' if _is_inverted(path) else 'black'
    raise images.DataError(
      f'{path}: leaves nothing of its picture: it is all {colour}. Correct the mask or remove the '
      'picture.'
    )
  return counts
