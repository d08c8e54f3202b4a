#!/usr/bin/env bash
# Pictures with what examples/train.sh has taught, beside attention's from the same seeds, and how far they are apart.
set -euo pipefail
MODEL=${MODEL:-demo} OUT=${OUT:-out} SIZE=${SIZE:-256} STEPS=${STEPS:-160} DRAW=${DRAW:-30} COUNT=${COUNT:-4}
PROMPT=${PROMPT:-"a fox on the left, brick wall"}
last=$(printf %05d "$STEPS")

# A sweep, as in 2024: attention (the empty entry), one layer, then two stacked, then all that stage 2 taught.
layers=("$OUT"/noise/*/Hyena-"$last".safetensors)
one=${layers[0]} two=${layers[${#layers[@]} - 1]} # the first and the last that were taught from noise
sd-hyena generate -m "$MODEL" -y ",$one,$one+$two,$OUT/together/Hyena-$last.safetensors" -p "$PROMPT" -q "" \
    -W "$SIZE" -H "$SIZE" -n "$COUNT" -s "$DRAW" -c 7 -k 7 -f "{h}_{n:03d}" --grid -o "$OUT/pictures"

# One file of all layers that were taught one by one, and the same measured against the model's own attention, on prompts
# that no recipe trains on, unless PROMPTS is a file of others, one a line.
sd-hyena merge "${layers[@]}" -o "$OUT/noise.safetensors"
sd-hyena evaluate -m "$MODEL" -y "$OUT/noise.safetensors,$OUT/together/Hyena-$last.safetensors" \
    ${PROMPTS:+--prompts "$PROMPTS"} -W "$SIZE" -H "$SIZE" -s "$DRAW" -n "$COUNT" -o "$OUT/evaluation"
