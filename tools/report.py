"""Write report.json and a table of a tiny run.

Same as `megatron-ral report`. See `megatron_ral/commands/report.py`.
"""

import sys

from megatron_ral.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
