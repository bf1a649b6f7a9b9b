"""Write docs/settings.md.

Same as `megatron-ral settings`. See `megatron_ral/commands/settings.py`.
"""

import sys

from megatron_ral.commands.settings import main

if __name__ == "__main__":
    sys.exit(main())
