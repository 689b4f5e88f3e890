"""The demo scene: a procedural world, its ray tracer and a capture of it."""
