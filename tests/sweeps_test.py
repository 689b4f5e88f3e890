import pytest

from internal.experiments import runs, sweeps

ROWS = """# An experiment.
Config.max_steps = 50   # Of all rows.

full model:
no distortion loss:
  Config.distortion_loss_mult = 0
  Config.data_dir_note = 'a # b, c'
width :
  NerfMLP.net_width = 256, 512
"""


def write(tmp_path, text):
  path = tmp_path / 'rows.txt'
  path.write_text(text)
  return str(path)


def test_a_file_has_rows_and_what_is_common_to_them(tmp_path):
  assert sweeps.read_rows(write(tmp_path, ROWS)) == {
    'full model': ['Config.max_steps = 50'],
    'no distortion loss': [
      'Config.max_steps = 50', 'Config.distortion_loss_mult = 0',
      "Config.data_dir_note = 'a # b, c'",
    ],
    'width': ['Config.max_steps = 50', 'NerfMLP.net_width = 256, 512'],
  }  # fmt: skip


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    (
      'a:\n\nConfig.near 3',
      r"rows\.txt, line 3: 'Config.near 3' is neither a row",
    ),
    (':', r"line 1: ':' is neither"),
    ('a:\nb:\na:', r"line 3: there is another row 'a'"),
    ('Config.near = 1', r'rows\.txt: has no rows'),
  ],
)
def test_a_wrong_line_is_named(tmp_path, text, words):
  with pytest.raises(runs.RunError, match=words):
    sweeps.read_rows(write(tmp_path, text))


class TestExpand:
  def test_one_row_for_each_combination(self):
    got = list(sweeps.expand(['Config.near = 1', 'A.x = 2, 3', "A.y = 'p', 'q,r'"]))
    assert got == [
      ({'A.x': x, 'A.y': y}, ['Config.near = 1', f'A.x = {x}', f'A.y = {y}'])
      for x in ('2', '3')
      for y in ("'p'", "'q,r'")
    ]

  @pytest.mark.parametrize(
    'value', ['(3, 4)', "{'a': 1, 'b': (2, 3)}", '[1, 2]', "'a, b'", '"it\'s, so"', '@jnp.log']
  )
  def test_commas_in_brackets_and_quotes_are_part_of_a_value(self, value):
    assert list(sweeps.expand([f'A.x = {value}'])) == [({}, [f'A.x = {value}'])]
    two = list(sweeps.expand([f'A.x = {value}, {value}']))
    assert [bindings for _, bindings in two] == [[f'A.x = {value}']] * 2

  def test_the_last_binding_of_a_name_counts(self):
    assert list(sweeps.expand(['A.x = 1, 2', 'A.x = 3'])) == [({}, ['A.x = 3'])]

  @pytest.mark.parametrize(
    ('binding', 'words'),
    [
      ('A.x = 1,', 'must be NAME = VALUE'),
      ('= 1', 'must be NAME = VALUE'),
      ('A.x', 'must be NAME = VALUE'),
      ("Config.data_dir = 'a'", 'use --data_dir instead'),
      ("Config.checkpoint_dir = 'a'", 'use --out instead'),
    ],
  )
  def test_a_binding_that_does_not_work(self, binding, words):
    with pytest.raises(runs.RunError, match=words):
      list(sweeps.expand([binding]))


class TestExpandAll:
  def test_labels_have_the_swept_values(self):
    got = sweeps.expand_all({'a': ['A.x = 1'], '': ['A.x = 1, 2', 'B.y = 3'], 'b': ['B.y = 4, 5']})
    assert list(got) == ['a', 'x = 1', 'x = 2', 'b: y = 4', 'b: y = 5']
    assert got['x = 2'] == ['A.x = 2', 'B.y = 3']

  def test_equal_names_are_told_apart(self):
    got = sweeps.expand_all({'': ['A.x = 1, 2', 'B.x = 3, 4']})
    assert list(got)[1] == 'A.x = 1, B.x = 4'

  def test_a_hundred_rows_are_the_most(self):
    ten = ', '.join(map(str, range(10)))
    assert len(sweeps.expand_all({'': [f'A.x = {ten}', f'A.y = {ten}']})) == 100
    with pytest.raises(runs.RunError, match='More than 100 rows'):
      sweeps.expand_all({'a': [], '': [f'A.x = {ten}', f'A.y = {ten}']})


def test_folders_have_safe_and_unique_names():
  labels = ["DONeRF's contraction", 'net_width = 256, warp_fn = @coord.contract', '../x/y']
  assert sweeps.folder_names(labels) == [
    'DONeRF_s_contraction', 'net_width=256_warp_fn=_coord.contract', 'x_y'
  ]  # fmt: skip
  for wrong in (['a b', 'a/b'], ['/']):
    with pytest.raises(runs.RunError, match='needs another name'):
      sweeps.folder_names(wrong)
