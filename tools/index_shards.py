"""Write missing or stale indexes of shards.

Same as `megatron-ral shards index`. See `megatron_ral/commands/shards.py`.
"""

import sys

from megatron_ral.commands.shards import index

if __name__ == "__main__":
    sys.exit(index())
