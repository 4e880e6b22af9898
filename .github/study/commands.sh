#!/usr/bin/env bash
# All runs behind RESULTS.md, from the folder of adagrpo.py: about ten hours of one core
# if records.jsonl were empty; what it holds is not run again.
set -euo pipefail

study="python .github/study/study.py --out .github/study/records.jsonl"  # resumes: all is there
tune="$study --validation --seeds 0 1 2 3 4"
$tune --arms nll nll,epochs=4 nll,lr=1e-4,epochs=6 nll,lr=3e-4 nll,lr=6e-4,epochs=2 adagrpo adagrpo-2.5 adagrpo-10 \
  adagrpo,epochs=4 adagrpo,lr=3e-4 adagrpo,lr=1e-4,epochs=6 adagrpo,min_difficulty=0.15 adagrpo,min_difficulty=0.6 \
  adagrpo,min_discriminability=0 adagrpo,min_discriminability=0.003 adagrpo,min_discriminability=0.03 \
  adagrpo,min_discriminability=0.1 level-3.5 spread-3.3 random whole mix-0.1 mix-0.3 mix-1 mix-3 mix-0.3,epochs=4 \
  mix-0.3,lr=3e-4 mix-0.3,lr=1e-4,epochs=6 difficulty-0.3 difficulty-0.7 difficulty-2.2 discriminability-0.7 \
  discriminability-1.6 discriminability-4 distil-1,w=8 distil-0.3,w=8 distil-1,w=4 gated-distil-10,w=8 \
  gated-distil-3,w=8 gated-distil-10,w=4 clicks,steps=400 clicks clicks,click_lr=1e-3 mix-0.1,draws=8 mix-0.3,draws=8 \
  mix-1,draws=8 mix-0.3,draws=32 adagrpo-1,draws=8,min_difficulty=0.9 adagrpo-2,draws=8,min_difficulty=0.9 \
  adagrpo-4,draws=8,min_difficulty=0.9 adagrpo-1,draws=32,min_difficulty=0.9 adagrpo-2,draws=32,min_difficulty=0.9 \
  adagrpo-4,draws=32,min_difficulty=0.9
$study --validation --seeds 0 1 2 3 --arms clicks,passes=2 clicks,passes=2,click_lr=1e-4
$study --validation --seeds 0 1 --arms clicks,click_lr=1e-4
for epochs in 3 6 10; do $tune --slates 60000 --ranker_epochs $epochs --arms before; done
for epochs in 3 6 12; do $tune --slates 20000 --ranker_epochs $epochs --arms before; done
for epochs in 2 3 6; do $tune --ranker_epochs $epochs --arms before; done
$study --seeds $(seq 60 69) --arms before nll adagrpo mix-0.3 nll,epochs=4 random level-3.5 mix-1 mix-0.1 \
  distil-1,w=4 gated-distil-10,w=4 difficulty-0.7 difficulty-2.2 discriminability-1.6 mix-0.3,epochs=4 whole \
  spread-3.3 oracle-1.6 clicks adagrpo,clicks=1 mix-0.3,clicks=1 random,clicks=1 level-3.5,clicks=1 mix-0.3,draws=8 mix-0.3,draws=32 \
  adagrpo-2,draws=8,min_difficulty=0.9 adagrpo-2,draws=32,min_difficulty=0.9
some="$study --seeds 60 61 62 63"
$some --arms diagnosis diagnosis,clicks=1 mix-3 adagrpo-2.5 adagrpo-10 adagrpo,min_discriminability=0 \
  adagrpo,min_discriminability=0.003 adagrpo,min_discriminability=0.03 adagrpo,min_discriminability=0.1 \
  adagrpo,min_difficulty=0.15 adagrpo,min_difficulty=0.6
gates="before nll adagrpo mix-0.3 mix-1 diagnosis random level-3.5"
for ranker in rates exposure noise; do $some --ranker $ranker --arms $gates; done
for slates in 60000 20000; do $some --slates $slates --ranker_epochs 6 --arms $gates; done
for bias in 0 0.5; do $some --bias $bias --arms nll adagrpo mix-0.1 mix-0.3 mix-1 mix-3 random level-3.5; done
for passes in 4 24; do $some --pretrain_epochs $passes --arms nll adagrpo mix-0.3 mix-1; done
$study --seeds 60 61 62 --everybody --arms nll adagrpo mix-0.3 mix-1
for correlation in 0 1; do $some --season_correlation $correlation --arms nll adagrpo mix-0.3; done
$some --max_grad_norm 50 --arms nll adagrpo mix-1
for setting in "epochs 4" "epochs 24" "lr 3e-3" "lr 1e-2"; do
  $study --validation --seeds 0 1 2 --pretrain_$setting --arms nll
done
