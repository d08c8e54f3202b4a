#!/usr/bin/env bash
# Teach the five finest layers of the bundled model, then compare with its attention.
set -euo pipefail
sd-hyena train -m demo -t high -n 400 -r 1e-3 -b 16 -s 200 -d 1 -o out/high
sd-hyena evaluate -m demo -y out/high/Hyena-00400.safetensors -o out/high
