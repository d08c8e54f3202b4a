#!/usr/bin/env bash
# Teach the five finest layers of the bundled model, then compare with its attention.
set -euo pipefail
sd-hyena train -m demo --recipe standard -d 1 -o out/high
sd-hyena evaluate -m demo -y out/high/Hyena-00500.safetensors -o out/high
