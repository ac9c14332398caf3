#!/usr/bin/env bash
# The whole way as a chain of jobs: pictures -> image shards -> tokenizer -> token shards -> pre-training -> release.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: bash launchers/pipeline.sh IMAGES_DIR OUT_DIR [vitb|vitl|vith] [-- key.sub=value ...]

  IMAGES_DIR   pictures: a folder a class, or any tree without labels
  OUT_DIR      seen by all nodes; gets images/ tokenizer_run/ tokens/ pretrain/ release/ logs/
  after --     settings of the masked pre-training recipe; they go to tokenization and pre-training, which read the same one

Further arguments of one stage, split at spaces, from the environment: PREPARE_ARGS TOKENIZER_ARGS TOKENIZE_ARGS PRETRAIN_ARGS
CONVERT_ARGS (default: --to timm). The recipe wants TOKENIZER_ARGS="perceptual.weights=/path/to/vit-b-300ep.pth.tar"; the tokenizer
is judged on the last 64 pictures, which its training leaves out (data.holdout). TOKENIZE_PARTS (default 8) array tasks share the
tokenization. sbatch options: cluster.env.
Prints one line a job: stage and job id. A job starts when the one before it has succeeded; if one fails the rest is cancelled.
EOF
}

fail() {
    echo "error: $*" >&2
    exit 2
}

[ "${1:-}" != --help ] || { usage; exit 0; }
[ $# -ge 2 ] || fail "two folders are needed, IMAGES_DIR and OUT_DIR; see bash launchers/pipeline.sh --help"
images_dir="$1"
out="$2"
shift 2
size=vith
if [ $# -gt 0 ] && [ "$1" != -- ]; then
    size="$1"
    shift
fi
case "$size" in
    vitb) recipe=peco_vitb16 ;;
    vitl) recipe=peco_vitl16 ;;
    vith) recipe=peco_vith14 ;;
    *) fail "model '$size': known are vitb, vitl and vith" ;;
esac
[ $# -eq 0 ] || [ "$1" = -- ] || fail "'$1': settings stand after --"
[ $# -eq 0 ] || shift
mim_settings=("$@")
[ -d "$images_dir" ] || fail "$images_dir: no such folder of pictures"
command -v sbatch > /dev/null || fail "sbatch is not on the PATH; run this on a login node of the cluster"
parts="${TOKENIZE_PARTS:-8}"
[[ "$parts" =~ ^[1-9][0-9]*$ ]] || fail "TOKENIZE_PARTS '$parts': a number of array tasks, at least 1"

launchers="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launchers/cluster.env
source "$launchers/cluster.env"
mkdir -p "$out/logs"
images_dir="$(cd "$images_dir" && pwd)"
out="$(cd "$out" && pwd)"  # recipes take relative paths under data.root

read -r -a prepare_args <<< "${PREPARE_ARGS:-}"
read -r -a tokenizer_args <<< "${TOKENIZER_ARGS:-}"
read -r -a tokenize_args <<< "${TOKENIZE_ARGS:-}"
read -r -a pretrain_args <<< "${PRETRAIN_ARGS:-}"
read -r -a convert_args <<< "${CONVERT_ARGS:---to timm}"
read -r -a sbatch_args <<< "$PECO_SBATCH_ARGS"
read -r -a train_sbatch_args <<< "$PECO_SBATCH_TRAIN_ARGS"

jobs=()
trap '[ $? = 0 ] || [ ${#jobs[@]} = 0 ] || scancel "${jobs[@]}"' EXIT  # half a chain would wait for what never comes

# submit STAGE [sbatch option ...] -- [stage argument ...]   after the job submitted last
submit() {
    local stage="$1" options=() id
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    [ ${#jobs[@]} = 0 ] || options+=(--dependency="afterok:${jobs[-1]}" --kill-on-invalid-dep=yes)
    id="$(sbatch --parsable --output="$out/logs/$stage-%A.log" "${sbatch_args[@]}" "${options[@]}" "$launchers/$stage.sbatch" "$@")"
    jobs+=("${id%%;*}")  # "id;cluster" on a federation
    echo "$stage ${jobs[-1]}"
}

data=(data.images="$out/images" data.tokens="$out/tokens" data.tokenizer="$out/tokenizer_run/tokenizer")

submit prepare_data -- --images "$images_dir" --out "$out/images" "${prepare_args[@]}"
submit train_tokenizer "${train_sbatch_args[@]}" -- --out "$out/tokenizer_run" data.images="$out/images" data.val_images= data.holdout=64 \
    "${tokenizer_args[@]}"
submit tokenize --array="0-$((parts - 1))" --output="$out/logs/tokenize-%A_%a.log" -- \
    --recipe "$recipe" "${data[@]}" "${mim_settings[@]}" "${tokenize_args[@]}"
submit tokenize_finish -- --recipe "$recipe" "${data[@]}" "${mim_settings[@]}" "${tokenize_args[@]}"
submit "pretrain_$size" "${train_sbatch_args[@]}" -- --out "$out/pretrain" "${data[@]}" "${mim_settings[@]}" "${pretrain_args[@]}"
submit convert -- "$out/pretrain" --out "$out/release" "${convert_args[@]}"
