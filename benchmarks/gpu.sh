#!/usr/bin/env bash
# All that a GPU has to show, in at most 15 minutes: bash benchmarks/gpu.sh FOLDER
#
# Tests on the device; a layer's attention in three ways; a step, scoring and sampling against TRL
# and `generate` at the shapes of Pythia-160M, 410M and 2.8B (bf16, n = 8, P = 512, T = 128); LoRA at
# 2.8B. Each line of results names its setting; log.txt keeps what was said. What takes too long or
# fails is reported at the end, and the rest still runs.
#
# `DEVICE=cpu bash benchmarks/gpu.sh FOLDER` tries all of it at toy sizes. `PARTS=step` keeps the parts
# whose module is named so: tests, attention, step, scoring, sampling.
set -u
out=${1:?Name a folder for the results}
python=${PYTHON:-python}
device=${DEVICE:-cuda}
mkdir -p "$out"
failed=()

if [ "$device" = cpu ]; then
    shape="--dtype bfloat16 --prompt 12 --response 5 --n 4 --rounds 1 --layers 1 --hidden 64 --vocab 500"
    sizes=(gpt2 gpt_neox)
    large="--arch llama"
else
    shape="--dtype bfloat16 --prompt 512 --response 128 --n 8 --rounds 5"
    sizes=(pythia-160m pythia-410m)
    large="--arch pythia-2.8b"
fi

part() { # SECONDS NAME COMMAND...: a part of the whole, no longer than that
    local limit=$1 name=$2 start=$SECONDS
    shift 2
    [[ " ${PARTS:-${name%% *}} " == *" ${name%% *} "* ]] || return
    ((limit > 900 - SECONDS)) && limit=$((900 - SECONDS))
    ((limit < 1)) && { failed+=("$name: no time left"); return; }
    echo "== $name: $*" | tee -a "$out/log.txt"
    timeout "$limit" "$@" >> "$out/log.txt" 2>&1 || failed+=("$name")
    echo "   $((SECONDS - start)) s" | tee -a "$out/log.txt"
}

bench() { # SECONDS MODULE OPTIONS...
    local limit=$1 module=$2
    shift 2
    part "$limit" "$module $*" "$python" -m "benchmarks.$module" --device "$device" \
        --out "$out/$module.jsonl" $shape "$@"
}

VCB_DEVICE=$device part 120 tests "$python" -m pytest -q tests/test_gpu.py tests/test_packing.py -k "cuda or gpu"
bench 60 attention --prompts 4
for size in "${sizes[@]}"; do
    bench 60 step --arch "$size" --prompts 4
    bench 40 scoring --arch "$size" --prompts 4
    bench 60 sampling --arch "$size" --prompts 4
done
bench 150 step $large --prompts 1 --ways trl shared
bench 120 step $large --prompts 1 --ways trl shared --checkpointing true
bench 120 step $large --prompts 1 --ways trl shared --lora 16
bench 90 sampling $large --prompts 4

echo "Results: $out. ${#failed[@]} of the parts failed."
for name in "${failed[@]}"; do echo "  $name"; done
exit $((${#failed[@]} > 0))
