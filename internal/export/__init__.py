"""Export of points, meshes and depth maps for other programs."""
