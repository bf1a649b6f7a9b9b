"""Make shards and their indexes from a file of records.

Same as `megatron-ral shards make`. See `megatron_ral/commands/shards.py`.
"""

import sys

from megatron_ral.commands.shards import make

if __name__ == "__main__":
    sys.exit(make())
