#!/usr/bin/env bash
# Everything worth knowing on a fresh GPU machine, in under 9 minutes: torch >= 2.11, no network.
#     bash bench/gpu.sh                    the results go into $OUT (default out/gpu)
#     bash bench/gpu.sh --device cpu       the same parts at toy size, to see that they work
# Every part writes a .txt and a .err, training also a run folder. The most wanted parts come first:
# each has a time limit, none gets more than is left of the nine minutes, and a failure ends none of
# the others. The exit code says whether all went well.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu} PYTHON=${PYTHON:-python3} DATA=${DATA:-data/toy}
case "$*" in
    "") device=cuda ;;
    "--device cuda" | "--device cpu") device=$2 ;;
    *) echo "error: $* is not understood: bash bench/gpu.sh [--device cpu]" >&2; exit 1 ;;
esac
if [ -e "$OUT/local_k2" ]; then
    echo "error: $OUT holds results already: name another folder with OUT=" >&2
    exit 1
fi
if [ "$device" = cuda ] && ! $PYTHON -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
    echo "error: $PYTHON finds no torch or no GPU here: bash bench/gpu.sh --device cpu" >&2
    exit 1
fi
mkdir -p "$OUT" || exit 1
failed=0

part() {  # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 left=$((520 - SECONDS)) begun=$SECONDS code
    shift 2
    if [ "$limit" -gt "$left" ]; then limit=$left; fi
    echo "=== $name: $*"
    if [ "$limit" -lt 10 ]; then echo "!!! $name: no time left"; failed=1; return; fi
    timeout -s TERM -k 15 "$limit" "$@" > "$OUT/$name.txt" 2> "$OUT/$name.err"
    code=$?
    tail -n 30 "$OUT/$name.txt"
    # out of time, training has saved its state, and --resume=True goes on
    if [ "$name" = train ] && [ $code -eq 124 ]; then code=0; fi
    if [ $code -eq 124 ]; then echo "!!! $name: its time limit has passed"; fi
    if [ $code -ne 0 ]; then
        echo "!!! $name: exit code $code"
        tail -n 5 "$OUT/$name.err"
        failed=1
    fi
    echo "--- $name took $((SECONDS - begun)) s"
}

eager=(--dtype=float32 --compile=False) compiled=(--dtype=bfloat16 --compile=True,reduce-overhead)
check=() size=() few=() graphs=(--compile=reduce-overhead) alternatives=(--dtype=bfloat16 --compile) updates=${UPDATES:-15000}
if [ "$device" = cpu ]; then
    size=(--n_layer=2 --n_head=2 --n_embd=16 --block_size=32 --batch_size=4)
    few=(--vocab_size=500 --rounds=2)
    check=(--compile=False) graphs=() compiled=(--dtype=bfloat16) alternatives=(--batch_size=1) updates=40
fi
run=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=1 train.py config/local_k2.py
     --device="$device" --data="$DATA" "${size[@]}")
speed=("$PYTHON" bench/speed.py --device="$device")
formulations=("$PYTHON" bench/alternatives.py --device="$device" "${alternatives[@]}" "${few[@]}")

[ -f "$DATA/meta.json" ] || part data 60 "$PYTHON" prepare.py toy
part check 120 "$PYTHON" bench/check.py --device="$device" "${check[@]}"
part speed_eager 90 "${speed[@]}" --parts "${eager[@]}" "${size[@]}" "${few[@]}"
part speed 180 "${speed[@]}" "${compiled[@]}" "${size[@]}" "${few[@]}" \
    --variants=baseline,local,global
part train 120 "${run[@]}" --out="$OUT/local_k2" --max_iters="$updates"
part eval 30 "$PYTHON" eval.py "$OUT/local_k2" --device="$device"
# the ramp under CUDA graphs: from one stream to both, and another coefficient every update
part ramp 60 "${run[@]/k2.py/k2_ramp.py}" "${graphs[@]}" --out="$OUT/ramp" --max_iters=40 \
    --eval_interval=20 --log_interval=5
part fsdp 60 "${run[@]}" --out="$OUT/fsdp" --fsdp=True --max_iters=20 \
    --eval_interval=20 --log_interval=10
part attention_1024 45 "${formulations[@]}" --what=attention --tokens=1024
part alternatives 60 "${formulations[@]}"
echo "=== all parts took $SECONDS s"
exit $failed
