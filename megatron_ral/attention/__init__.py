"""The paper: attention rows, their distributions, divergences and masses, and the targets they are compared with."""
