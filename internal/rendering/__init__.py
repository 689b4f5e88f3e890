"""Rendering a trained scene: images, camera paths, surfaces."""
