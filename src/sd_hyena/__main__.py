"""``python -m sd_hyena`` is the same as ``sd-hyena``."""

from .cli import main

raise SystemExit(main())
