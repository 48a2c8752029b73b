#!/usr/bin/env python
"""Serve a frozen model with many adapters behind OpenAI's API. `python serve.py` is `loramux serve`:

    python serve.py runs/first
    python serve.py --base HuggingFaceTB/SmolLM2-135M --adapters adapters/ --port 8080

What happens, top to bottom: settings are read (`serving/config.py`), the base, its adapters and the automatic choice
are opened (`serving/launch.py`), requests for every adapter share one batch (`serving/engine.py`), and OpenAI's routes
stand before it (`serving/api/`) until SIGTERM or Ctrl-C (`serving/server.py`).
"""

import sys

from loramux.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
