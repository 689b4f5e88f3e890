"""Fields: what turns Gaussians into features, density and colour."""
