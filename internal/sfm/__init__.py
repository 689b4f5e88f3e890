"""Structure from motion: estimates the camera poses of photographs or of a video."""
