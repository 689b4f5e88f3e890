"""A copy of a trained field as 3D Gaussians: fitting, drawing, file formats and a web page."""
