"""Write an HTML page of a checkpoint's attention.

Same as `megatron-ral attention`. See `megatron_ral/commands/attention.py`.
"""

import sys

from megatron_ral.commands.attention import main

if __name__ == "__main__":
    sys.exit(main())
