"""Entry point `torchrun ... -m megatron_ral.replay`: see `commands/replay.py`."""

import sys

from megatron_ral.commands.replay import main

if __name__ == "__main__":
    sys.exit(main())
