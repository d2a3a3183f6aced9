#!/usr/bin/env bash
# The runs of docs/language-models.md, each whole: training, and all that is measured.
set -eo pipefail

usage() {
  cat <<'TEXT'
usage: bash recipes/language_models.sh data PROSE CODE        once: hold out, tokenise, write the samples
       bash recipes/language_models.sh RUN [STEP ...]         one run, or some of its steps
       bash recipes/language_models.sh report RUN ...         what runs gave, side by side: tables and pictures in RUNS/report

RUN    METHOD-POSITIONS-SEED, such as asentmax-nape-1 or softmax-rope-1 (Transformers' own Llama with SDPA). RoPE is measured
       with YaRN (but for softmax without its attention factor) and NTK too, all in blocks: of 1,024 tokens,
       RoPE of 512 and there with YaRN's factor alone too.
STEP   train, perplexity, retrieval (zero-shot), cloze (lm-eval), tune (fine-tuning on retrieval, and retrieval again); by
       default all. A step that is done is not done again; a training that was stopped goes on.
PROSE and CODE are corpora with the columns text, path, group and source.

variables, with their defaults:
  DATA=data  RUNS=runs  PYTHON=python
  TRAIN_OPTIONS, TUNE_OPTIONS   more options of pretrain.py and finetune.py, such as '--per_device_train_batch_size 32
                                --gradient_accumulation_steps 2' where memory is short
  LENGTHS='1024 2048 4096 8192 16384 32768'  RETRIEVAL_LENGTHS='512 1024 2048 4096 8192 16384'
  SAMPLES=20                    of a cell of depth and length; five times as many where a task has no depths
Paths are taken from the root of the repository. Everything else is in this file.
TEXT
}

cd "$(dirname "$0")/.."
DATA=${DATA:-data} RUNS=${RUNS:-runs} PYTHON=${PYTHON:-python} SAMPLES=${SAMPLES:-20}
read -ra TRAIN <<<"${TRAIN_OPTIONS:-}"
read -ra TUNE <<<"${TUNE_OPTIONS:-}"
read -ra LENGTHS <<<"${LENGTHS:-1024 2048 4096 8192 16384 32768}"
read -ra RETRIEVAL_LENGTHS <<<"${RETRIEVAL_LENGTHS:-512 1024 2048 4096 8192 16384}"
STEPS=(train perplexity retrieval cloze tune)
ADAMW=(--adam_beta2 0.95 --weight_decay 0.1 --lr_scheduler_type cosine --warmup_steps 0.05)

make_data() { # PROSE CODE
  "$PYTHON" scripts/hold_out.py --data "$1" --group_column group --order_column path --output_dir "$DATA/prose"
  "$PYTHON" scripts/hold_out.py --data "$2" --group_column source --order_column path --output_dir "$DATA/code"
  "$PYTHON" scripts/tokenize_data.py --data "$DATA/prose/train.parquet" "$DATA/code/train.parquet" --vocab_size 16384 \
    --max_tokens 55000000 45000000 --output_dir "$DATA/tokens"
  "$PYTHON" -m hf_asentmax write cloze --data "$DATA/prose/long.parquet" --output_dir "$DATA/cloze"
  "$PYTHON" -m hf_asentmax write retrieval --tokenizer "$DATA/tokens" --length 1024 --samples 24000 \
    --output "$DATA/retrieval.jsonl"
}

train() {
  "$PYTHON" scripts/pretrain.py --config recipes/llama-42m.json --data "$DATA/tokens" --tokenizer "$DATA/tokens" \
    --sequence_length 1024 --num_train_epochs 3 --per_device_train_batch_size 64 --learning_rate 1e-3 "${ADAMW[@]}" \
    --bf16 --torch_compile --dataloader_drop_last --logging_steps 50 --save_steps 1000 \
    --eval_data "$DATA/*/short.parquet" --attention "$METHOD" "${KIND[@]}" --seed "$SEED" "${TRAIN[@]}" --output_dir "$OUT"
}

perplexity() {
  local corpus read
  for corpus in prose code; do
    read=("$PYTHON" scripts/evaluate_perplexity.py --data "$DATA/$corpus/long.parquet" --lengths "${LENGTHS[@]}" --buckets 0
      --bf16)
    "${read[@]}" --model "${READ_ROPES[@]/*/$OUT}" --rope "${READ_ROPES[@]}" --output_dir "$OUT/perplexity-$corpus"
    "${read[@]}" --model "${BLOCK_ROPES[@]/*/$OUT}" --rope "${BLOCK_ROPES[@]}" --block "$BLOCK" \
      --output_dir "$OUT/blocks/perplexity-$corpus"
  done
}

find_facts() { # FOLDER SAMPLES OPTION ...
  "$PYTHON" scripts/evaluate_retrieval.py --lengths "${RETRIEVAL_LENGTHS[@]}" --samples "$2" "${@:3}" --bf16 \
    --output_dir "$1"
}

find_whole() { # MODEL FOLDER SAMPLES TASK ...
  find_facts "$2" "$3" --task "${@:4}" --model "${FIND_ROPES[@]/*/$1}" --rope "${FIND_ROPES[@]}" --batch_size 25
}

retrieval() {
  find_whole "$OUT" "$OUT/retrieval" "$SAMPLES" needle passkey
  find_facts "$OUT/blocks/retrieval" "$SAMPLES" --task needle passkey --model "$OUT" --block "$BLOCK" # a prompt at a time
}

cloze() {
  "$PYTHON" -m lm_eval --model hf --include_path "$DATA/cloze" --tasks cloze --batch_size 64 \
    --model_args "pretrained=$OUT,trust_remote_code=True,dtype=bfloat16" --output_path "$OUT/cloze"
}

tune() {
  [ -e "$OUT-tuned/results.json" ] ||
    "$PYTHON" scripts/finetune.py --model "$OUT" --attention "$METHOD" --data "$DATA/retrieval.jsonl" \
      --sequence_length 1024 --per_device_train_batch_size 64 --num_train_epochs 1 --learning_rate 3e-4 "${ADAMW[@]}" --bf16 \
      --torch_compile --dataloader_drop_last --save_strategy no "${OWN[@]}" "${TUNE[@]}" --output_dir "$OUT-tuned"
  find_whole "$OUT-tuned" "$OUT-tuned/depths" "$SAMPLES" needle multikey
  find_whole "$OUT-tuned" "$OUT-tuned/retrieval" "$((5 * SAMPLES))" passkey multivalue multiquery variables common_words \
    frequent_words
}

report() { # RUN ...
  local measure run folders names
  for measure in {,/blocks}/perplexity-{prose,code} {,/blocks}/retrieval/{needle,passkey} -tuned/depths/{needle,multikey} \
    -tuned/retrieval/{passkey,multivalue,multiquery,variables,common_words,frequent_words}; do
    folders=() names=()
    for run in "$@"; do # runs that differ in their seed are runs of one method
      [ ! -e "$RUNS/$run$measure/results.json" ] || folders+=("$RUNS/$run$measure") names+=("${run%-*}")
    done
    [ "${#folders[@]}" = 0 ] || "$PYTHON" -m hf_asentmax evaluate join --results "${folders[@]}" --method "${names[@]}" \
      --title "${measure#[-/]}" --output_dir "$RUNS/report/${measure#[-/]}"
  done
}

case "${1:-}" in
  "" | -h | --help) usage && exit ;;
  data)
    [ $# = 3 ] || { echo "data must have two corpora, PROSE and CODE, got $(($# - 1)); see --help" >&2 && exit 2; }
    make_data "$2" "$3" && exit
    ;;
  report)
    [ $# -gt 1 ] || { echo "report must have the runs to put side by side, got none; see --help" >&2 && exit 2; }
    report "${@:2}" && exit
    ;;
esac
RUN=$1
[[ $RUN =~ ^([a-z_]+)-(rope|nope|alibi|nape)-([0-9]+)$ ]] ||
  { echo "RUN must be METHOD-POSITIONS-SEED, such as asentmax-nape-1, got $RUN; see --help" >&2 && exit 2; }
METHOD=${BASH_REMATCH[1]} SEED=${BASH_REMATCH[3]} OUT=$RUNS/$RUN
KIND=(--positions "${BASH_REMATCH[2]}") OWN=()
if [ "${BASH_REMATCH[2]}" = rope ]; then # as it is, and beyond the trained length
  FACTOR=:1 # left out: YaRN's own is softmax's
  if [ "$METHOD" = softmax ]; then # Transformers' own model
    OWN=(--attn_implementation sdpa) KIND=(--attn_implementation sdpa) FACTOR=
  fi
  READ_ROPES=(none "yarn:8$FACTOR" "yarn:32$FACTOR" dynamic:1) FIND_ROPES=(none "yarn:16$FACTOR")
  BLOCK=512 BLOCK_ROPES=(none yarn:1:1.3) # YaRN's attention factor alone, of a context 20 times as long
else
  READ_ROPES=(none) FIND_ROPES=(none) BLOCK=1024 BLOCK_ROPES=(none)
fi
shift
for step in "${@:-${STEPS[@]}}"; do
  [[ " ${STEPS[*]} " == *" $step "* ]] || { echo "STEP must be one of ${STEPS[*]}, got $step; see --help" >&2 && exit 2; }
done
for step in "${@:-${STEPS[@]}}"; do
  if [ -e "$OUT/$step.done" ]; then echo "$RUN $step: done before" && continue; fi
  echo "$RUN $step"
  "$step"
  touch "$OUT/$step.done"
done
