"""A file is there whole or not at all."""

import pytest

from internal import files


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
