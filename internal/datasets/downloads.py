"""Downloads the archives of published datasets, resuming after interruptions, and unpacks them."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import http.client
import os
import re
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence

from ..errors import UserError
from ..system import files, progress

_ATTEMPTS = 6
_WAIT = 2.0  # Seconds before the second attempt; doubled each time.
_TIMEOUT = 60.0  # Seconds without a byte.
_BLOCK = 1 << 20
_NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


class DownloadError(UserError):
  """An archive could not be downloaded or unpacked."""


@dataclasses.dataclass(frozen=True)
class Archive:
  """A zip file of scenes."""

  file: str  # File name.
  url: str
  page: str  # The authors' download page.
  scenes: tuple[str, ...]
  top: str = ''  # The folder of the scenes in the archive, with a trailing slash.


# What zipfile raises for damaged archives.
_DAMAGE = (
  zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error, ValueError, RuntimeError,
  FileExistsError, NotADirectoryError,
)  # fmt: skip

_STORAGE = 'https://storage.googleapis.com/gresearch/refraw360/'
_DRIVE = 'https://drive.usercontent.google.com/download?export=download&confirm=t&id='
_PAGE_360 = 'https://jonbarron.info/mipnerf360/'
_PAGE_NERF = 'https://drive.google.com/drive/folders/128yBriW1IG_3NJ5Rp7APSTZsJqdJdfc1'

ARCHIVES = {
  '360': (
    Archive(
      '360_v2.zip',
      f'{_STORAGE}360_v2.zip',
      _PAGE_360,
      ('bicycle', 'bonsai', 'counter', 'garden', 'kitchen', 'room', 'stump'),
    ),
    Archive(
      '360_extra_scenes.zip',
      f'{_STORAGE}360_extra_scenes.zip',
      _PAGE_360,
      ('flowers', 'treehill'),
    ),
  ),
  'llff': (
    Archive(
      'nerf_llff_data.zip',
      f'{_DRIVE}16VnMcF1KJYxN9QId6TClMsZRahHNMW5g',
      _PAGE_NERF,
      ('fern', 'flower', 'fortress', 'horns', 'leaves', 'orchids', 'room', 'trex'),
      'nerf_llff_data/',
    ),
  ),
  'blender': (
    Archive(
      'nerf_synthetic.zip',
      f'{_DRIVE}18JxhpWD-4ZmuFKLzKlAw-w5PpzZxXOcG',
      _PAGE_NERF,
      ('chair', 'drums', 'ficus', 'hotdog', 'lego', 'materials', 'mic', 'ship'),
      'nerf_synthetic/',
    ),
  ),
}


class _NotAnArchiveError(Exception):
  """The server sent a web page, such as a login or a quota notice."""


class _TruncatedError(ConnectionError):
  """The connection ended early."""


def _open(url: str, have: int, tag: str):
  """Requests the file from byte `have` on, if its tag is still `tag`."""
  request = urllib.request.Request(url, headers={'User-Agent': 'mipnerf360-jax'})
  if have and tag:
    request.add_header('Range', f'bytes={have}-')
    request.add_header('If-Range', tag)  # If the file has changed, send all of it.
  return urllib.request.urlopen(request, timeout=_TIMEOUT)


def _attempt(url: str, part: str, label: str) -> None:
  """Makes one attempt to download the rest of `part`.

  Raises:
    one of _NETWORK, _NotAnArchiveError; `part` keeps what was received.
  """
  tag_file, have, tag = f'{part}.tag', 0, ''
  if os.path.exists(part) and os.path.exists(tag_file):
    have, tag = os.path.getsize(part), files.read_text(tag_file)
  try:
    response = _open(url, have, tag)
  except urllib.error.HTTPError as e:
    whole = re.fullmatch(r'bytes \*/(\d+)', e.headers.get('Content-Range', ''))
    if e.code == 416 and whole and int(whole[1]) == have:
      return  # Already complete.
    if e.code == 416:
      os.remove(tag_file)
    raise
  with response:
    if response.headers.get_content_type() == 'text/html':
      raise _NotAnArchiveError
    have = have if response.status == 206 else 0
    length = response.headers.get('Content-Length')
    total = have + int(length) if length else None
    _check_space(os.path.dirname(part), (total or 0) - have, label)
    files.write_text(tag_file, _tag(response.headers))
    _receive(response, part, have, total, label)
  if total is not None and os.path.getsize(part) != total:
    raise _TruncatedError(f'{os.path.getsize(part):,} of {total:,} bytes received')


def _tag(headers) -> str:
  """Returns the version tag of the file; '' if the server sends none."""
  tag = headers.get('ETag', '')
  # Weak tags are not valid for ranges.
  return tag if tag and not tag.startswith('W/') else headers.get('Last-Modified', '')


def _receive(response, part: str, have: int, total: int | None, label: str) -> None:
  with (
    progress.Bar(label, total, have, scale=1e6, unit='MB') as bar,
    open(part, 'r+b' if have else 'wb') as out,
  ):
    out.seek(have)
    while block := response.read(_BLOCK):
      out.write(block)
      bar.advance(len(block))


def _check_space(folder: str, needed: int, label: str) -> None:
  free = shutil.disk_usage(folder or '.').free
  if needed > free:
    raise DownloadError(
      f'{label} needs {needed / 1e9:.1f} GB in {folder!r}, where {free / 1e9:.1f} GB are free.'
    )


def _is_final(error: Exception) -> bool:
  """Whether a retry is useless: the file is unavailable, or there is no network."""
  if isinstance(error, urllib.error.HTTPError):
    return error.code in (401, 403, 404, 410)
  return isinstance(getattr(error, 'reason', None), socket.gaierror)


def fetch(archive: Archive, folder: str, mirror: str | None = None) -> str:
  """Downloads an archive unless it is in the folder; returns its path.

  Resumes FILE.part if the server still has the same file. Checks the size that the server sent.

  Args:
    archive: the archive.
    folder: the target folder, made if missing.
    mirror: base URL to use instead of the authors'.

  Raises:
    DownloadError: the download failed; the message tells how to do it by hand.
  """
  path = os.path.join(folder, archive.file)
  if os.path.exists(path):
    return path
  if mirror and not mirror.startswith(('http://', 'https://')):
    raise DownloadError(f'--mirror must be an http(s) address, got {mirror!r}.')
  os.makedirs(folder, exist_ok=True)
  url = f'{mirror.rstrip("/")}/{archive.file}' if mirror else archive.url
  part, wait = f'{path}.part', _WAIT
  by_hand = f'Fetch it elsewhere ({archive.page}), put it there as {path}, and start again.'
  for attempt in range(1, _ATTEMPTS + 1):
    try:
      _attempt(url, part, archive.file)
      break
    except _NotAnArchiveError:
      raise DownloadError(f'{url} sent a web page instead of {archive.file}. {by_hand}') from None
    except _NETWORK as e:
      if _is_final(e) or attempt == _ATTEMPTS:
        raise DownloadError(
          f'{url}: {e}. The part received is kept. Without a network: {by_hand}'
        ) from None
      print(f'{archive.file}: {e}; attempt {attempt + 1} of {_ATTEMPTS}', file=sys.stderr)
      time.sleep(wait)
      wait *= 2
  os.replace(part, path)
  with contextlib.suppress(FileNotFoundError):
    os.remove(f'{part}.tag')
  return path


def unpack(path: str, archive: Archive, folder: str, scenes: Sequence[str] | None = None) -> None:
  """Unpacks scenes that are not in the folder yet, each atomically; checks the CRCs.

  Raises:
    DownloadError: the file is damaged, or is not the expected archive.
  """
  try:
    with zipfile.ZipFile(path) as opened:
      for scene in scenes or archive.scenes:
        target = os.path.join(folder, scene)
        if not os.path.exists(target):
          _unpack_scene(path, opened, f'{archive.top}{scene}/', target)
  except DownloadError:
    raise
  except (*_DAMAGE, OSError) as e:
    if isinstance(e, OSError) and not isinstance(e, _DAMAGE) and e.errno != errno.EINVAL:
      raise  # Such as a full disk. Damaged offsets make zipfile seek before the file's start.
    raise DownloadError(
      f'{path} is damaged ({e}). Remove it and start again to download it.'
    ) from None


def _unpack_scene(path: str, opened: zipfile.ZipFile, prefix: str, target: str) -> None:
  members = [m for m in opened.infolist() if m.filename.startswith(prefix) and not m.is_dir()]
  if not members:
    raise DownloadError(
      f'{path} has no {prefix}: it is not the expected archive. Remove it and start again.'
    )
  _check_space(os.path.dirname(target), sum(member.file_size for member in members), target)
  temporary = f'{target}.part'
  shutil.rmtree(temporary, ignore_errors=True)
  label = f'unpacking {os.path.basename(target)}'
  for member in progress.track(members, label):
    opened.extract(member, temporary)  # Drops '..' from names and makes no links.
  os.replace(os.path.join(temporary, prefix), target)
  shutil.rmtree(temporary)


def download(
  dataset: str, folder: str, scenes: Sequence[str] | None = None, mirror: str | None = None
) -> list[str]:
  """Downloads and unpacks the scenes of a dataset that are not in the folder.

  Returns:
    Paths of the archives in the folder, which can now be deleted.

  Raises:
    DownloadError: the dataset or a scene is unknown, or a download or unpacking failed.
  """
  if dataset not in ARCHIVES:
    raise DownloadError(f'Unknown dataset {dataset!r}; use one of {", ".join(ARCHIVES)}.')
  known = [scene for archive in ARCHIVES[dataset] for scene in archive.scenes]
  for scene in scenes or ():
    if scene not in known:
      raise DownloadError(f'{dataset} has no scene {scene!r}; use one of {", ".join(known)}.')
  done = []
  for archive in ARCHIVES[dataset]:
    wanted = [scene for scene in archive.scenes if scenes is None or scene in scenes]
    if any(not os.path.exists(os.path.join(folder, scene)) for scene in wanted):
      path = fetch(archive, folder, mirror)
      unpack(path, archive, folder, wanted)
    done.append(os.path.join(folder, archive.file))
  return [path for path in done if os.path.exists(path)]
