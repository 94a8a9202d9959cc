#!/usr/bin/env bash
# All that only a GPU can answer, in one run of at most 25 minutes: the tests, the open questions of GPU_TODO.md in
# their order, the benches against the peers. A step that fails or runs out of time does not stop the rest.
#
#   bench/gpu_check.sh [OUT [STEP ...]]     all steps, or the named ones; results go to OUT (default: bench/results/gpu)
#   bench/gpu_check.sh --list               the steps with their limits in seconds
#
# PYTHON names the interpreter.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
# the packages need not be installed
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

is_list=""
out=${1:-bench/results/gpu}
if [ "$out" = --list ]; then
    is_list=1
    out=OUT
fi
shift $(($# > 0 ? 1 : 0))
chosen=" $* "
started=$SECONDS
budget=1500
failed=0
summary=""

# step NAME LIMIT COMMAND...
step() {
    local name=$1 limit=$2 status before left
    shift 2
    if [ -n "$is_list" ]; then
        printf '%-16s %5d  %s\n' "$name" "$limit" "$*"
        return
    fi
    if [ "$chosen" != "  " ] && [[ $chosen != *" $name "* ]]; then
        return
    fi
    before=$SECONDS
    left=$((budget - (before - started)))
    printf '\n== %s: %s\n' "$name" "$*"
    if [ "$left" -lt 10 ]; then
        status="no time left"
    else
        timeout --kill-after=10 "$((limit < left ? limit : left))" "$@" 2>&1 | tee "$out/$name.log"
        case ${PIPESTATUS[0]} in
            0) status=ok ;;
            124 | 137) status="out of time" ;;
            *) status="failed" ;;
        esac
    fi
    if [ "$status" != ok ]; then
        failed=$((failed + 1))
    fi
    summary+=$(printf '%-16s %5d s  %s' "$name" "$((SECONDS - before))" "$status")$'\n'
}

if [ -z "$is_list" ]; then
    mkdir -p "$out" || exit 2
    "$python" -m torch.utils.collect_env > "$out/environment.txt" 2>&1
    nvidia-smi >> "$out/environment.txt" 2>&1
fi

# 0 and 4: correctness
step tests 390 "$python" -m pytest -q -m "not slow" --maxfail=40 -p no:cacheprovider
step offline 60 "$python" -m grpo_kernels.offline
# 1: does a product with fp32 results keep cuBLAS's rate; how many rows does a block want
step products 90 "$python" -m bench.bench_tiles products --out "$out/products.json"
# 2: are the passes bound by memory, and does a tile stay in L2
step passes 50 "$python" -m bench.bench_tiles passes --depths 4096 --out "$out/passes.json"
# 3: which candidate wins at which D
step fused 170 "$python" -m bench.bench_tiles fused --out "$out/fused.json"
# 5: against the peers; all of them at the first shape, then the other shapes, then random data
step head 240 "$python" -m bench.bench_head --device cuda --repeats 1 --shape 8192,4096,151936 --out "$out/head.json"
few=(--only ours --only ours-fused --only trl --only liger --only floor)
step head-shapes 200 "$python" -m bench.bench_head --device cuda --repeats 1 "${few[@]}" \
    --shape 16384,2048,151936 --shape 32768,1536,151936 --shape 8192,4096,128256 --out "$out/head_shapes.json"
step head-random 60 "$python" -m bench.bench_head --device cuda --repeats 1 --data random --shape 8192,4096,151936 \
    --only ours --only cce --only cce-exact --only trl --out "$out/head_random.json"
# 6: rows left out (25, 50 and 75 % of 8192), and the frozen head
step rows 60 "$python" -m bench.bench_head --device cuda --repeats 1 --only ours --shape 6144,4096,151936 \
    --shape 4096,4096,151936 --shape 2048,4096,151936 --out "$out/rows.json"
step frozen 60 "$python" -m bench.bench_head --device cuda --repeats 1 --frozen --only ours --only trl --only floor \
    --shape 8192,4096,151936 --out "$out/frozen.json"
# 7: what bounds a pass, a fused product and a gradient product
step profile 40 ncu --clock-control none --print-summary per-kernel \
    --kernel-name 'regex:_exp_tile_kernel|_fused_exp_kernel|nvjet|gemm|cutlass' \
    --metrics sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed,dram__throughput.avg.pct_of_peak_sustained_elapsed,lts__t_sector_hit_rate.pct \
    "$python" -m bench.bench_tiles products passes fused --rows 2048 --depths 4096 --columns 4096 --vocab 16384 --repeats 1
# 8: optimiser steps, alone and end to end
step adamw 20 "$python" -m bench.bench_adamw --model Qwen3-0.6B --repeats 50
step main-job 60 "$python" -m bench.bench_main_job --steps 12 --out "$out/main_job.json"

if [ -z "$is_list" ]; then
    echo
    printf '%s' "$summary" | tee "$out/summary.txt"
    if [ "$failed" -gt 0 ]; then
        exit 1
    fi
fi
