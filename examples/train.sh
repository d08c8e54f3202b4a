#!/usr/bin/env bash
# Teach layers of your own model, in three ways. MODEL is demo, a checkpoint file, a diffusers folder or a hub id.
#   MODEL=v1-5-pruned-emaonly.safetensors SIZE=512 STEPS=400 bash examples/train.sh
set -euo pipefail
MODEL=${MODEL:-demo} OUT=${OUT:-out} SIZE=${SIZE:-256} STEPS=${STEPS:-160} BATCH=${BATCH:-16}

# The finest layers, which each family of models has elsewhere, unless LAYERS names others.
high='import json, sys; print(*(t["name"] for t in json.load(sys.stdin)["targets"] if "high" in t["groups"]))'
LAYERS=${LAYERS:-$(sd-hyena targets -m "$MODEL" --json | python -c "$high")}

# As in 2024: one layer after another, from noise. It reads the layer's weights alone and draws nothing.
for layer in $LAYERS; do
    sd-hyena train -m "$MODEL" -t $layer --data noise --operator causal --init random \
        -n "$STEPS" -b "$BATCH" -W "$SIZE" -H "$SIZE" -d 1 -s 0 -l "$OUT/logs" -o "$OUT/noise/$layer"
done

# Today: all the finest layers at once, from pictures that the model draws.
sd-hyena train -m "$MODEL" -t high -n "$STEPS" -b "$BATCH" -W "$SIZE" -H "$SIZE" -d 1 -s 0 \
    --n_images "${IMAGES:-96}" --n_held_out "${HELD_OUT:-32}" -l "$OUT/logs" -o "$OUT/high"

# And then together in the UNet (stage 2), from where that ended.
sd-hyena train -m "$MODEL" -t high -n 0 --finetune_steps "$STEPS" -p "$OUT/high/Hyena-$(printf %05d "$STEPS").safetensors" \
    -b "$BATCH" -W "$SIZE" -H "$SIZE" -d 1 -s 0 \
    --n_images "${IMAGES:-96}" --n_held_out "${HELD_OUT:-32}" -l "$OUT/logs" -o "$OUT/together"
