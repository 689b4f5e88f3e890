"""report.html: self-contained, with escaped names, and interactive in a browser."""

import base64
import dataclasses
import html.parser
import io
import json
import re
import shutil
import subprocess

import eval_render_test
import numpy as np
import pytest
import tiny
from PIL import Image

from internal import configs
from internal.commands import eval as eval_program
from internal.evaluation import benchmarks, html_report, results
from internal.rendering import trained

scene = eval_render_test.scene
NASTY = 'a<script>x()</script>&".png'


class Elements(html.parser.HTMLParser):
  """All elements of a page, with their attributes, and the text."""

  def __init__(self, page):
    super().__init__()
    self.found, self.text = [], []
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.found.append((tag, dict(attrs)))

  def handle_data(self, data):
    self.text.append(data)

  def all(self, tag, cls=None):
    return [a for t, a in self.found if t == tag and cls in (None, *a.get('class', '').split())]


@pytest.fixture
def run(scene, tmp_path):
  """A run that was evaluated: `run(**config)` returns the report's path and its elements."""

  def make(names=None, metrics=(), **config):
    config = configs.Config(**{'data_dir': str(tmp_path / 'data'), **config})
    settings = dataclasses.replace(tiny.settings(), config=config, text='Config.far = 1 # <b>')
    of = dataclasses.replace(scene, names=names or scene.names)
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in metrics))
    render = eval_render_test.fake_render
    params = {'w': np.ones(5, np.float32)}
    opened = trained.TrainedRun(str(tmp_path), settings, of, tiny.mesh(1), params, 70)
    eval_program.evaluate(opened, [0, 4], render)
    path = tmp_path / 'eval' / 'report.html'
    return path, Elements(path.read_text())

  return make


def test_the_page_loads_no_external_resources(run):
  _, page = run()
  addresses = [a[k] for _, a in page.found for k in ('src', 'href') if k in a]
  assert len(addresses) == 2 * 5  # Truth, prediction, depth, error, normals; opacity is constant.
  assert all(address.startswith('data:image/webp;base64,') for address in addresses)
  assert not page.all('link')
  assert all('src' not in a for a in page.all('script'))
  assert not re.search(r'@import|url\(|https?://', (''.join(page.text)))


def test_the_best_image_comes_first_and_then_the_worst(run):
  path, page = run()
  per_image = results.read(str(path.parent / 'results.json'))['per_image']
  order = [a['data-name'] for a in page.all('article')]
  assert order == [r['name'] for r in sorted(per_image, key=lambda row: -row['psnr'])]
  assert len(set(order)) == 2
  assert [text for text in page.text if text in ('best', 'median', 'worst')] == ['best', 'worst']


def test_best_median_and_worst_then_the_others_worst_first():
  places = html_report._places([25.0, None, 21.0, 24.0, 22.0, 23.0])
  assert places == [(1, 'best'), (3, 'median'), (2, 'worst'), (4, ''), (5, ''), (0, '')]
  assert html_report._places([30.0]) == [(0, '')]
  assert html_report._places([]) == []


@pytest.mark.parametrize(('levels', 'shown'), [((255, 254), False), ((255, 250), True)])
def test_a_constant_opacity_is_hidden(run, scene, levels, shown):
  path, _ = run()
  for picture in path.parent.glob('*_opacity.png'):
    grey = np.full((8, 8), levels[0], np.uint8)
    grey[0, 0] = levels[1]
    Image.fromarray(grey).save(picture)
  settings = dataclasses.replace(tiny.settings(), text='')
  html_report.write(str(path.parents[1]), settings, scene)
  kinds = {a['alt'].split()[0] for a in Elements(path.read_text()).all('img')}
  assert ('opacity' in kinds) == shown
  assert 'depth' in kinds


def test_names_are_text_whatever_they_are(run):
  _, page = run(names=(NASTY, 'b.png', 'c.png', 'd.png', 'e.png'))
  assert NASTY in [a['data-name'] for a in page.all('article')]
  assert len(page.all('script')) == 1
  assert 'Config.far = 1 # <b>' in ''.join(page.text)


def test_curves_of_what_was_logged(run):
  _, page = run()
  assert not page.all('svg')
  rows = [
    {
      'step': k,
      'psnr': 10.0 + k,
      'loss': 1 / k,
      'loss_data': 0.5 / k,
      'rays_per_sec': 1e4,
      'train_seconds': k,
    }
    for k in range(1, 9)
  ]
  _, page = run(metrics=[*rows, {'step': 8, 'test_psnr': 15.0, 'train_seconds': 8}])
  assert len(page.all('svg')) == 2
  lines = [g['id'] for g in page.all('g') if '-line-' in g.get('id', '')]
  assert len(set(lines)) == len(lines) == 3
  assert sum('-dots-' in g.get('id', '') for g in page.all('g')) == 1
  assert {'training rays', 'test images', 'sum', 'data'} <= set(page.text)
  assert any('10,000 rays/s' in text for text in page.text)


def test_the_curve_of_evaluated_checkpoints(run):
  path, page = run()
  found = json.loads((path.parent / 'results.json').read_text())
  for step, psnr in ((70, 30.0), (20, 25.0)):
    mean = {**found['mean'], 'psnr': psnr}
    text = json.dumps({**found, 'step': step, 'mean': mean})
    (path.parent / f'results_{step:06d}.json').write_text(text)
  (path.parent / 'results_000030.json').write_text('{')
  _, page = run()
  assert [g['id'].split('-')[-2] for g in page.all('g') if '-line-' in g.get('id', '')] == ['line']
  assert 'mean of 2 test images' in page.text
  assert any('results_000030.json' in text for text in page.text)


def test_without_pictures_it_says_so(run):
  _, page = run(eval_save_output=False)
  assert not page.all('img')
  assert len(page.all('article')) == 2
  assert any('2 of 2 test images are listed without pictures' in text for text in page.text)


def picture_width(address):
  with Image.open(io.BytesIO(base64.b64decode(address.partition(',')[2]))) as picture:
    return picture.width


@pytest.mark.parametrize(
  ('budget', 'width', 'images'), [(10**6, 20, 2), (2000, 4, 2), (600, 4, 1), (10, 4, 0)]
)
def test_pictures_become_smaller_then_fewer(run, monkeypatch, budget, width, images):
  monkeypatch.setattr(html_report, '_WIDTHS', (20, 4))
  monkeypatch.setattr(html_report, '_PICTURE_BYTES', budget)
  _, page = run()
  shown = [picture_width(a['src']) for a in page.all('img')]
  assert shown == [width] * (5 * images)
  told = [t for t in page.text if f'{2 - images} of 2 test images are listed without' in t]
  assert bool(told) == (images < 2)


def test_videos_where_they_are_and_small_enough(run, tmp_path, monkeypatch):
  (tmp_path / 'render').mkdir()
  (tmp_path / 'render' / 'color.mp4').write_bytes(b'moving')
  _, page = run()
  assert [a['src'] for a in page.all('video')] == ['data:video/mp4;base64,bW92aW5n']
  monkeypatch.setattr(html_report, '_VIDEO_BYTES', 3)
  _, page = run()
  assert not page.all('video')
  assert any('color.mp4 is too large' in text for text in page.text)


def test_the_exported_page_is_embedded_where_it_is_small_enough(run, tmp_path, monkeypatch):
  (tmp_path / 'export').mkdir()
  (tmp_path / 'export' / 'page.html').write_text(f'<p title="{NASTY}">')
  for embedded in (True, False):
    _, page = run()
    assert [a['srcdoc'] for a in page.all('iframe')] == [f'<p title="{NASTY}">'] * embedded
    assert [a['href'] for a in page.all('a')] == ['../export/page.html']
    assert len(page.all('script')) == 1
    monkeypatch.setattr(html_report, '_PAGE_BYTES', 3)


def test_published_numbers_stand_beside_ours_only_where_they_may(run, tmp_path):
  path, page = run()
  assert not any('published' in text for text in page.text)
  found = results.read(str(path.parent / 'results.json'))
  benchmark = benchmarks.load('360')
  facts = benchmark.scenes['bonsai']
  known = {**found, 'scene': 'bonsai'}
  told = html_report._published(known, 'r.json')
  assert 'differ in' in told['reason']
  assert told['rows'] == []
  width, height = (round(side) for side in facts.used_size)
  fit = {**known, 'factor': facts.factor, 'num_images': facts.test, 'dataset_loader': 'llff'}
  fit['image_sizes'] = {f'{width}x{height}': facts.test}
  fit['protocol'] = {**found['protocol'], 'test_split': results.every(benchmark.hold)}
  told = html_report._published(fit, 'r.json')
  assert told['reason'] is None
  ours = [row for row in told['rows'] if row[2]]
  assert [row[0] for row in ours] == ['this run']
  assert ours[0][1]['psnr'] == found['mean']['psnr']
  theirs = benchmark.published[0]
  assert told['rows'][0][:2] == (
    theirs.method, {m: theirs.values[m].get('bonsai') for m in told['metrics']}
  )  # fmt: skip


_ACTS = """
<script>
const errors = [];
addEventListener('error', e => errors.push(e.message));
addEventListener('load', () => {
  const names = () => [...document.querySelectorAll('article')].map(a => a.dataset.name);
  const told = {before: names()};
  const input = document.querySelector('.pair input'), over = document.querySelector('.over');
  input.value = 80;
  input.dispatchEvent(new Event('input'));
  told.clip = getComputedStyle(over).clipPath;
  const own = over.src, map = document.querySelector('.maps button');
  map.click();
  told.swapped = over.src === map.querySelector('img').src && over.src !== own;
  map.click();
  told.back = over.src === own;
  const places = () => [...document.querySelectorAll('.place')].map(e => e.textContent);
  told.places = places();
  for (const order of ['worst', 'best', 'name', 'overview']) {
    document.querySelector(`[data-order=${order}]`).click();
    told[order] = names();
  }
  const key = document.getElementById('key');
  key.value = 'ssim';
  key.dispatchEvent(new Event('change'));
  told.bySsim = places();
  told.loaded = [...document.images].every(i => i.complete && i.naturalWidth > 0);
  told.wide = document.documentElement.scrollWidth > innerWidth;
  told.errors = errors;
  document.body.dataset.told = JSON.stringify(told);
});
</script>
</head>"""


@pytest.mark.parametrize('width', [1200, 500])
def test_it_is_alive_in_a_browser(run, tmp_path, width):
  browser = shutil.which('chromium') or shutil.which('google-chrome')
  if not browser:
    pytest.skip('no Chromium here: the page was not tried in a browser')
  path, _ = run(names=(NASTY, 'b.png', 'c.png', 'd.png', 'e.png'))
  acted = tmp_path / 'acted.html'
  acted.write_text(path.read_text().replace('</head>', _ACTS))
  done = subprocess.run(
    [browser, '--headless=new', '--no-sandbox', '--disable-gpu', f'--window-size={width},900',
     f'--user-data-dir={tmp_path}/profile', '--virtual-time-budget=4000', '--dump-dom',
     f'file://{acted}'],
    capture_output=True, text=True, check=True, timeout=100,
  )  # fmt: skip
  told = json.loads(Elements(done.stdout).all('body')[0]['data-told'])
  assert told['errors'] == []
  assert told['clip'] == 'inset(0px 0px 0px 80%)'
  assert told['swapped']
  assert told['back']
  assert told['places'] == told['bySsim'] == ['best', 'worst']
  assert told['best'] == told['before'] == told['overview']
  assert told['worst'] == told['before'][::-1]
  assert told['name'] == sorted(told['before'])
  assert told['loaded']
  assert not told['wide']


def test_a_damaged_picture_is_left_out_and_named(run, scene):
  path, _ = run()
  damaged = sorted(path.parent.glob('000_*_depth.png'))
  for picture in damaged:
    picture.write_bytes(b'x')
  settings = dataclasses.replace(tiny.settings(), text='')
  html_report.write(str(path.parents[1]), settings, scene)
  text = ''.join(Elements(path.read_text()).text)
  assert f'Pictures that cannot be read are left out: {path.parent}/000_' in text
