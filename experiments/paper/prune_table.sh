#!/usr/bin/env bash
# Main table of Prune-then-Finetune: every cell as a command that goes on where it stopped.
#
#   bash experiments/paper/prune_table.sh --list      print the commands, run nothing
#   bash experiments/paper/prune_table.sh             run them, one after the other
#   MODELS=amazon/chronos-bolt-base DATA=ETTh1 HORIZONS=96 bash experiments/paper/prune_table.sh
#
# MODELS: some of KNOWN below. WEIGHTS: a folder or file in place of the hub name. OUT, PYTHON as in sff_table.sh.
# TINY="FLAGS": replace context, horizon, batches, epochs and grids by these flags, for a trial.
# What others report is in prune_reported.csv.
# Grids, batches, epochs and strides are those of the released scripts (SJTU-DMTai/Prune-then-Finetune), first-order
# scores as they run there, Adam without decay (Time-MoE: AdamW, 0.1), flat for 4 epochs, then x 0.9, patience 1,
# seed 1. Ratio and EMA are chosen by validation of the model that is not fine-tuned, the learning rate after that.
# The whole model's arms have the budget of the pruned ones.
set -euo pipefail

KNOWN="amazon/chronos-bolt-base ibm-granite/granite-timeseries-ttm-r2 google/timesfm-2.0-500m-pytorch"
KNOWN="$KNOWN thuml/timer-base-84m Maple728/TimeMoE-50M Maple728/TimeMoE-200M"
KNOWN="$KNOWN Salesforce/moirai-1.0-R-base Salesforce/moirai-1.0-R-large"
MODELS=${MODELS:-$KNOWN}
DATA=${DATA:-ETTh1 ETTh2 ETTm1 ETTm2 weather}
HORIZONS=${HORIZONS:-96 192 336 720}
OUT=${OUT:-runs/paper/prune}
PYTHON=${PYTHON:-python}
EMA="--ema 0.1,0.2,0.4,0.5,0.8"
RELEASED="--score taylor1 --schedule pruning --patience 1 --methods ff --seeds 1 --quirks no-dropout"

settings() { # of a model and a data set: context, grids, batches, epochs
  local epochs=1
  case $1 in
    *chronos-bolt*)
      echo "--context 2048 --ratio 0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9 --prune-batch-size 512 --macro-batch 8192" \
        "--prune-epochs 1 --lr 1e-2,1e-3,1e-4,1e-5,1e-6 --batch-size 256 --epochs 1 --tune chosen" ;;
    *ttm*)
      case $2 in ETTm*) epochs=10 ;; esac
      echo "--context 1536 --ratio 0.01,0.02,0.05 --prune-batch-size 64 --macro-batch 1024 --prune-epochs $epochs" \
        "--lr 1e-2,1e-3,1e-4,1e-5,1e-6,1e-7,1e-8,1e-9 --batch-size 64 --epochs 10 --tune each" ;;
    *timesfm*)
      echo "--context 2048 --ratio 0.01,0.02,0.05,0.1,0.15 --prune-batch-size 64 --macro-batch 8192 --prune-epochs 1" \
        "--lr 1e-7,1e-8,1e-9 --batch-size 128 --epochs 1 --tune chosen" ;;
    *timer-base*)
      echo "--context 2880 --ratio 0.05,0.1,0.15,0.2 --prune-batch-size 512 --macro-batch 8192 --prune-epochs 10" \
        "--stride 2880 --lr 1e-5,1e-6,1e-7,1e-8,1e-9 --batch-size 512 --epochs 10 --tune chosen" ;;
    *TimeMoE*)
      local batch=32 threshold=0.01
      case $1 in *200M) batch=16 ;; esac
      case $2 in ETTh1) threshold=0.1 ;; ETTm1) threshold=0.001 ;; esac
      echo "--context 4096 --ratio 0.01,0.02,0.05,0.1 --prune-batch-size $batch --macro-batch 8192 --prune-epochs 10" \
        "--stride 4096 --expert-threshold $threshold --lr 1e-4,1e-5 --batch-size 64 --epochs 1 --tune chosen" ;;
    *moirai*)
      echo "--ratio 0.05,0.1,0.15,0.2 --macro-batch 8192 --prune-epochs 10 --lr 1e-4,1e-5,1e-6,1e-7,1e-8,1e-9" \
        "--epochs 1 --tune each $(moirai "$1" "$2")" ;;
    *) echo "no settings for $1; known: $KNOWN" >&2; return 2 ;;
  esac
}

moirai() { # context and batch by data set
  case $1:$2 in
    *:ETTh1 | *base:ETTm1) echo "--context 2048 --prune-batch-size 512 --batch-size 512" ;;
    *base:ETTh2 | *base:ETTm2) echo "--context 4096 --prune-batch-size 64 --batch-size 64" ;;
    *large:ETTh2) echo "--context 3072 --prune-batch-size 64 --batch-size 64" ;;
    *large:ETTm2) echo "--context 4096 --prune-batch-size 256 --batch-size 256" ;;
    *) echo "--context 3072 --prune-batch-size 512 --batch-size 512" ;;
  esac
}

failed=0
for model in $MODELS; do
  for data in $DATA; do
    for horizon in $HORIZONS; do
      sizes="${TINY:-}"
      if [ -z "$sizes" ]; then sizes="--horizon $horizon $(settings "$model" "$data") $EMA"; fi
      weights=${WEIGHTS:-$model}
      adam="--optimizer adam --weight-decay 0"
      case $weights in
        *granite-timeseries-ttm-r2) weights=$weights@1536-$horizon-r2 ;; # a checkpoint for each horizon
      esac
      case $model in
        *TimeMoE*) adam="--optimizer adamw --weight-decay 0.1 --betas 0.9,0.95" ;;
      esac
      command="$PYTHON -m experiments.prune_then_finetune --data $data --model $weights $sizes $adam $RELEASED"
      case $model in
        *ttm*) command="$command,head-only" ;;
        *timer-base*) command="$command,every-linear" ;;
      esac
      command="$command --out $OUT/$(basename "$data" .csv)-$horizon-$(basename "$model")"
      echo "$command"
      if [ "${1:-}" != --list ]; then
        # one that cannot run does not keep the others from it; a stop (75, 130) stops all
        code=0
        $command || code=$?
        case $code in 0) ;; 75 | 130) exit $code ;; *) failed=1 ;; esac
      fi
    done
  done
done
exit $failed
