"""The one reader and writer of text and JSON, atomic writes, and questions about paths."""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import os
import re
import reprlib
import stat
import threading
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from ..errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK_ERRORS = (*_FULL, errno.EFBIG, errno.EIO)


@contextlib.contextmanager
def named_errors(path: str) -> Iterator[None]:
  """Adds the path to errors of a full disk, which Python raises without it when writing."""
  try:
    yield
  except OSError as error:
    if error.filename is None and error.errno in _DISK_ERRORS:
      error.filename = path
    raise


_OTHER = 'or choose another folder'
_IN_WORDS = {
  errno.ENOSPC: f'the disk is full. Free some space, {_OTHER} on a disk that has more',
  errno.EDQUOT: f'your share of the disk is used up. Free some space, {_OTHER} on another disk',
  errno.EFBIG: 'the file would be larger than is allowed here. Raise the limit (`ulimit -f`)',
  errno.EIO: f'the disk cannot be read or written. Check it, {_OTHER} on another disk',
  errno.EROFS: f'the disk can only be read. Mount it for writing, {_OTHER} on another disk',
  errno.EEXIST: f'is a file where a folder is needed. Move it away, {_OTHER}',
  errno.ENOTDIR: f'is below a file, which would have to be a folder. Correct the path, {_OTHER}',
  errno.EISDIR: 'is a folder where a file is needed. Correct the path',
  errno.ENOENT: 'there is no such file or folder. Correct the path',
  errno.EACCES: f'is not permitted. Allow it (`chmod`, `chown`), {_OTHER}',
  errno.EPERM: f'is not permitted. Run the command as its owner, {_OTHER}',
  errno.ENAMETOOLONG: 'the name is too long. Choose a shorter one',
}


def in_words(error: OSError) -> str:
  """Returns an error of the system as users read it: the path, what is wrong, and the way out."""
  paths = ' -> '.join(str(path) for path in (error.filename, error.filename2) if path is not None)
  text = error.strerror or str(error)
  if error.errno and text == os.strerror(error.errno):  # Else the program has its own words.
    text = _IN_WORDS.get(error.errno, text)
  return f'{paths}: {text}.' if paths else f'{text[:1].upper()}{text[1:]}.'


def is_disk_full(error: BaseException | None) -> bool:
  """Returns whether a full disk or quota caused an error; TensorStore only says so in its text."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in _FULL:
      return True
    if any(os.strerror(code) in str(error) for code in _FULL):
      return True
    error = error.__cause__ or error.__context__
  return False


# Names that are not UTF-8 keep their bytes, so that the files they name can be opened.
_ERRORS = 'surrogateescape'
_JSON_KINDS = {dict: 'a JSON object', list: 'a JSON array'}


class FileError(UserError):
  """A file whose content cannot be used."""


def _mode(path: str) -> int:
  """Returns the file's type and permissions, or 0 if there is no such file."""
  try:
    return os.stat(path).st_mode
  except PermissionError:
    raise PermissionError(
      errno.EACCES,
      'may not be looked at. Allow it (`chmod u+rX` on the folders above)',
      path,
    ) from None
  except (OSError, ValueError):  # ValueError: a zero byte in the name.
    return 0


def exists(path: str) -> bool:
  """Returns whether there is a file or folder.

  As do `is_file` and `is_folder`, it raises a PermissionError where `os.path` answers "no" because
  a folder above may not be searched: a file that may not be read must not count as missing.
  """
  return _mode(path) != 0


def is_file(path: str) -> bool:
  return stat.S_ISREG(_mode(path))


def is_folder(path: str) -> bool:
  return stat.S_ISDIR(_mode(path))


@contextlib.contextmanager
def whole(path: str) -> Iterator[str]:
  """Writes a file atomically: yields a temporary path, renamed to `path` when the block ends.

  Creates the folder. If the block fails, `path` is unchanged and the temporary file is removed. The
  temporary path has the extension of `path`, because some writers infer the format from it.
  """
  if re.match(r'[a-z]\w+://', path):  # As a path it would name a folder 'gs:'.
    raise FileError(f'{path}: cannot be written; only Config.checkpoint_dir can be in a bucket.')
  os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
  stem, ending = os.path.splitext(path)
  temporary = f'{stem}.{os.getpid()}-{threading.get_ident()}.part{ending}'
  try:
    with named_errors(path):
      yield temporary
      os.replace(temporary, path)
  finally:
    if os.path.exists(temporary):
      os.remove(temporary)


def open_text(path: str) -> IO[str]:
  """Opens UTF-8 text for reading; a byte order mark is skipped, and line ends become '\\n'.

  Bytes that are not UTF-8 become surrogates, as in file names that Python lists.

  Raises:
    FileError: the text is UTF-16, as some Windows programs save it.
  """
  file = open(path, encoding='utf-8-sig', errors=_ERRORS)  # noqa: SIM115
  if file.buffer.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
    file.close()
    raise FileError(f'{path}: is UTF-16 text; save it as UTF-8.')
  return file


def read_text(path: str) -> str:
  """Returns the text of a file; see `open_text`."""
  with open_text(path) as f:
    return f.read()


def write_text(path: str, text: str) -> None:
  """Writes UTF-8 text atomically, with '\\n' as line end; `read_text` restores it."""
  with whole(path) as temporary, open(temporary, 'wb') as f:
    f.write(text.encode('utf-8', _ERRORS))


class _RepeatedKey(ValueError):
  """An object of a JSON file that has a key twice."""


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns a JSON object; Python's own reader keeps the last of several equal keys in silence."""
  table = dict(pairs)
  if len(table) < len(pairs):
    seen = set()
    key = next(key for key, _ in pairs if key in seen or seen.add(key))
    values = [value for other, value in pairs if other == key]
    raise _RepeatedKey(
      f'has the key {reprlib.repr(key)} more than once in one object, with the values '
      f'{" and ".join(map(reprlib.repr, values[:2]))}. Remove the wrong one.'
    )
  return table


def read_json(
  path: str, kind: type = dict, error: type[UserError] = FileError, advice: str = ''
) -> Any:
  """Reads a JSON file whose outermost value is a `kind`, dict or list.

  Args:
    path: the file.
    kind: type of the value; `object` accepts all.
    error: raised if the content cannot be used; missing files raise an OSError.
    advice: a sentence for the message: how to get a good file.
  """
  try:
    value = json.loads(read_text(path), object_pairs_hook=_table)
    problem = None if isinstance(value, kind) else f'must be {_JSON_KINDS[kind]}'
  except FileError as e:
    raise error(str(e)) from None
  except _RepeatedKey as e:
    raise error(f'{path}: {e}') from None
  except (ValueError, RecursionError) as e:
    problem = f'is not valid JSON ({reprlib.repr(str(e))[1:-1]})'
  if problem:
    raise error(f'{path}: {problem}. {advice}'.rstrip())
  return value


def write_json(path: str, value: Any, indent: int | None = None) -> None:
  """Writes JSON atomically, on one line without `indent`."""
  write_text(path, json.dumps(value, indent=indent))


def read_array(path: str) -> np.ndarray:
  """Loads a numeric .npy file as float64, without pickle and without trusting its header's size.

  Raises:
    ValueError: the file cannot be read, is not a numeric .npy file, or is truncated.
  """
  try:
    with open(path, 'rb') as f:
      start = f.read(12)
    header = int.from_bytes(start[8:], 'little') if start[6:7] > b'\1' else 0  # Format 2 and later.
    if header > os.path.getsize(path):
      raise ValueError('its header says that it is longer than the file')
    # Mapping checks the header's shape against the file's size.
    array = np.load(path, mmap_mode='r', allow_pickle=False)
  except Exception as e:  # The header parser raises many types.
    raise ValueError(f'no whole .npy file: {e}') from None
  if not isinstance(array, np.ndarray) or array.dtype.kind not in 'fiu':
    raise ValueError('no .npy file of numbers')
  return np.array(array, np.float64)
