"""Entry point `torchrun ... -m megatron_ral.evaluate`: see `commands/evaluate.py`."""

import sys

from megatron_ral.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
