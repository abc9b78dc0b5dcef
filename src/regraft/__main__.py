"""`python -m regraft`: the command."""

from regraft.cli import main

raise SystemExit(main())
