"""Describe a folder of shards.

Same as `megatron-ral inspect`. See `megatron_ral/commands/inspect.py`.
"""

import sys

from megatron_ral.commands.inspect import main

if __name__ == "__main__":
    sys.exit(main())
