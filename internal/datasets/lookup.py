"""Finds the pictures that a capture names, if need be under another name.

Poses and photographs travel separately: names differ in case, Unicode form, ending, slashes, or in
their folder (an absolute path of another machine, `images/` too much or too little). `picture` is a
path relative to data_dir.
"""

from __future__ import annotations

import collections
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence

from ..system import files, warnings
from . import images

_HOME = 'images'  # The usual folder of photographs.
_NO_PHOTOGRAPHS = re.compile(r'masks?|depths?|normals?|sem(antics?)?|seg(mentations?)?|sparse')


def find(
  data_dir: str, names: Sequence[str], folder: str = '', factor: int = 0
) -> list[str | None]:
  """Returns the picture of each name, or None if it is missing.

  A name that no file has is looked up without regard to case, Unicode form and ending in its own
  folder. Only if the capture has no picture at all in the folder as named, the name's folders may
  be more or fewer than the picture's. A warning says what was found so. Downsampled pictures can
  stand in for missing full-size ones.

  Args:
    data_dir: the capture.
    names: as the capture has them; picture endings may be missing.
    folder: the folder, relative to data_dir, to which the names are relative.
    factor: Config.factor.

  Returns:
    Pictures. A name that leads out of the capture, with no counterpart inside, is returned as it
    is, for `images.inside` to refuse.

  Raises:
    DataError: several pictures fit a name, or one picture fits several names.
  """
  exact = {name: _exact(data_dir, folder, name) for name in names}
  if None in exact.values():
    exact |= _look_up(data_dir, [n for n in exact if exact[n] is None], exact, folder, factor)
  return [exact[name] for name in names]


def _exact(data_dir: str, folder: str, name: str) -> str | None:
  """Returns the file of exactly this name; if its ending is missing, with the first that exists."""
  endings = [ending for ext in images.EXTENSIONS for ending in (ext, ext.upper())]
  endings = [''] if name.lower().endswith(images.EXTENSIONS) else ['', *endings]
  unix = '/'.join(part for part in name.split('/') if part not in ('', '.'))
  for plain in dict.fromkeys((unix, '/'.join(_parts(name)))):
    for ending in endings:
      picture = images.join(folder, plain + ending)
      if images.is_relative(picture) and files.is_file(os.path.join(data_dir, picture)):
        return picture
  return None


def _look_up(
  data_dir: str,
  missing: Sequence[str],
  exact: Mapping[str, str | None],
  folder: str,
  factor: int,
) -> dict[str, str | None]:
  """Returns the pictures of names that no file has."""
  full, small = _list_pictures(data_dir, factor)
  taken = set(exact.values())
  found = _small_pictures(missing, folder, full, small)
  places = {os.path.dirname(p) for p in (*taken, *found.values()) if p}  # Folders as named.
  by_key = collections.defaultdict(list)
  standing_in = set(small)
  for picture in [*full, *small]:
    # Links that lead nowhere and pipes are listed too.
    there = picture in standing_in or files.is_file(os.path.join(data_dir, picture))
    if there and picture not in taken:
      by_key[_fold(images.stem(os.path.basename(picture)))].append(picture)
  renamed = {}
  for name in missing:
    if name not in found:
      candidates = {p for key in _keys(name) for p in by_key[key]}
      picture = _best(name, candidates, folder, places)
      if picture:
        renamed[name] = picture
  _check_unique(data_dir, renamed)
  if renamed:
    name = min(renamed)
    named = name if os.path.isabs(name) else images.join(folder, name)
    warnings.warn(
      f'{data_dir}: {len(renamed)} of {len(exact)} pictures have other names than in the poses, '
      f'for example {named[:300]!r} is {renamed[name]!r}. They are used; correct the names if they '
      'are other pictures.'
    )
  moved = {_folder_of(name) for name in renamed}
  lost = {n: _missing(n, folder, _folder_of(n) in moved) for n in missing}
  return lost | found | renamed


def _missing(name: str, folder: str, moved: bool) -> str | None:
  """Returns None for a missing picture, or a name that leads out of the capture as it is."""
  inside = images.is_relative('/'.join(_parts(name))) and not os.path.isabs(name)
  return None if moved or inside else images.join(folder, name)


def _list_pictures(data_dir: str, factor: int) -> tuple[list[str], list[str]]:
  """Lists a capture's photographs, and those that exist only downsampled by `factor`.

  The latter as their full-size names would be. Folders of masks, depths and other factors are left
  out.
  """
  tops = [entry.name for entry in os.scandir(data_dir) if entry.is_dir()]
  full, small = [n for n in os.listdir(data_dir) if n.lower().endswith(images.EXTENSIONS)], []
  for top in sorted(tops):
    reduced = re.fullmatch(r'(.+)_(\d+)', top)
    if reduced and (reduced[1] == _HOME or reduced[1] in tops):
      if int(reduced[2][:9]) == factor > 1:
        small += [f'{reduced[1]}/{n}' for n in images.list_images(os.path.join(data_dir, top))]
    elif not top.startswith('.'):
      full += [f'{top}/{name}' for name in images.list_images(os.path.join(data_dir, top))]
  full = [p for p in full if not any(map(_NO_PHOTOGRAPHS.fullmatch, map(_fold, p.split('/')[:-1])))]
  stems = set(map(images.stem, full))
  return full, [p for p in small if images.stem(p) not in stems]


def _small_pictures(
  missing: Sequence[str], folder: str, full: Sequence[str], small: Sequence[str]
) -> dict[str, str]:
  """Returns the names for which a downsampled picture stands in, as pictures of full size."""
  stems = set(map(images.stem, small))
  wanted = {name: images.join(folder, '/'.join(_parts(name))) for name in missing}
  found = {n: w for n, w in wanted.items() if images.is_relative(n) and images.stem(w) in stems}
  tops = {picture.split('/')[0] for picture in full}
  if not found and small and not any(w.split('/')[0] in tops for w in wanted.values()):
    return wanted  # LLFF numbers its downsampled pictures: `pyramid.pair` goes by their order.
  return found


def _best(name: str, candidates: set[str], folder: str, places: set[str]) -> str | None:
  """Returns the candidate for a name.

  The same folder is best, then one in the folder of photographs, then the most folders in common,
  then the same ending.

  Raises:
    DataError: several candidates are as good.
  """
  wanted = [_dirs(images.join(folder, name)), _dirs(name)]
  home = _fold(folder or _HOME)
  ranked = collections.defaultdict(list)
  for picture in sorted(candidates):
    own = _dirs(picture)
    short = own[1:] if own[:1] == [home] else own
    pairs = [(a, b) for a in wanted for b in (own, short)]
    common = [min(len(a), len(b)) for a, b in pairs if _is_end(a, b)]
    moved = own != wanted[0]
    if common and not (moved and images.join(folder, _folder_of(name)).rstrip('/') in places):
      other = _fold(os.path.splitext(name)[1]) != _fold(os.path.splitext(picture)[1])
      ranked[moved, own[:1] != [home], -max(common), other].append(picture)
  best = ranked[min(ranked)] if ranked else []
  if len(best) > 1:
    raise images.DataError(
      f'No such image: {name[:300]!r}. It may be {warnings.some(best)}: rename the right one, or '
      'correct the name.'
    )
  return best[0] if best else None


def _check_unique(data_dir: str, renamed: Mapping[str, str]) -> None:
  names = collections.defaultdict(list)
  for name, picture in renamed.items():
    names['/'.join(_parts(picture))].append(name)
  for picture, several in names.items():
    if len(several) > 1:
      raise images.DataError(
        f'{data_dir}: {warnings.some(several)} have no file of their own, and {picture!r} fits '
        'each of them. Restore the folders of the photographs.'
      )


def _fold(text: str) -> str:
  """Returns a text without differences of case and Unicode form."""
  return unicodedata.normalize('NFC', unicodedata.normalize('NFC', text).casefold())


def _parts(name: str) -> list[str]:
  """Splits a path, of any system, without empty parts and '.'."""
  return [part for part in re.split(r'[\\/]+', name) if part not in ('', '.')]


def inner_name(name: str) -> str:
  """Returns a path without what leads out of the capture: '..', a drive, a leading '/'."""
  return '/'.join(p for p in _parts(name) if p != '..' and not re.fullmatch('[A-Za-z]:', p))


def _folder_of(name: str) -> str:
  return '/'.join(_parts(name)[:-1])


def _dirs(name: str) -> list[str]:
  """Returns the folders of a name to compare, without '..' and a drive."""
  return [_fold(part) for part in _parts(inner_name(name))[:-1]]


def _keys(name: str) -> list[str]:
  """Returns the folded names, without ending, of pictures that a name may mean."""
  base = (_parts(name) or [''])[-1]
  foreign = re.fullmatch(r'(.+)\.[A-Za-z]\w{1,4}', base)  # Such as .HEIC, which was converted.
  if base.lower().endswith(images.EXTENSIONS):
    return [_fold(images.stem(base))]
  return [_fold(base), *([_fold(foreign[1])] if foreign else [])]


def _is_end(a: Sequence[str], b: Sequence[str]) -> bool:
  """Whether the shorter of two lists ends the longer one."""
  n = min(len(a), len(b))
  return list(a[len(a) - n :]) == list(b[len(b) - n :])
