#!/usr/bin/env bash
# The conversion of docs/language-models.md: SmolLM2-135M from softmax to ASEntmax, its ablations and its softmax twin.
set -eo pipefail

usage() {
  cat <<'TEXT'
usage: bash recipes/conversion.sh data                        once, behind recipes/language_models.sh data: tokenise
       bash recipes/conversion.sh tune RUN STEPS              fine-tune for so many steps: runs/smollm2-RUN-STEPS
       bash recipes/conversion.sh measure RUN TWIN STEPS [PART ...]
                  a run, a twin and the model that both began from; beyond its 8,192 tokens by YaRN and in blocks too

RUN    annealed       alpha from 1 to 1.5 in the first 40 % of the steps
       sooner         in the first 15 %
       jump           1.5 at once
       no-scale       annealed, without a query scale
       scale-faster   annealed, the query scale at five times the rate
       lora           annealed, LoRA of rank 16 and the query scale, at 1e-3
       twin           softmax
       Behind any of them another learning rate than 2e-4: scale-faster-1e-3 and twin-1e-3 are the best.
PART   prose, code (perplexity), sparsity, retrieval, speed (of training steps); by default all

variables, with their defaults:
  SMOLLM2=smollm2               folder or Hub id of the model
  DATA=data  RUNS=runs  PYTHON=python
  LENGTH=8192                   tokens of a row in tune, at most 32,768; a step has 65,536
  TUNE_OPTIONS                  more options of finetune.py
  LENGTHS='2048 4096 8192 16384 32768'  SAMPLES=20
  WAYS='whole yarn yarn-1 blocks'  how perplexity and retrieval are read
Paths are taken from the root of the repository.
TEXT
}
refuse() {
  echo "$*; see --help" >&2
  exit 2
}

cd "$(dirname "$0")/.."
DATA=${DATA:-data} RUNS=${RUNS:-runs} PYTHON=${PYTHON:-python} SMOLLM2=${SMOLLM2:-smollm2}
LENGTH=${LENGTH:-8192} SAMPLES=${SAMPLES:-20}
read -ra LENGTHS <<<"${LENGTHS:-2048 4096 8192 16384 32768}"
read -ra WAYS <<<"${WAYS:-whole yarn yarn-1 blocks}"
read -ra MORE <<<"${TUNE_OPTIONS:-}"
PARTS=(prose code sparsity retrieval speed)
export ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=true # a layer is compiled, not 30
SCALE=(--query_scale_learning_rate 1e-3)

options() { # of a run
  local base
  case $1 in
    annealed) echo "${SCALE[*]} --alpha_fraction 0.4" ;;
    sooner) echo "${SCALE[*]} --alpha_fraction 0.15" ;;
    jump) echo "${SCALE[*]} --alpha_start 1.5" ;;
    no-scale) echo "--attention entmax --alpha_fraction 0.4" ;;
    scale-faster) echo "--query_scale_learning_rate 5e-3 --alpha_fraction 0.4" ;;
    lora) echo "$(options annealed) --lora_r 16 --learning_rate 1e-3" ;;
    twin) echo "--attention softmax" ;;
    *-[1-9]e-[1-9]) base=$(options "${1%-?e-?}") && echo "$base --learning_rate ${1: -4}" ;;
    *) refuse "RUN must be one of those that --help names, got $1" ;;
  esac
}

each_way() { # FOLDER WORD ...   reading whole, bare or by YaRN, or in blocks
  local way
  for way in "${WAYS[@]}"; do
    case $way in
      whole) "${@:2}" --output_dir "$OUT/$1-whole" ;;
      yarn) "${@:2}" --rope yarn:4 --output_dir "$OUT/$1-yarn" ;;
      yarn-1) "${@:2}" --rope yarn:4:1 --output_dir "$OUT/$1-yarn-1" ;; # without softmax's factor
      blocks) "${@:2}" --block 4096 --output_dir "$OUT/$1-blocks" ;;
      *) refuse "WAYS must be of whole, yarn, yarn-1 and blocks, got $way" ;;
    esac
  done
}
perplexity() { # CORPUS
  each_way "perplexity-$1" "$PYTHON" scripts/evaluate_perplexity.py --data "$DATA/$1/long.parquet" \
    --lengths "${LENGTHS[@]}" "${MODELS[@]}" --buckets 0
}
prose() { perplexity prose; }
code() { perplexity code; }
sparsity() {
  "$PYTHON" scripts/analyze.py --figures sparsity heads --model "$OUT" --data "$DATA/prose/long.parquet" \
    --lengths 2048 8192 --samples 2 --dtype bfloat16 --output_dir "$OUT/analysis"
}
retrieval() {
  each_way retrieval "$PYTHON" scripts/evaluate_retrieval.py --task needle passkey --lengths "${LENGTHS[@]}" \
    --samples "$SAMPLES" "${MODELS[@]}" --batch_size 10
}
speed() {
  "$PYTHON" scripts/benchmark_attention.py --checkpoints "$SMOLLM2" "$TWIN" "$OUT" --data "$DATA/prose/long.parquet" \
    --contexts 2048 8192 32768 --output_dir "$OUT/speed"
}

case "${1:-} $#" in
  " "* | "-h "* | "--help "*) usage ;;
  "data 1")
    "$PYTHON" scripts/tokenize_data.py --data "$DATA/prose/train.parquet" "$DATA/code/train.parquet" \
      --tokenizer "$SMOLLM2" --max_tokens 55000000 45000000 --output_dir "$DATA/tokens-smollm2"
    ;;
  "tune 3")
    OWN=$(options "$2")
    read -ra OWN <<<"$OWN"
    "$PYTHON" scripts/finetune.py --model "$SMOLLM2" --data "$DATA/tokens-smollm2" --sequence_length "$LENGTH" \
      --max_steps "$3" --per_device_train_batch_size $((32768 / LENGTH)) --gradient_accumulation_steps 2 --learning_rate 2e-4 \
      --weight_decay 0.01 --adam_beta2 0.95 --lr_scheduler_type cosine --warmup_steps 0.05 --bf16 --torch_compile \
      --save_strategy no --eval_data "$DATA/*/short.parquet" "${OWN[@]}" "${MORE[@]}" --output_dir "$RUNS/smollm2-$2-$3"
    ;;
  "measure "[456789])
    OUT=$RUNS/smollm2-$2-$4 TWIN=$RUNS/smollm2-$3-$4
    MODELS=(--model "$TWIN" "$OUT" "$SMOLLM2" --method twin ASEntmax original --bf16)
    for part in "${@:5}"; do
      [[ " ${PARTS[*]} " == *" $part "* ]] || refuse "PART must be one of ${PARTS[*]}, got $part"
    done
    [ $# -gt 4 ] || set -- "$@" "${PARTS[@]}"
    for part in "${@:5}"; do
      "$part"
    done
    ;;
  *) refuse "the words must be data, or tune RUN STEPS, or measure RUN TWIN STEPS [PART ...], got '$*'" ;;
esac
