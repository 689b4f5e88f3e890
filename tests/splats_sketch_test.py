"""Tests of the Gaussians that the viewer draws; viewer_page_test.py has them in a browser."""

import dataclasses

import numpy as np
import pytest
import splats_page_test
from scipy import spatial

from internal.export import points
from internal.splats import formats, sketch


@pytest.mark.parametrize('ending', ['ply', 'spz'])
def test_they_are_in_the_normalised_world_wherever_the_capture_is(tmp_path, ending):
  scene, splats = splats_page_test.make_scene(), splats_page_test.make_splats(50)
  transform = scene.world_transform.copy()
  transform[:3, 3] -= transform[:3, :3] @ [4_500_000.5, -3_200_000, 7]
  scene = dataclasses.replace(scene, world_transform=transform)
  assert sketch.find(str(tmp_path), scene) is None
  to_file = np.linalg.inv(transform)
  to_file[:3, 3] -= points.offset(scene)
  (tmp_path / 'export').mkdir()
  write = getattr(formats, f'write_{ending}')
  write(str(tmp_path / 'export' / f'splats.{ending}'), formats.moved(splats, to_file))
  added = sketch.find(str(tmp_path), scene)
  found = formats.unpack_spz(added.files['splats.spz'])
  far, row = spatial.cKDTree(splats.means).query(found.means)  # They are in another order.
  assert sorted(row) == list(range(50))
  assert far.max() < 1e-4
  np.testing.assert_allclose(found.log_scales, splats.log_scales[row], atol=0.07)
  assert 'ViewerCameraMessage' in added.script


def test_a_damaged_file_is_an_error(tmp_path):
  (tmp_path / 'export').mkdir()
  (tmp_path / 'export' / 'splats.ply').write_bytes(b'ply\nend_header\n')
  with pytest.raises(formats.SplatFileError, match=r'splats\.ply: is no whole \.ply'):
    sketch.find(str(tmp_path), splats_page_test.make_scene())
