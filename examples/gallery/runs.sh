#!/usr/bin/env bash
# Train the runs of the gallery (docs/gallery.md) into gallery/: minutes on two CPU cores.
#
#   examples/gallery/runs.sh        `allometry` of the current environment; `make gallery` calls it
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
cli=("$python" -m allometry.launch.cli)
export OMP_NUM_THREADS=1
mkdir -p gallery
small=(
  model.vocab_size=2048 model.width=64 model.num_layers=2 model.num_heads=4 model.num_kv_heads=2
  data.tokenizer=store/ladder/tokenizer.json
  'data.sources=[{name: python-code, train: store/ladder/python-code.train, weight: 1}]'
  evaluation.every_steps=null record.tensorboard=false training.compile=false
)

[ -f store/ladder/manifest.json ] ||
  "${cli[@]}" prepare builtin:python-code builtin:python-prose --out store/ladder --vocab-size 2048
"${cli[@]}" ladder run "$here/ladder.yaml"
"${cli[@]}" ladder fit "$here/ladder.yaml"

# Best learning rates by width under muP, and under the standard parameterization.
for kind in mup sp; do
  [ -f "gallery/$kind.jsonl" ] || "${cli[@]}" transfer preset:demo "${small[@]}" \
    "parameterization={kind: $kind$([ $kind = mup ] && echo ', base_width: 32')}" \
    --axis width --sizes 32,64,128 --seeds 1 --steps 40 --engine stacked \
    --trials "gallery/$kind.jsonl" || [ $? -eq 1 ]
done

# A mixture of experts, and whole documents on four ranks.
"${cli[@]}" train preset:moe_demo "${small[@]}" run.folder=gallery/experts \
  'model.experts={kind: swiglu, num_experts: 8, experts_per_token: 2, width: 64}' \
  data.sequence_length=128 batch.sequences=8 training.total_steps=80
"$python" -m allometry.launch.torchrun --nproc-per-node 4 -m allometry.launch.train \
  preset:documents_demo "${small[@]}" model.ffn_width=192 run.folder=gallery/documents \
  training.total_steps=4 schedule.warmup_steps=1 checkpoint.every_steps=null

"${cli[@]}" verify preset:demo model.width=48 model.num_layers=2 model.vocab_size=256 \
  model.ffn_width=96 data.sequence_length=32 batch.sequences=4 batch.micro_batch_sequences=1 \
  --layout hdp=2 --layout hdp=2,zero.stage=3 --layout tp=2 --layout pp=2 \
  --out gallery/certificate.json
