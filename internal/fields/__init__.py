"""Radiance fields: from Gaussians to features, density and colour."""
