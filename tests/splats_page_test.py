"""Tests of the web page in a real browser, against the rasteriser."""

import dataclasses
import pathlib

import browser
import jax
import numpy as np
import pytest
import trajectory_test

from internal.splats import formats, gaussians, page, rasterizer

SIZE = (96, 64)
# The camera's direction, by which the Gaussians are sorted.
SORTED = 'camera.forward.join()'
READY = 'document.body && document.body.dataset.shown ? 1 : 0'


def make_scene():
  """Cameras on the unit circle; the capture's own frame is rotated, shifted and twice as large."""
  transform = np.eye(4)
  transform[:3] = [[0, -0.5, 0, 1], [0.5, 0, 0, 2], [0, 0, 0.5, 3]]
  scene = trajectory_test.make_scene(6)
  n = len(scene.names)
  cams = scene.cameras
  matrix = np.float32([[1 / 70, 0, -46 / 70], [0, 1 / 75, -33 / 75], [0, 0, 1]])
  cams = dataclasses.replace(
    cams, pixtocam=np.repeat(matrix[None], n, 0), size=np.tile(SIZE, (n, 1))
  )
  return dataclasses.replace(scene, world_transform=transform, cameras=cams)


def make_splats(n=400):
  rng = np.random.default_rng(0)
  return gaussians.Splats(
    means=rng.normal(0, 0.25, (n, 3)),
    log_scales=rng.normal(-3.2, 0.6, (n, 3)),
    quaternions=rng.normal(size=(n, 4)),
    opacity_logits=rng.normal(1, 2, n),
    sh=rng.normal(0, 0.2, (n, 16, 3)),
  )


@pytest.fixture(scope='module')
def scene():
  return make_scene()


@pytest.fixture(scope='module')
def written(scene, tmp_path_factory):
  """The page, and its Gaussians as the file holds them."""
  path = str(tmp_path_factory.mktemp('page') / 'page.html')
  page.write(path, make_splats(), scene, '</script> "a" & <b>')
  return path, formats.unpack_spz(formats.pack_spz(make_splats()))


def test_the_page_loads_nothing_and_is_one_file(written):
  text = pathlib.Path(written[0]).read_text()
  assert 'http' not in text.replace('http://www.w3.org', '')
  assert '<title>&lt;/script&gt; &#34;a&#34; &amp; &lt;b&gt;</title>' in text
  assert '400 Gaussians' in text


@pytest.mark.skipif(not browser.CHROMIUM, reason='needs Chromium')
def test_a_browser_shows_from_each_stop_what_the_rasteriser_draws(scene, written, tmp_path):
  path, splats = written
  splats = jax.tree.map(np.float32, splats)
  draw = jax.jit(rasterizer.render, static_argnums=3)
  with browser.Browser(tmp_path) as chromium:
    chromium.open(f'file://{path}#bare', SIZE, READY)
    for row in (0, 4):
      chromium.evaluate('document.body.dataset.shown = ""')
      chromium.evaluate(f'location.hash = "camera={scene.names[row]}&bare"')
      chromium.wait(f'Math.hypot(...add(camera.eye, scene.stops[{row}].eye, -1)) < 1e-9')
      chromium.wait(f'document.body.dataset.shown == {SORTED}')
      seen = chromium.picture() / 255
      expected = draw(
        splats, gaussians.pinhole(scene.cameras, row), np.zeros(3, np.float32), 20_000
      )
      expected = np.clip(expected.rgb, 0, 1)
      assert expected.std() > 0.1
      psnr = -10 * np.log10(np.mean((seen - expected) ** 2))
      assert psnr > 40, (row, psnr)
    # The other ways to move: a drag orbits, the wheel comes nearer, a key flies, a button stops.
    before = chromium.evaluate('[...camera.eye, camera.reach()]')
    mouse = {'button': 'left', 'buttons': 1, 'clickCount': 1}
    chromium.call('Input.dispatchMouseEvent', type='mousePressed', x=40, y=30, **mouse)
    chromium.call('Input.dispatchMouseEvent', type='mouseMoved', x=60, y=35, **mouse)
    chromium.call('Input.dispatchMouseEvent', type='mouseReleased', x=60, y=35, **mouse)
    after = chromium.evaluate('[...camera.eye, camera.reach()]')
    assert np.linalg.norm(np.subtract(after, before)[:3]) > 0.3
    np.testing.assert_allclose(after[3], before[3], rtol=1e-6)
    chromium.call('Input.dispatchMouseEvent', type='mouseWheel', x=40, y=30, deltaX=0, deltaY=-100)
    chromium.wait(f'camera.reach() < {0.95 * before[3]}')
    before = chromium.evaluate('camera.pivot')
    chromium.call('Input.dispatchKeyEvent', type='keyDown', key='w')
    chromium.wait(f'Math.hypot(...add(camera.pivot, {before}, -1)) > 0.1')
    chromium.call('Input.dispatchKeyEvent', type='keyUp', key='w')
    chromium.evaluate('document.getElementById("next").click()')
    chromium.wait('Math.hypot(...add(camera.eye, scene.stops[5].eye, -1)) < 1e-9')
    # Two fingers that part come nearer.
    before = chromium.evaluate('camera.reach()')
    for kind, apart in (('touchStart', 5), ('touchMove', 10), ('touchMove', 20)):
      touches = [{'x': 48 - apart, 'y': 30, 'id': 0}, {'x': 48 + apart, 'y': 30, 'id': 1}]
      chromium.call('Input.dispatchTouchEvent', type=kind, touchPoints=touches)
    chromium.call('Input.dispatchTouchEvent', type='touchEnd', touchPoints=[])
    chromium.wait(f'camera.reach() < {0.5 * before}')
    # A movement whose pictures take long is drawn coarser; at rest the picture is fine again.
    chromium.evaluate(
      'const drawn = WebGL2RenderingContext.prototype.drawArrays;'
      'WebGL2RenderingContext.prototype.drawArrays = function (...a) {'
      '  for (const began = performance.now(); performance.now() - began < 20;);'
      '  drawn.apply(this, a);'
      '}'
    )
    chromium.call('Input.dispatchKeyEvent', type='keyDown', key='w')
    chromium.wait(f'canvas.width < {SIZE[0]}')
    chromium.call('Input.dispatchKeyEvent', type='keyUp', key='w')
    chromium.wait(f'canvas.width == {SIZE[0]} && document.body.dataset.shown == {SORTED}')
