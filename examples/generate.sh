#!/usr/bin/env bash
# Attention, then the bundled student's sixteen Hyena layers, from the same seeds, with a contact sheet.
set -euo pipefail
sd-hyena generate -m demo -y ",demo" -p "a fox on the left, brick wall" -n 4 -k 7 --grid -o img/
