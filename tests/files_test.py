"""A file is there whole or not at all."""

import os
import pathlib
import tracemalloc

import captures
import numpy as np
import pytest

from internal import errors
from internal.system import files


def test_the_file_appears_when_it_is_whole(tmp_path):
  path = tmp_path / 'new' / 'a.png'
  with files.whole(str(path)) as temporary:
    assert temporary.endswith('.png')
    with open(temporary, 'w') as f:
      f.write('half')
      assert not path.exists()
      f.write(' whole')
  assert path.read_text() == 'half whole'
  assert [p.name for p in path.parent.iterdir()] == ['a.png']


def _fail_half_way(path):
  with files.whole(path) as temporary, open(temporary, 'w') as f:
    f.write('half')
    raise RuntimeError('disk on fire')


def test_a_failure_keeps_what_was_there(tmp_path):
  path = tmp_path / 'a.json'
  path.write_text('old')
  with pytest.raises(RuntimeError, match='disk on fire'):
    _fail_half_way(str(path))
  assert path.read_text() == 'old'
  assert [p.name for p in tmp_path.iterdir()] == ['a.json']


def test_arrays(tmp_path):
  path = str(tmp_path / 'a.npy')
  for dtype in ('<f8', '>f4', '<i2', 'u1'):
    np.save(path, np.arange(6, dtype=dtype).reshape(2, 3))
    array = files.read_array(path)
    assert array.dtype == np.float64
    np.testing.assert_array_equal(array, [[0, 1, 2], [3, 4, 5]])
    array[0] = 7  # Not the file's own bytes.
  np.testing.assert_array_equal(files.read_array(path)[0], [0, 1, 2])


@pytest.mark.parametrize(
  'shape', ['(1152921504606846976,)', '(1000000000, 17)', '(7,)', '(-1,)', '((']
)
def test_arrays_that_are_not_there(tmp_path, shape):
  path = tmp_path / 'a.npy'
  np.save(path, np.arange(6.0))
  path.write_bytes(path.read_bytes().replace(b'(6,)', shape.encode()))
  with pytest.raises(ValueError, match=r'no whole \.npy file'):
    files.read_array(str(path))


@pytest.mark.parametrize('version', [1, 2, 3])
def test_headers_of_all_versions_and_no_longer_than_the_file(tmp_path, version):
  path = tmp_path / 'a.npy'
  with open(path, 'wb') as f:
    np.lib.format.write_array(f, np.arange(6.0), (min(version, 2), 0))
  content = path.read_bytes()
  content = content[:6] + bytes([version]) + content[7:]  # The third is laid out as the second.
  path.write_bytes(content)
  np.testing.assert_array_equal(files.read_array(str(path)), np.arange(6.0))
  path.write_bytes(content[:10] + b'\xff\xff' + content[12:])
  tracemalloc.start()
  try:
    with pytest.raises(ValueError, match=r'no whole \.npy file'):
      files.read_array(str(path))
    assert tracemalloc.get_traced_memory()[1] < 2**26
  finally:
    tracemalloc.stop()


def test_neither_pickles_nor_archives_nor_words(tmp_path):
  path = str(tmp_path / 'a.npy')
  np.save(path, np.array([{}], object), allow_pickle=True)
  with pytest.raises(ValueError, match=r'no whole \.npy file'):
    files.read_array(path)
  for write in (lambda f: np.savez(f, np.zeros(3)), lambda f: np.save(f, np.array(['a']))):
    with open(path, 'wb') as f:
      write(f)
    with pytest.raises(ValueError, match=r'no \.npy file of numbers'):
      files.read_array(path)


def test_what_may_not_be_looked_at_is_not_missing(tmp_path, monkeypatch):
  (tmp_path / 'a' / 'b').mkdir(parents=True)
  (tmp_path / 'a' / 'c').touch()
  for path, kind in (('a/b', files.is_folder), ('a/c', files.is_file), ('a/d', None)):
    path = str(tmp_path / path)
    assert files.is_folder(path) == (kind is files.is_folder)
    assert files.is_file(path) == (kind is files.is_file)
    assert files.exists(path) == (kind is not None)
  for nothing in ('', '\0', str(tmp_path / 'a' / 'c' / 'x'), 'y' * 10**5):
    assert not files.exists(nothing)
  captures.deny(monkeypatch, str(tmp_path / 'a'))
  assert files.is_folder(str(tmp_path / 'a'))
  for ask in (files.exists, files.is_file, files.is_folder):
    with pytest.raises(PermissionError, match=r'chmod.*a/c'):
      ask(str(tmp_path / 'a' / 'c'))


@pytest.mark.parametrize('content', ['ü\n b\n', '\ufeffü\r\n b\r\n', 'ü\r b\r'])
def test_text_of_any_editor_reads_the_same(tmp_path, content):
  path = tmp_path / 'a.txt'
  path.write_bytes(content.encode())
  assert files.read_text(str(path)) == 'ü\n b\n'


def test_text_keeps_bytes_that_are_not_utf8(tmp_path):
  path = str(tmp_path / 'new' / 'a.txt')
  text = f'ü {os.fsdecode(bytes([0xE9]))}.png\n'
  files.write_text(path, text)
  assert files.read_text(path) == text
  assert pathlib.Path(path).read_bytes() == b'\xc3\xbc \xe9.png\n'


@pytest.mark.parametrize('coding', ['utf-16', 'utf-16-be'])
def test_utf16_is_an_error(tmp_path, coding):
  path = tmp_path / 'a.json'
  path.write_bytes(('\ufeff' if coding == 'utf-16-be' else '').encode(coding) + '{}'.encode(coding))
  for read in (files.read_text, files.read_json):
    with pytest.raises(files.FileError, match=r'a\.json: is UTF-16 text; save it as UTF-8'):
      read(str(path))


def test_json(tmp_path):
  path = tmp_path / 'a.json'
  path.write_bytes('\ufeff{"a": [1, "\\udce9"]}\r\n'.encode())
  assert files.read_json(str(path)) == {'a': [1, os.fsdecode(b'\xe9')]}
  files.write_json(str(path), [1, {'b': 2}], 1)
  assert path.read_text() == '[\n 1,\n {\n  "b": 2\n }\n]'
  assert files.read_json(str(path), list) == [1, {'b': 2}]


@pytest.mark.parametrize(
  ('content', 'problem'),
  [
    (b'', 'is not valid JSON'),
    (b'{"a": 1', 'is not valid JSON'),
    (b'[' * 200_000, 'is not valid JSON'),
    (b'{"a": ' * 200_000, 'is not valid JSON'),
    (b'{"a": ' + b'9' * 5000 + b'}', 'is not valid JSON'),
    (b'\xff\x00', 'is not valid JSON'),
    (b'[]', 'must be a JSON object'),
    (b'null', 'must be a JSON object'),
  ],
)
def test_json_that_cannot_be_used(tmp_path, content, problem):
  path = tmp_path / 'a.json'
  path.write_bytes(content)
  with pytest.raises(OwnError, match=rf'a\.json: {problem}.*Write it again\.$'):
    files.read_json(str(path), dict, OwnError, 'Write it again.')


@pytest.mark.parametrize(
  'content', ['{"fl_x": 200, "a": {}, "fl_x": 51.2}', '{"a": [{"fl_x": 200, "fl_x": 51.2}]}']
)
def test_a_key_twice_is_refused(tmp_path, content):
  """Python's reader takes the last one in silence."""
  (tmp_path / 'a.json').write_text(content)
  text = r"a\.json: has the key 'fl_x' more than once in one object, with the values 200 and 51\.2"
  with pytest.raises(OwnError, match=text):
    files.read_json(str(tmp_path / 'a.json'), dict, OwnError)
  (tmp_path / 'a.json').write_text('[{"a": 1}, {"a": 2}]')
  assert files.read_json(str(tmp_path / 'a.json'), list) == [{'a': 1}, {'a': 2}]


class OwnError(errors.UserError):
  pass
