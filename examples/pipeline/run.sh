#!/usr/bin/env bash
# The whole road in one go: raw files -> curated shards -> base model -> fine-tuned model -> evaluation -> served page.
#
#     examples/pipeline/run.sh DATA OUT        (make pipeline: DATA=../shared/data OUT=runs/pipeline)
#
# DATA is any folder of what `warploom data run` reads. If it has web/*.warc.gz and corpora/novels-*, these two are the
# sources, mixed by weight; otherwise the folder is one source. EVAL is a folder of benchmarks, by default DATA/eval: the
# text is cleaned of what stands in them, and the models answer the first LIMIT items of each of TASKS. INSTRUCTIONS is
# the file to fine-tune on, by default that of DATA/posttrain. BUDGET is the time of the base model. Everything is
# written into OUT; run again, each step goes on where it was.
set -euo pipefail
DATA=${1:?folder of raw text} OUT=${2:?folder to write}
BUDGET=${BUDGET:-5m}
INSTRUCTIONS=${INSTRUCTIONS-$(ls "$DATA"/posttrain/dolly_hhrlhf_train_small.jsonl.gz 2>/dev/null || true)}
EVAL=${EVAL-$(ls -d "$DATA"/eval 2>/dev/null || true)}
TASKS=${TASKS:-arc_easy,arc_challenge,hellaswag,truthfulqa} LIMIT=${LIMIT:-100}
WARPLOOM=${WARPLOOM:-warploom}
mkdir -p "$OUT"

step() { printf '\n=== %s\n' "$1"; }
run() { printf '$ warploom %s\n' "$*"; $WARPLOOM "$@"; }
source_of() { printf '[[source]]\nname = "%s"\npaths = ["%s"]\nweight = %s\nmax_epochs = 4\n\n' "$@"; }

step "Curate"
{
    if compgen -G "$DATA/web/*.warc.gz" >/dev/null && compgen -G "$DATA/corpora/novels-*" >/dev/null; then
        source_of web "$DATA/web/*.warc.gz" 1
        source_of novels "$DATA/corpora/novels-*" 20
    else
        source_of text "$DATA" 1
    fi
    cat "$(dirname "$0")/steps.toml"
    if [ -n "$EVAL" ]; then printf '\n[[step]]\nuse = "decontaminate"\ntasks = "%s"\n' "$EVAL"; fi
} >"$OUT/pipeline.toml"
run data run "$OUT/pipeline.toml" --out "$OUT/curated"

step "Train a base model, $BUDGET"
run train --data "$OUT/curated/tokens" --budget "$BUDGET" --train.out-dir "$OUT/base"

models=("$OUT/base") compared=("$OUT/base")
if [ -n "$INSTRUCTIONS" ]; then
    step "Fine-tune: adapters, on the answers alone, merged at the end"
    run finetune "$OUT/base" --data "$INSTRUCTIONS" --train.out-dir "$OUT/tuned" \
        --tune.chat-template alpaca --tune.no-wrap-prompts --tune.lora.rank 16 --tune.merge \
        --tune.forgetting-data "$OUT/curated/tokens" --optimizer.lr 1e-3 \
        --train.seq-len 256 --train.global-batch-size 16 --train.epochs 2 --train.eval-every 20
    models=("$OUT/tuned/merged" "$OUT/base") compared+=("$OUT/tuned/merged")
else
    echo "No fine-tuning: set INSTRUCTIONS to a file of examples (docs/finetuning.md)."
fi

step "Evaluate: held-out text, then benchmarks"
{
    for model in "${models[@]}"; do run eval "$model" --data "$OUT/curated/tokens"; done
    if [ -n "$EVAL" ]; then
        run eval "${compared[@]}" --tasks "$TASKS" --data "$EVAL" --limit "$LIMIT" --out "$OUT/eval"
    fi
} | tee "$OUT/evaluation.txt"

step "Serve"
$WARPLOOM serve "${models[@]}" --port 0 >"$OUT/serve.log" &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
until grep -q "Serving" "$OUT/serve.log"; do kill -0 "$server"; sleep 0.2; done
url=$(grep -o 'http://[^ /]*' "$OUT/serve.log" | head -1)
until curl -sf "$url/health" >/dev/null; do kill -0 "$server"; sleep 0.2; done
curl -sf "$url/" | grep -o '<title>.*</title>'
curl -sf "$url/v1/completions" -H 'Content-Type: application/json' -d '{"prompt": "It was", "max_tokens": 30}'
kill -INT "$server"
wait "$server" || true

printf '\n\nReports: %s\n' "$(ls "$OUT"/*/report.html "$OUT"/eval/comparison.html 2>/dev/null | tr '\n' ' ')"
echo "The page: $WARPLOOM serve ${models[*]}"
