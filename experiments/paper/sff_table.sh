#!/usr/bin/env bash
# Main table of Smoothed Full Fine-tuning: every cell as a command that goes on where it stopped.
#
#   bash experiments/paper/sff_table.sh --list      print the commands, run nothing
#   bash experiments/paper/sff_table.sh             run them, one after the other
#   DATA="ETTh1 weather" METHODS="ff sff" bash experiments/paper/sff_table.sh
#
# MODELS: published weights, a model folder or a file. OUT: folder of the results. TINY="FLAGS": replace the sizes of
# the paper by these flags, for a trial. PYTHON: the interpreter. What others report is in sff_reported.csv.
# Settings are those of the released script (Meteor-Stars/SFF): context 672, horizon 96, direct loss, Adam 3e-5 without
# decay, halving, batch 2048, 10 epochs, alpha 0.7, seed 0, its borders of ETTm1 and PEMS. Test errors of every epoch
# are kept, as it is not known which epoch the paper reports: python -m experiments.report FOLDER --report-by last.
set -euo pipefail

MODELS=${MODELS:-Timer_forecast_1.0.ckpt}
DATA=${DATA:-ETTh1 ETTh2 ETTm1 ETTm2 weather electricity traffic exchange_rate PEMS03 PEMS04 PEMS07 PEMS08}
METHODS=${METHODS:-zero_shot tfs lp lpff ff sff}
OUT=${OUT:-runs/paper/sff}
PYTHON=${PYTHON:-python}
SETTINGS=${TINY:---context 672 --horizon 96 --batch-size 2048 --epochs 10}
RELEASED="--mode direct --optimizer adam --weight-decay 0 --lr 3e-5 --schedule halving --seeds 0 --test-each-epoch"

failed=0
for model in $MODELS; do
  for data in $DATA; do
    name=$(basename "$data" .csv)-$(basename "$model")
    for method in $METHODS; do
      command="$PYTHON -m experiments.sff --data $data --model $model --methods $method $SETTINGS $RELEASED"
      command="$command --quirks etm1_typo,pems_ratio --out $OUT/$name"
      if [ "$method" = sff ]; then command="$command --alpha 0.7"; fi
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
