"""Structure from motion: from photographs or a video to a posed capture."""
