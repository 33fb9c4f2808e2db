#!/usr/bin/env bash
# What to run first on a new GPU machine, in under 10 minutes. Needs torch >= 2.11, and no network.
# Compiling takes most of it: on one H200, 30 s for a plain model and 47 s for a gated one.
#     bash bench/gpu.sh                    results go into $OUT (default out/gpu)
#     bash bench/gpu.sh --device cpu       the same parts at toy size
# DATA: a prepared folder (default data/toy). UPDATES: of the training run. LIMIT: seconds for all.
# Each part writes a .txt and a .err and has a time limit. A part that fails does not stop the
# others. The exit code says whether all went well.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu} PYTHON=${PYTHON:-python3} DATA=${DATA:-data/toy} LIMIT=${LIMIT:-570}
case "$*" in
    "") device=cuda ;;
    "--device cuda" | "--device cpu") device=$2 ;;
    *) echo "error: unknown words $*: bash bench/gpu.sh [--device cpu]" >&2; exit 1 ;;
esac
stop() { echo "error: $1" >&2; exit 1; }
[ ! -e "$OUT/local_k2" ] || stop "$OUT already holds results: name another folder with OUT="
[ -f "$DATA/meta.json" ] ||
    stop "no prepared data in $DATA: python prepare.py toy, or name another folder with DATA="
finds_gpu='import sys, torch; sys.exit(not torch.cuda.is_available())'
[ "$device" = cpu ] || "$PYTHON" -c "$finds_gpu" 2> /dev/null ||
    stop "$PYTHON finds no torch or no GPU here: bash bench/gpu.sh --device cpu"
mkdir -p "$OUT" || exit 1
failed=0

part() {  # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 left=$((LIMIT - SECONDS)) begun=$SECONDS code
    shift 2
    if [ "$limit" -gt "$left" ]; then limit=$left; fi
    echo "=== $name: $*"
    if [ "$limit" -lt 10 ]; then echo "!!! $name: no time left"; failed=1; return; fi
    timeout -s TERM -k 15 "$limit" "$@" > "$OUT/$name.txt" 2> "$OUT/$name.err"
    code=$?
    tail -n 45 "$OUT/$name.txt"
    # training stopped by its time limit has saved its state
    if [ "$name" = train ] && [ $code -eq 124 ]; then code=0; fi
    if [ $code -ne 0 ]; then
        echo "!!! $name: exit code $code (124: its time limit has passed)"
        tail -n 5 "$OUT/$name.err"
        failed=1
    fi
    echo "--- $name took $((SECONDS - begun)) s"
}

updates=${UPDATES:-4000} size=(--eval_windows=192) check=() few=()
eager=(--dtype=float32 --compile=False) graphs=(--dtype=bfloat16 --compile=reduce-overhead)
compiled=(--dtype=bfloat16 --compile=True)
if [ "$device" = cpu ]; then
    updates=${UPDATES:-40} check=(--compile=False)
    size=(--eval_windows=16 --n_layer=2 --n_head=2 --n_embd=16 --block_size=64 --batch_size=4)
    few=(--vocab_size=500 --rounds=2) graphs=(--dtype=bfloat16) compiled=(--dtype=float32)
fi
train=(train.py config/local_k2.py --device="$device" --data="$DATA" "${size[@]}")
speed=("$PYTHON" -m bench.speed --device="$device" "${size[@]}" "${few[@]}")
half=("$PYTHON" "${train[@]}" --out="$OUT/stopped" --max_iters=1000 --eval_interval=500
      --log_interval=20)
# sends SIGTERM to the run whose output is the file $0, once it has taken 20 updates
interrupt='"$@" &
until grep -q "^step 20:" "$0"; do kill -0 $! || exit 1; sleep 0.2; done
kill $!
wait $!'

part check 180 "$PYTHON" -m bench.check --device="$device" "${check[@]}"
part speed_graphs 200 "${speed[@]}" "${graphs[@]}"
part train 120 "$PYTHON" "${train[@]}" --out="$OUT/local_k2" --max_iters="$updates"
part eval 30 "$PYTHON" eval.py "$OUT/local_k2" --device="$device"
part eap 60 "$PYTHON" -m interp.circuits "$OUT/local_k2" --device="$device" --method=eap --count=8
part acdc 60 "$PYTHON" -m interp.circuits "$OUT/local_k2" --device="$device" --count=8 --tau=10
part unlearn 60 "$PYTHON" -m interp.unlearn "$OUT/local_k2" --device="$device" --concept happy sad
# from one stream to both, with another coefficient at each update
part ramp 120 "$PYTHON" "${train[@]/k2.py/k2_ramp.py}" --out="$OUT/ramp" --max_iters=40 \
    --eval_interval=20 --log_interval=5
part torchrun 120 "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=1 "${train[@]}" \
    --out="$OUT/torchrun" --max_iters=20 --eval_interval=20 --log_interval=10
part stop 90 bash -c "$interrupt" "$OUT/stop.txt" "${half[@]}"
part resume 90 "${half[@]}" --resume=True
if ! grep -q "^finished: 1,000 updates" "$OUT/resume.txt"; then
    echo "!!! resume: it did not finish"
    failed=1
fi
part speed_eager 60 "${speed[@]}" "${eager[@]}"
part speed_compiled 200 "${speed[@]}" "${compiled[@]}"
echo "=== all parts took $SECONDS s, exit code $failed"
exit $failed
