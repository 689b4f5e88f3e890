import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import outcomes
import pytest

from internal import cli, configs
from internal.commands import tables as program
from internal.evaluation import benchmarks, table_forms, tables

ROOT = Path(__file__).resolve().parents[1]
PAPER = 'mip-NeRF 360, paper'


class TestPublished:
  @pytest.mark.parametrize('name', ['360', 'llff', 'blender'])
  def test_means_are_those_of_the_scenes(self, name):
    for row in benchmarks.load(name).published:
      for metric, values in row.values.items():
        digits = len(str(row.mean[metric]).split('.')[1])
        # The mean as printed may be of unrounded numbers.
        assert np.mean(list(values.values())) == pytest.approx(row.mean[metric], abs=10**-digits)

  def test_what_the_paper_says(self):
    nine = benchmarks.load('360')
    assert list(nine.scenes) == [
      'bicycle', 'flowers', 'garden', 'stump', 'treehill', 'room', 'counter', 'kitchen', 'bonsai'
    ]  # fmt: skip
    assert [s.factor for s in nine.scenes.values()] == [4] * 5 + [2] * 4
    paper = nine.published[0]
    assert (paper.method, paper.mean['psnr'], paper.mean['lpips_paper']) == (PAPER, 27.69, 0.237)
    assert paper.values['psnr']['bonsai'] == 33.46
    assert all(row.source for b in benchmarks.load_all().values() for row in b.published)

  def test_ablations_say_the_same_of_the_baselines(self):
    with open(ROOT / 'configs' / 'ablations' / 'published.json') as f:
      table_1 = {row['label']: row['psnr'] for row in json.load(f)['rows'] if row['table'] == 1}
    means = {p.method: p.mean['psnr'] for p in benchmarks.load('360').published}
    assert table_1 == {
      'NeRF': means['NeRF'],
      'mip-NeRF': means['mip-NeRF'],
      'NeRF++ (style of)': means['NeRF++'],
      'mip-NeRF, bigger MLP': means['mip-NeRF, bigger MLP'],
    }

  def test_test_images_are_what_the_split_leaves(self):
    for benchmark in benchmarks.load_all().values():
      for facts in benchmark.scenes.values():
        if benchmark.hold:
          assert facts.test == -(-facts.images // benchmark.hold)

  def test_groups_have_each_scene_once(self):
    for benchmark in benchmarks.load_all().values():
      grouped = [scene for scenes in benchmark.groups.values() for scene in scenes]
      assert grouped == (list(benchmark.scenes) if grouped else [])

  def test_configs_are_there(self):
    for benchmark in benchmarks.load_all().values():
      settings = configs.load_config([str(ROOT / benchmark.config)])
      assert settings.config.dataset_loader == benchmark.loader

  def test_an_unknown_dataset_lists_the_known_ones(self):
    with pytest.raises(benchmarks.BenchmarkError, match=r"'361'; choose one of 360, llff, blender"):
      benchmarks.load('361')


def run(scene, path=None, **change):
  return tables.Run(path or f'{scene}.json', outcomes.published_scene(scene, **change))


def nine(**change):
  """All nine scenes, the k-th at 20 + k dB."""
  scenes = benchmarks.load('360').scenes
  return [run(scene, psnr=20.0 + k, **change) for k, scene in enumerate(scenes)]


def make(runs, published=None, **kwargs):
  return tables.make({'ours': runs}, benchmarks.load('360'), published, **kwargs)


class TestMake:
  def test_means_are_over_scenes_by_group(self):
    table = make(nine())
    ours = table.rows[-1]
    assert table.columns[-3:] == ('outdoor', 'indoor', 'mean')
    got = [table.value(ours, 'psnr', column) for column in table.columns]
    assert got == pytest.approx([*range(20, 29), 22, 26.5, 24])

  def test_differences_are_from_the_first_published_row(self):
    table = make(nine())
    ours = table.rows[-1]
    assert table.against.method == PAPER
    assert table.difference(ours, 'psnr', 'bicycle') == pytest.approx(20 - 24.37)
    assert table.difference(ours, 'psnr', 'mean') == pytest.approx(24 - 249.22 / 9)
    assert table.difference(table.rows[1], 'psnr', 'bicycle') is None
    table = make(nine(), ['Zip-NeRF, paper', PAPER])
    assert [row.method for row in table.rows] == ['Zip-NeRF, paper', PAPER, 'ours']
    assert table.difference(table.rows[-1], 'psnr', 'bicycle') == pytest.approx(20 - 25.8)

  def test_a_missing_scene_leaves_means_open(self):
    table = make(nine()[:-1])
    ours = table.rows[-1]
    assert table.value(ours, 'psnr', 'outdoor') == pytest.approx(22)
    assert table.value(ours, 'psnr', 'indoor') is None
    assert table.value(ours, 'psnr', 'mean') is None
    assert table.value(ours, 'psnr', 'bonsai') is None

  def test_means_in_print_without_scenes_are_shown(self):
    table = make(nine(), ['NeRF'])
    assert table.value(table.rows[0], 'psnr', 'mean') == 23.85
    assert table.value(table.rows[0], 'psnr', 'outdoor') is None

  def test_lpips_is_shown_where_it_was_measured(self):
    assert make(nine()).metrics == ('psnr', 'ssim')
    table = make(nine(lpips=0.2))
    assert table.metrics == ('psnr', 'ssim', 'lpips_paper', 'lpips_vgg')
    assert table.difference(table.rows[-1], 'lpips_paper', 'bonsai') == pytest.approx(0.024)
    assert table.difference(table.rows[-1], 'lpips_vgg', 'bonsai') is None  # None in print.

  def test_captures_outside_of_benchmarks(self):
    runs = [tables.Run(f'{s}.json', outcomes.outcome(s, psnr=p)) for s, p in (('x', 20), ('y', 22))]
    assert tables.find_benchmark(runs) is None
    table = tables.make({'ours': runs})
    assert table.columns == ('x', 'y', 'mean')
    assert [table.value(table.rows[0], 'psnr', c) for c in table.columns] == [20, 22, 21]
    assert table.against is None

  def test_a_dataset_is_known_by_its_scenes(self):
    assert tables.find_benchmark([run('garden'), run('room')]).name == '360'
    assert tables.find_benchmark([run('fern', dataset='llff')]).name == 'llff'
    with pytest.raises(tables.TablesError, match='360 and llff have these scenes; choose'):
      tables.find_benchmark([run('room')])

  def test_one_config_is_one_method(self):
    runs = [run('garden'), run('room'), run('stump', bindings=['Config.near = 0.3'])]
    grouped = tables.group(runs)
    assert [len(found) for found in grouped.values()] == [2, 1]
    assert all(re.fullmatch('ours [0-9a-f]{8}', name) for name in grouped)
    assert list(tables.group(runs[:2])) == ['ours']

  @pytest.mark.parametrize(
    ('kwargs', 'words'),
    [
      ({'metrics': ['psrn']}, "'psrn'; choose from psnr, ssim"),
      ({'published': ['NeRF--']}, "'NeRF--' on 360; choose from mip-NeRF 360, paper"),
    ],
  )
  def test_unknown_names_list_the_known_ones(self, kwargs, words):
    with pytest.raises(tables.TablesError, match=words):
      make(nine(), **kwargs)

  def test_a_scene_of_another_dataset(self):
    with pytest.raises(tables.TablesError, match=r"shed.json: 'shed' is not a scene of '360'"):
      make([tables.Run('shed.json', outcomes.outcome('shed'))])


def spoil(run, path, value):
  """The same run with another value in a field."""
  *inner, last = path.split('.')
  at = run.found
  for name in inner:
    at = at[name]
  at[last] = value
  return tables.Run('b.json', run.found)


class TestMixing:
  @pytest.mark.parametrize(
    ('field', 'value'),
    [
      ('protocol.quantized', False),
      ('protocol.crop_borders', 2),
      ('protocol.test_split', 'every 10th image by name'),
      ('protocol.render_interval', 4),
      ('protocol.lpips', {'lpips': 'AlexNet'}),
      ('lpips.weights', 'others'),
      ('dataset_loader', 'transforms'),
    ],
  )
  @pytest.mark.parametrize('scene', ['garden', 'room'])
  def test_is_refused_with_files_and_field(self, field, value, scene):
    other = spoil(run(scene), field, value)
    with pytest.raises(tables.TablesError, match=rf'a\.json and b\.json differ in {field}'):
      tables.check({'a': [run('garden', 'a.json')], 'b': [other]})

  @pytest.mark.parametrize(
    ('field', 'value'),
    [('factor', 8), ('num_images', 23), ('image_sizes', {'648x420': 24}), ('masked_images', 2)],
  )
  def test_of_images_is_refused_on_one_scene_only(self, field, value):
    methods = {'a': [run('garden', 'a.json')], 'b': [spoil(run('garden'), field, value)]}
    with pytest.raises(tables.TablesError, match=rf'a\.json and b\.json differ in {field}'):
      tables.check(methods)
    tables.check({'a': [run('garden')], 'b': [spoil(run('stump'), field, value)]})

  def test_other_images_of_the_same_number(self):
    other = run('garden')
    other.found['per_image'][3]['name'] = 'another.png'
    with pytest.raises(tables.TablesError, match=r'differ in per_image.name'):
      tables.check({'a': [run('garden')], 'b': [other]})

  @pytest.mark.parametrize(
    ('field', 'value'),
    [('config_hash', 'f' * 16), ('step', 10), ('num_params', 5), ('mlp_dtype', 'bfloat16')],
  )
  def test_configs_are_not_mixed_in_a_row(self, field, value):
    runs = [run('garden', 'a.json'), spoil(run('stump'), field, value)]
    with pytest.raises(tables.TablesError, match=rf'a\.json and b\.json differ in {field}'):
      tables.check({'a': runs})
    tables.check({'a': runs[:1], 'b': runs[1:]})

  def test_a_scene_twice_in_a_row(self):
    with pytest.raises(tables.TablesError, match=r'a\.json and b\.json are both of .* garden'):
      tables.check({'a': [run('garden', 'a.json'), run('garden', 'b.json')]})

  @pytest.mark.parametrize(
    ('change', 'field'),
    [
      ({'factor': 8}, 'factor'),
      ({'n': 23}, 'num_images'),
      ({'size': (648, 420)}, 'image_sizes'),
      ({'bindings': ['Config.eval_quantize_metrics = False']}, 'protocol.quantized'),
      ({'bindings': ['Config.llffhold = 9']}, 'protocol.test_split'),
      ({'bindings': ['Config.eval_refine_cameras = True']}, 'refined_cameras'),
    ],
  )
  def test_published_numbers_require_their_protocol(self, change, field):
    runs = [run('garden', **change)]
    words = rf'garden\.json and the published numbers .* differ in {field}'
    with pytest.raises(tables.TablesError, match=words):
      make(runs)
    assert len(make(runs, []).rows) == 1

  def test_halves_of_pictures_do_not_stand_beside_whole_ones(self):
    halves = run('garden', 'b.json', bindings=['Config.eval_refine_cameras = True'])
    with pytest.raises(tables.TablesError, match=r'a\.json and b\.json differ in refined_cameras'):
      tables.check({'a': [run('garden', 'a.json')], 'b': [halves]})
    tables.check({'a': [halves], 'b': [halves]})

  def test_sides_may_be_rounded_either_way(self):
    for size in ((1297, 840), (1296, 840), (1297, 841)):
      make([run('garden', size=size)])


def tabulars(text):
  """The cells of each row of each tabular, rules left out; a multicolumn is followed by ''."""
  assert text.count(r'\begin{table*}') == text.count(r'\end{table*}')
  found = []
  for body in re.findall(r'\\begin\{tabular\}[^\n]*\n(.*?)\\end\{tabular\}', text, re.S):
    rows = []
    for line in body.strip().splitlines():
      if line.endswith(r'\\'):
        cells = [cell.strip() for cell in re.split(r'(?<!\\)&', line[:-2])]
        wide = [re.fullmatch(r'\\multicolumn\{(\d+)\}\{c\}\{(.*)\}', cell) for cell in cells]
        rows.append(
          [x for c, m in zip(cells, wide) for x in ([m[2], *[''] * (int(m[1]) - 1)] if m else [c])]
        )
      else:
        assert re.match(r'\\(top|mid|bottom)rule$|\\cmidrule', line), line
    assert len({len(row) for row in rows}) == 1
    found.append(rows)
  return found


class TestSeeds:
  """Two seeds, the second better by 1 dB on each scene and by 2 more on the first."""

  def table(self, **kwargs):
    second = nine(bindings=['Config.seed = 7'])
    for k, r in enumerate(second):
      r.found['mean']['psnr'] += 1 + 2 * (k == 0)
    return make([*nine(), *second], [PAPER], **kwargs)

  def test_mean_and_standard_deviation(self):
    table = self.table()
    ours = table.rows[-1]
    assert table.value(ours, 'psnr', 'bicycle') == pytest.approx(21.5)
    assert table.spread(ours, 'psnr', 'bicycle') == pytest.approx(3 / 2**0.5)
    assert table.spread(ours, 'psnr', 'flowers') == pytest.approx(1 / 2**0.5)
    # Of the means of both seeds, 22 and 23.4: not the mean of the standard deviations.
    assert table.value(ours, 'psnr', 'outdoor') == pytest.approx(22.7)
    assert table.spread(ours, 'psnr', 'outdoor') == pytest.approx(1.4 / 2**0.5)
    assert table.spread(ours, 'ssim', 'mean') == 0
    assert table.spread(table.rows[0], 'psnr', 'mean') is None

  def test_are_one_method_and_are_shown(self):
    runs = [run('garden'), run('garden', bindings=['Config.seed = 7'])]
    assert list(tables.group(runs)) == ['ours']
    table = self.table()
    assert '**ours** | 21.50 ± 2.12 🔴 -2.87 |' in table_forms.markdown(table)
    assert '± standard deviation over 2 seeds.' in table_forms.markdown(table)
    summary = tabulars(table_forms.latex(table))[0]
    assert summary[-1][1] == r'\underline{22.70}{\scriptsize\,$\pm$\,0.99}'
    rows = list(csv.DictReader(io.StringIO(table_forms.as_csv(table))))
    (row,) = (r for r in rows if (r['metric'], r['column'], r['ours']) == ('psnr', 'bicycle', '1'))
    assert float(row['std']) == pytest.approx(3 / 2**0.5)
    assert row['seeds'] == '2'

  def test_different_numbers_of_seeds_are_told(self):
    methods = {'a': [run('garden'), run('garden', bindings=['Config.seed = 7'])]}
    methods['b'] = [run('garden', bindings=['Config.near = 1'])]
    assert 'over 2 (a), 1 (b) seeds.' in tables.make(methods, benchmarks.load('360'), []).notes[1]

  def test_one_seed_twice_is_an_error(self):
    same = {'bindings': ['Config.seed = 7']}
    with pytest.raises(tables.TablesError, match=r'same method and seed \(7\)'):
      make([run('garden', 'a.json', **same), run('garden', 'b.json', **same)])

  def test_other_settings_of_another_seed_are_an_error(self):
    other = run('garden', 'b.json', bindings=['Config.seed = 7', 'Config.near = 1'])
    runs = [run('garden', 'a.json'), other]
    with pytest.raises(tables.TablesError, match=r'a\.json and b\.json differ in method_hash'):
      make(runs)

  def test_older_files_have_the_default_seed(self):
    old, new = run('garden', 'a.json'), run('garden', 'b.json', bindings=['Config.seed = 7'])
    for name in ('seed', 'method_hash', 'reduction'):
      del old.found[name]
    table = make([old, new])
    assert list(table.rows[-1].seeds) == [configs.Config().seed, 7]


class TestOwnMethods:
  def table(self):
    other = nine(bindings=['Config.near = 0.3'])
    for k, r in enumerate(other):
      r.found['mean'] |= {'psnr': 19.0 + k, 'ssim': 0.8}
    return tables.make({'full': nine(), 'other': other}, benchmarks.load('360'), [PAPER])

  def test_are_compared_with_the_first(self):
    table = self.table()
    _, full, other = table.rows
    assert table.own_difference(other, 'psnr', 'bicycle') == pytest.approx(-1)
    assert table.own_difference(other, 'ssim', 'mean') == pytest.approx(0.05)
    assert table.own_difference(full, 'psnr', 'mean') is None
    text = table_forms.markdown(table)
    section = text.split('### Differences from full')[1]
    assert '| method | outdoor PSNR | outdoor SSIM | indoor PSNR |' in section
    assert '| other | -1.00 | +0.050 | -1.00 | +0.050 | -1.00 | +0.050 |' in section

  def test_ranks_follow_the_direction_of_the_metric(self):
    table = make(nine(lpips=0.2), [PAPER, 'Zip-NeRF, paper'])
    paper, zipnerf, ours = table.rows
    assert [table.rank(r, 'psnr', 'mean') for r in table.rows] == [2, 1, None]
    assert [table.rank(r, 'lpips_paper', 'bicycle') for r in (paper, zipnerf, ours)] == [2, None, 1]
    assert [table.rank(r, 'lpips_vgg', 'mean') for r in table.rows] == [None] * 3  # Only one.

  def test_ties_have_the_same_rank(self):
    methods = {
      str(k): [run('garden', psnr=psnr, bindings=[f'Config.near = {k + 1}'])]
      for k, psnr in enumerate((25.004, 24.996, 24.9, 20.0))
    }
    table = tables.make(methods, benchmarks.load('360'), [])
    assert [table.rank(row, 'psnr', 'garden') for row in table.rows] == [1, 1, 2, None]


class TestReductions:
  """How the smaller pictures were made changes PSNR, so tables tell."""

  def notes(self, *reductions, published=None):
    runs = [run('garden'), run('stump')]
    for r, way in zip(runs, reductions, strict=True):
      r.found['reduction'] = way
    return make(runs, published).notes[-1]

  def test_one_way_is_named(self):
    assert self.notes('dataset', 'dataset') == "Reduced pictures: the dataset's own."
    assert self.notes(*['area filter'] * 2, published=[]) == (
      'Reduced pictures: made here by an area filter.'
    )

  def test_several_ways_are_said(self):
    note = self.notes('dataset', 'area filter', published=[])
    assert 'ours: dataset (garden), area filter (stump)' in note
    assert '0.3 to 0.45 dB' in note
    assert '(ours: area filter; published: dataset)' in self.notes('area filter', 'area filter')
    assert 'ours: not recorded' in self.notes(None, None)

  def test_every_form_has_the_note(self):
    table = make(nine())
    for form in (table_forms.markdown, table_forms.latex):
      assert 'ours: not recorded; published: dataset' in form(table)


class TestForms:
  def table(self):
    return make(nine(lpips=0.2), [PAPER, 'NeRF'])

  def test_markdown_colours_what_is_better(self):
    text = table_forms.markdown(self.table())
    psnr, ssim, paper, _ = re.split('^### ', text, flags=re.M)[1:]
    row = next(line for line in psnr.splitlines() if '**ours**' in line)
    cells = [cell.strip() for cell in row.strip('|').split('|')]
    assert cells[1] == '20.00 🔴 -4.37'
    assert cells[2] == '21.00 🔴 -0.73'
    assert len(cells) == 13
    assert '0.750 🟢 +0.065' in ssim
    assert '0.200 🟢 -0.101' in paper  # Lower is better.
    assert '0.200 🔴 +0.030' in paper
    assert '[0, 1]' in paper
    assert 'NeRF |' in psnr
    assert '| NeRF |' not in ssim  # It has no SSIM in print.
    assert 'arXiv:2111.12077' in text

  def test_bars_in_names_do_not_make_columns(self):
    found = [tables.Run('a.json', outcomes.outcome('x|y'))]
    text = table_forms.markdown(tables.make({'a': found, 'b|c': found}))
    assert r'| method | x\|y | mean |' in text
    assert r'| method | x\|y PSNR | x\|y SSIM |' in text

  def test_no_difference_at_the_digits_shown_is_white(self):
    text = table_forms.markdown(make([run('garden', psnr=26.9801)]))
    assert '26.98 ⚪ +0.00' in text
    assert 'Means need all scenes; not all methods have bicycle, flowers, stump' in text

  def test_latex_has_all_metrics_side_by_side(self):
    table = tables.make(
      {'50% & a_b': nine(lpips=0.2), 'other': nine(lpips=0.25, bindings=['Config.near = 0.3'])},
      benchmarks.load('360'), [PAPER, 'NeRF'],
    )  # fmt: skip
    text = table_forms.latex(table)
    summary, *scenes = tabulars(text)
    # Four metrics of outdoor, indoor and mean, and the differences.
    heads = [cell.partition('$')[0] for cell in summary[1][1:]]
    assert heads == ['PSNR', 'SSIM', 'LPIPS', 'LPIPS'] * 4
    assert summary[1][1].endswith(r'$\uparrow$')
    assert summary[1][3].endswith(r'$\downarrow$')
    blocks = 'outdoor', 'indoor', 'mean', r'$\Delta$ to 50\% \& a\_b'
    assert summary[0] == ['', *(cell for name in blocks for cell in (name, '', '', ''))]
    rows = {row[0]: row[1:] for row in summary[2:]}
    assert list(rows) == [PAPER, 'NeRF', r'50\% \& a\_b', 'other']
    assert rows['NeRF'] == ['--'] * 8 + ['23.85'] + ['--'] * 7
    assert rows[PAPER][8:12] == [r'\textbf{27.69}', r'\textbf{0.792}', r'\underline{0.237}', '--']
    # Both are second best, and equally so.
    assert rows['other'][8:10] == [r'\underline{24.00}', r'\underline{0.750}']
    assert rows[r'50\% \& a\_b'][8:11] == [
      r'\underline{24.00}', r'\underline{0.750}', r'\textbf{0.200}'
    ]  # fmt: skip
    assert rows['other'][12:] == ['$+0.00$', '$+0.000$', '$+0.050$', '$+0.050$']
    assert len(scenes) == 4  # One for each metric.
    assert all(len(row) == 13 for row in scenes[0])
    assert [row[0] for row in scenes[1]][1:] == [PAPER, r'50\% \& a\_b', 'other']  # Not NeRF.
    assert '% ' + PAPER in text

  def test_latex_without_any_number_is_still_a_table(self):
    table = tables.make({'ours': [run('garden')]}, benchmarks.load('360'), [], ['lpips_vgg'])
    assert [len(tabular) for tabular in tabulars(table_forms.latex(table))] == [2, 1]

  def test_latex_of_few_scenes_shows_them_all(self):
    runs = [tables.Run(f'{s}.json', outcomes.outcome(s, psnr=p)) for s, p in (('x', 20), ('y', 22))]
    (summary,) = tabulars(table_forms.latex(tables.make({'ours': runs})))
    assert summary[0] == ['', 'x', '', 'y', '', 'mean', '']
    assert summary[2] == ['ours', '20.00', '0.750', '22.00', '0.750', '21.00', '0.750']

  @pytest.mark.skipif(shutil.which('pdflatex') is None, reason='needs LaTeX')
  def test_latex_compiles_without_overfull_boxes(self, tmp_path):
    table = tables.make({'50% & a_b ~^{}\\#$': nine(lpips=0.2)}, benchmarks.load('360'))
    (tmp_path / 'table.tex').write_text(table_forms.latex(table))
    (tmp_path / 'paper.tex').write_text(
      r'\documentclass[twocolumn]{article}\usepackage{booktabs}\usepackage{graphicx}'
      r'\begin{document}\input{table}\end{document}'
    )
    command = ['pdflatex', '-interaction=nonstopmode', '-halt-on-error', 'paper.tex']
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-1000:]
    assert 'Overfull' not in ran.stdout

  def test_csv_has_every_number_unrounded(self):
    rows = list(csv.DictReader(io.StringIO(table_forms.as_csv(self.table()))))
    found = {(r['metric'], r['method'], r['column']): r for r in rows}
    ours = found['psnr', 'ours', 'mean']
    assert float(ours['value']) == pytest.approx(24)
    assert float(ours['difference']) == pytest.approx(24 - 249.22 / 9, abs=1e-9)
    assert ours['ours'] == '1'
    assert found['psnr', PAPER, 'bonsai']['difference'] == ''
    assert ('ssim', 'NeRF', 'mean') not in found


class TestProgram:
  @pytest.fixture
  def paths(self, tmp_path):
    return [outcomes.write(tmp_path / r.scene / 'eval' / 'results.json', r.found) for r in nine()]

  def test_prints_markdown(self, paths, capsys):
    program.main(paths)
    out = capsys.readouterr().out
    assert '| **ours** | 20.00' in out
    assert '| Zip-NeRF, paper |' in out

  def test_writes_each_form(self, paths, tmp_path, capsys):
    outs = [str(tmp_path / f'new/t{ending}') for ending in ('.md', '.tex', '.csv')]
    program.main([*paths, '--out', *outs, '--published', PAPER])
    texts = [Path(out).read_text() for out in outs]
    assert texts[0].startswith('### ')
    assert r'\toprule' in texts[1]
    assert texts[2].startswith('metric,method,')
    assert 'Zip-NeRF' not in ''.join(texts)

  def test_methods_by_name(self, paths, tmp_path, capsys):
    other = outcomes.write(
      tmp_path / 'b.json', outcomes.published_scene('garden', bindings=['Config.seed = 1'])
    )
    program.main([*paths, '--method', 'seed 1', other, '--published', 'none'])
    out = capsys.readouterr().out
    assert '**seed 1**' in out
    assert 'paper' not in out

  def test_mixing_is_one_line_for_the_user(self, paths, tmp_path, capsys):
    other = outcomes.write(
      tmp_path / 'b.json',
      outcomes.published_scene('garden', bindings=['Config.eval_crop_borders = 1']),
    )
    with pytest.raises(SystemExit):
      cli.run(lambda: program.main([*paths, '--method', 'b', other]))
    err = capsys.readouterr().err
    assert err.count('\n') == 1
    for word in (paths[0], other, 'protocol.crop_borders'):
      assert word in err

  def test_errors_of_the_script_itself_are_one_line_too(self, capsys):
    with pytest.raises(SystemExit):
      cli.run(lambda: program.main([]))
    assert capsys.readouterr().err.startswith('Error: No results.json given')

  def test_published_numbers_of_an_unknown_scene(self, tmp_path):
    path = outcomes.write(tmp_path / 'r.json', outcomes.outcome('shed'))
    program.main([path])
    program.main([path, '--published', 'none'])
    words = (
      r"no published numbers of shed with the loader 'llff'.* 360: bicycle, .*; blender: chair"
    )
    with pytest.raises(tables.TablesError, match=words):
      program.main([path, '--published', PAPER])

  @pytest.mark.parametrize('ending', ['.pdf', ''])
  def test_unknown_forms(self, paths, ending):
    with pytest.raises(tables.TablesError, match=r'must end in \.md, \.tex, \.csv'):
      program.main([*paths, '--out', f't{ending}'])
