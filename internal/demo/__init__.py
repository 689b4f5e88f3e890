"""The demo scene: a still life in an endless landscape, ray traced."""
