#!/usr/bin/env python3
"""The seed's command line for calibration; the same as ``kvlathe tune``."""

import sys

from kvlathe.legacy.auto_tune import tune_main

if __name__ == "__main__":
    sys.exit(tune_main())
