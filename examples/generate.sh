#!/usr/bin/env bash
# Attention, then Hyena, from the same seeds, with a contact sheet.
set -euo pipefail
sd-hyena generate -m demo -y ",out/high/Hyena-00400.safetensors" \
    -p "a fox on the left, green background" -n 4 -k 7 --grid -o img/
