"""Tests of finding principal points, on synthetic reconstructions."""

import numpy as np
import pytest

pycolmap = pytest.importorskip('pycolmap')

from internal.sfm import principal_point  # noqa: E402

NOISE = 0.3  # Pixels.


def synthetic(offset, images=30, points=300, cameras=1):
  """Images of random points; the cameras' principal points are put at the centre."""
  pycolmap.set_random_seed(0)
  options = pycolmap.SyntheticDatasetOptions()
  options.num_rigs, options.num_frames_per_rig, options.num_points3D = cameras, images, points
  options.camera_model_id = pycolmap.CameraModelId.OPENCV
  centre = np.array([options.camera_width, options.camera_height]) / 2
  options.camera_params = [900, 910, *(centre + offset), 0.03, -0.01, 0.0, 0.0]
  model = pycolmap.synthesize_dataset(options)
  noise = pycolmap.SyntheticNoiseOptions()
  noise.point2D_stddev = NOISE
  pycolmap.synthesize_noise(noise, model)
  for camera in model.cameras.values():
    camera.params = [*camera.params[:2], *centre, *camera.params[4:]]
  return model


def test_finds_the_axis_of_cropped_pictures():
  model = synthetic((28.0, -24.0))
  before = [c.params.copy() for c in model.cameras.values()]
  adjusted, [found] = principal_point.refine(model)
  sure = 4 * NOISE * found['deviation']
  assert 0 < found['deviation'] < 0.005 * 1024
  np.testing.assert_allclose(found['off_centre'], (28, -24), atol=sure)
  [camera] = adjusted.cameras.values()
  np.testing.assert_allclose(camera.params[:2], (900, 910), atol=5)
  assert adjusted.compute_mean_reprojection_error() == pytest.approx(
    NOISE * np.sqrt(np.pi / 2), rel=0.1
  )
  np.testing.assert_array_equal([c.params for c in model.cameras.values()], before)


def test_each_camera_has_its_own():
  model = synthetic((28.0, -24.0), images=15, cameras=2)
  kept = min(model.cameras)
  adjusted, found = principal_point.refine(model, {kept})
  assert [row['camera'] for row in found] == sorted(set(model.cameras) - {kept})
  np.testing.assert_array_equal(adjusted.cameras[kept].params, model.cameras[kept].params)


@pytest.mark.parametrize(
  'make',
  [
    lambda: synthetic((5.0, 5.0), images=2, points=12),  # Two photographs do not determine it.
    lambda: synthetic((260.0, 0.0)),  # No lens is so far off: something else is wrong.
  ],
)
def test_stays_at_the_centre_where_nothing_sure_is_found(make):
  model = make()
  adjusted, found = principal_point.refine(model)
  assert adjusted is model
  assert found == []
