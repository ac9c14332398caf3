#!/usr/bin/env bash
# The benchmarks that matter on one GPU, most telling first, within PECO_BENCH_SECONDS (470) in all; what does not fit
# any more (the start-up, most likely) wants a higher one. No network, no edit.
#
#   bash benchmarks/run_gpu.sh                              # on the GPU
#   PECO_BENCH_DEVICE=cpu bash benchmarks/run_gpu.sh        # the same commands at small sizes on a machine without one
#
# OUT                 folder of records, plots and logs (default: benchmarks/out_gpu)
# PECO_BENCH_IMAGES   folder of images for data and tokenizing (default: what they find)
# PYTHON              the interpreter (default: python)
#
# peers, step and plan_step write their records as they grow, so that one which is cut off leaves what it has measured.
# Exit code 1 if a part failed; 0 also where parts were cut off.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
out=${OUT:-benchmarks/out_gpu}
python=${PYTHON:-python}
mkdir -p "$out" || exit 1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
images=()
[ -z "${PECO_BENCH_IMAGES:-}" ] || images=(--images "$PECO_BENCH_IMAGES")

if [ "${PECO_BENCH_DEVICE:-gpu}" = cpu ]; then
  gpu=() first=() others=() small=(--rounds 2 model.depth=2 run.micro_batch=2) few=(--rounds 1) launch=(--launchers python --starts 1)
  plan=(--rows "width 384" --rounds 2)
  export CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu
else
  gpu=(--gpu) first=(--sizes "H/14 at 224") others=(--sizes "L/16 at 224,B/16 at 224,H/14 at 448") small=() few=() launch=(--launchers python --starts 1)
  plan=(--rounds 3)
fi

ends=$((SECONDS + ${PECO_BENCH_SECONDS:-470}))
failed=0
: >"$out/summary.txt"

say() { printf '%s\n' "$*" | tee -a "$out/summary.txt"; }

# part NAME SECONDS BENCHMARK OPTION...: its words go to NAME.log; a time limit ends it, the next part follows.
part() {
  local name=$1 limit=$2 program=$3 left=$((ends - SECONDS)) begun=$SECONDS code
  shift 3
  [ "$limit" -lt "$left" ] || limit=$left
  if [ "$limit" -lt 20 ]; then
    say "$name: not begun, the time is up"
    return
  fi
  rm -f "$out/$name.md"
  timeout --kill-after=5 "$limit" "$python" -m "benchmarks.$program" "$@" >"$out/$name.log" 2>&1
  code=$?
  case $code in
    0) say "$name: done in $((SECONDS - begun)) s" ;;
    124 | 137) say "$name: cut off after $limit s; $([ -f "$out/$name.md" ] && echo "$out/$name.md has what was measured until then" || echo "nothing was recorded")" ;;
    *)
      say "$name: failed with $code after $((SECONDS - begun)) s, $out/$name.log ends in: $(tail -n 1 "$out/$name.log")"
      failed=1
      ;;
  esac
}

part peers_first 110 peers "${gpu[@]}" "${first[@]}" "${small[@]}" --budget_s 75 --record "$out/peers_first.md" --plot "$out/peers_first.png"
part step 110 step "${gpu[@]}" "${small[@]}" --profile --budget_s 75 --record "$out/step.md" --plot "$out/step.png"
part plan_step 60 plan_step "${gpu[@]}" "${plan[@]}" --record "$out/plan_step.md"
[ ${#others[@]} -eq 0 ] || part peers_others 100 peers "${gpu[@]}" "${others[@]}" --budget_s 65 --record "$out/peers_others.md" --plot "$out/peers_others.png"
part data 50 data "${gpu[@]}" "${few[@]}" "${images[@]}" --record "$out/data.md"
part tokenizing 90 tokenizing "${gpu[@]}" "${few[@]}" "${images[@]}" --record "$out/tokenizing.md"
part launch 130 launch "${gpu[@]}" "${launch[@]}" --record "$out/launch.md"
say "records are in $out"
exit $failed
