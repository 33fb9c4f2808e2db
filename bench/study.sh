#!/usr/bin/env bash
# The runs behind RESULTS.md: every recipe with three seeds, one thread per run. Takes hours. The
# same command again continues. "toy" may run at the same time as "stories" and "tuned":
#
#     bash bench/study.sh stories      real stories (data/tinystories_words, see RESULTS.md)
#     bash bench/study.sh tuned        baselines of "stories" fine-tuned, and the same from scratch
#     bash bench/study.sh toy          toy stories, on which the models learn to copy names
#     bash bench/study.sh geometry     real stories, the paper's geometry, one seed
#     bash bench/study.sh measure      their circuits, autoencoders and tables, when they are there
#     bash bench/study.sh neurons      graphs, explanations and use of units of those on real stories
#     bash bench/study.sh tradeoff     the figure of the README, from the runs of "stories"
#     bash bench/study.sh tasks        toy stories by config/demo.py: circuits of three tasks
#     bash bench/study.sh unlearn      concepts removed from the runs of "stories"
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
PYTHON=${PYTHON:-python}

SEEDS=1,2,3
sweep() {  # FOLDER CONFIG... --knob=value...: config/CONFIG.py with each of the seeds into FOLDER
    local folder=$1; shift
    local words=()
    for word in "$@"; do [[ $word == --* ]] && words+=("$word") || words+=("config/$word.py"); done
    $PYTHON -m bench.sweep "${words[@]}" --seeds=$SEEDS --device=cpu --out="$folder"
}

RAMP="--ramp_start=0.3 --ramp_end=0.8"
STORIES="--data=data/tinystories_words --n_layer=4 --n_head=4 --n_embd=64 --block_size=128
    --batch_size=8"
LONG="$STORIES --learning_rate=2e-3 --warmup_iters=50 --eval_interval=250"

case ${1:-} in
stories)
    FULL="$LONG --max_iters=1500"
    sweep out/stories/plain baseline $FULL
    sweep out/stories/constant_ramp local_k2 global_k2 $FULL --gate=constant $RAMP
    sweep out/stories/paper local_k2 global_k2 $FULL
    sweep out/stories/constant local_k2 global_k2 $FULL --gate=constant
    sweep out/stories/paper_ramp local_k2 global_k2 $FULL $RAMP
    HALF="$LONG --max_iters=750"
    sweep out/stories/half/plain baseline $HALF
    sweep out/stories/half/constant_ramp local_k2 $HALF --gate=constant $RAMP
    sweep out/stories/half/paper local_k2 $HALF
    sweep out/stories/constant_ramp local_k8 global_k8 $FULL --gate=constant $RAMP
    sweep out/stories/sigmoid_ramp local_k2 $FULL --gate=sigmoid $RAMP
    ;;
tuned)  # 375 updates from the baselines' 1,500, against 1,875 from scratch
    FROM="$STORIES --init_from=out/stories/plain/baseline_seed{seed} --max_iters=375
        --learning_rate=2e-3 --warmup_iters=25 --eval_interval=125"
    sweep out/tuned/whole local_k2 $FROM --gate=constant --ramp_end=0.5
    sweep out/tuned/plain baseline $FROM
    sweep out/tuned/scratch local_k2 $LONG --max_iters=1875 --gate=constant $RAMP
    sweep out/tuned/scratch baseline $LONG --max_iters=1875
    ;;
toy)
    SIZE="--data=data/toy --n_layer=2 --n_head=4 --n_embd=64 --block_size=64 --batch_size=12
        --learning_rate=5e-3 --warmup_iters=100 --beta2=0.99 --embd_std=0.4 --max_iters=4400
        --eval_interval=1100"
    OURS="$SIZE --gate=constant"
    sweep out/toy/plain baseline $SIZE
    sweep out/toy/constant_ramp local_k2 global_k2 $OURS $RAMP
    sweep out/toy/paper local_k2 global_k2 $SIZE
    sweep out/toy/ramp_to_0.3 local_k2 $OURS $RAMP --ablated_coeff=0.3
    sweep out/toy/ramp_to_3 local_k2 $OURS $RAMP --ablated_coeff=3
    sweep out/toy/ramp_from_0 local_k2 $OURS --ramp_start=0 --ramp_end=0.8
    sweep out/toy/ramp_from_0.6 local_k2 $OURS --ramp_start=0.6 --ramp_end=0.8
    sweep out/toy/constant local_k2 $OURS
    sweep out/toy/ramp_to_0.1 local_k2 $OURS $RAMP --ablated_coeff=0.1
    sweep out/toy/constant_ramp local_k8 global_k8 $OURS $RAMP
    sweep out/toy/paper local_k8 global_k8 $SIZE
    SEEDS=1,2,3,4,5,6,7,8,9  # how many edges: what three seeds left open
    sweep out/toy/plain baseline $SIZE
    sweep out/toy/constant_ramp local_k2 $OURS $RAMP
    FROM="--init_from=out/toy/plain/baseline_seed{seed} --max_iters=1100"
    sweep out/toy/tuned local_k2 $OURS $FROM --ramp_end=0.5
    sweep out/toy/on baseline $SIZE $FROM
    ;;
geometry)
    SEEDS=1
    sweep out/geometry baseline local_k2_ramp --data=data/tinystories_words --batch_size=8 \
        --learning_rate=2e-3 --warmup_iters=100 --max_iters=4000 --eval_interval=250 \
        --eval_windows=120
    ;;
measure)
    $PYTHON -m interp.circuits out/toy/*/*_seed? --tau 0.03,0.01,0.1,0.2,0.4,0.8 --orders 8
    SAE="--small --steps 1500 --tokens 300000 --expansion 8 --l1 5,3,7"
    $PYTHON -m interp.sae out/toy/*/*_seed? $SAE
    $PYTHON -m interp.tables out/toy/*/*_seed?
    $PYTHON -m interp.sae out/stories/{paper,constant,constant_ramp}/*_k2_seed? \
        out/stories/plain/*_seed? $SAE --layer 1,0,2,3 --site mlp_out,resid
    $PYTHON -m interp.sae out/tuned/{whole,plain,scratch}/*_seed? $SAE --layer 1 --site mlp_out,resid
    $PYTHON eval.py out/stories/*/*_seed? --over_seeds
    $PYTHON eval.py out/tuned/*/*_seed? --over_seeds
    $PYTHON eval.py out/stories/half/*/*_seed? --over_seeds
    ;;
neurons)
    RUNS=$(echo out/stories/plain/*_seed? out/stories/{paper,constant_ramp}/*_k2_seed?)
    $PYTHON -m interp.units $RUNS
    $PYTHON -m interp.n2g $RUNS --tokens 300000
    $PYTHON -m interp.explain $RUNS
    $PYTHON -m interp.tables $RUNS
    ;;
tradeoff)
    mkdir -p out/tradeoff  # links with short names, which the figure shows
    for seed in 1 2 3; do
        ln -sfn ../stories/plain/baseline_seed$seed out/tradeoff/baseline_seed$seed
        for gate in local global; do
            ln -sfn ../stories/paper/${gate}_k2_seed$seed out/tradeoff/${gate}_paper_seed$seed
            ln -sfn ../stories/constant_ramp/${gate}_k2_seed$seed \
                out/tradeoff/${gate}_recommended_seed$seed
        done
    done
    $PYTHON -m interp.sae out/tradeoff/*_seed? --small --steps 1500 --tokens 300000 --expansion 8 \
        --l1 5,3,7 --layer 1 --site resid
    $PYTHON -m interp.tables out/tradeoff/*_seed? --title \
        "The recommended recipe keeps most of the gain for autoencoders, at a fraction of the cost"
    ;;
tasks)
    SEEDS=1,2,3,4,5,6,7,8,9
    sweep out/tasks/baseline demo_baseline
    sweep out/tasks/local_k2 demo
    sweep out/tasks/local_k8 demo --k_attn=8 --k_mlp=8
    sweep out/tasks/global_k8 demo --ablation=global --k_attn=8 --k_mlp=8
    SEEDS=1,2,3
    sweep out/tasks/paper demo --gate=softmax --ramp_start=0 --ramp_end=0
    $PYTHON -m interp.circuits out/tasks/{baseline,local_k2,local_k8,global_k8}/*_seed? --method eap \
        --title "Circuits of self-ablated models and of baselines differ little"
    $PYTHON -m interp.circuits out/tasks/paper/*_seed? --method eap
    ;;
unlearn)
    $PYTHON -m interp.unlearn out/stories/plain/*_seed? \
        out/stories/{paper,constant_ramp}/local_k2_seed?
    ;;
*)
    echo "usage: bash bench/study.sh" \
        "stories|tuned|toy|geometry|measure|neurons|tradeoff|tasks|unlearn" >&2
    exit 1
    ;;
esac
