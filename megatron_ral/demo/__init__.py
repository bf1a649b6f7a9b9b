"""Code that the demonstrations in `tools/` share. The rest of the package does not use it."""
