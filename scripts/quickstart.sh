#!/usr/bin/env bash
# From nothing to a trained and tested recommender on real purchases. Usage: bash scripts/quickstart.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

config=configs/sasrec_cce/online_retail.yaml
started=$SECONDS
say "Training SASRec with CCE- on Online Retail: seqlit fit --config $config"
seqlit fit --config "$config"
say "Testing the best checkpoint: seqlit test --config $config"
seqlit test --config "$config"
run=$(ls -td runs/sasrec_cce/version_*/ | head -n 1)
say "Recommending for every customer: seqlit predict --config $config"
seqlit predict --config "$config"

say "Done in $((SECONDS - started)) s after installation"
cat "${run}report/report.md"
printf '\nResults lie in %s\n' "$PWD/$run"
printf '  %-28s %s\n' report/report.md "the table above" report/metrics.json "the same numbers for a program" \
  'report/*.png' "pictures" recommendations.parquet "ten items for every customer" metrics.csv "the course of training"
