"""A package, so that `include 'configs/360.gin'` is found from any working directory."""
