"""A file is there whole or not at all."""

import tracemalloc

import captures
import numpy as np
import pytest

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
