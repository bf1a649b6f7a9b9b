"""Tiny model and data of the benchmarks that reuse the distributed tests."""

from pathlib import Path


def make_tiny_material(root: Path) -> tuple[str, str, str]:
    """Make two perturbed copies of a tiny model and a digit-search data set below `root`.

    Returns:
        Folders of the policy, the other model and the data.
    """
    from tests.conftest import perturbed_copy, run_tools

    sizes = {"single": 64, "search": 128, "biased": 32, "rl": 128, "heldout": 64}
    options = [part for name, number in sizes.items() for part in (f"--num-{name}", number)]
    run_tools(
        ("make_tiny_model.py", "--output", root / "made"),
        ("make_digit_search.py", "--output", root / "data", *options, "--shard-size", 16),
    )
    policy, other = (perturbed_copy(root / "made", root / name, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    return str(policy), str(other), str(root / "data")
