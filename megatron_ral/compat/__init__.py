"""One file per third-party workaround: which version, why, and the test that tells when it can go."""
