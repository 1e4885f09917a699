"""`python -m ast_fast` is the command `ast-fast`."""

import sys

from .cli import main

sys.exit(main())
