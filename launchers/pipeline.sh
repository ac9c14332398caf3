#!/usr/bin/env bash
# The whole way as a chain of jobs: images -> image shards -> tokenizer -> token shards -> pre-training -> release; with validation
# images on to fine-tuning -> release of the classifier -> top-1; with scenes on to segmentation -> its release -> mIoU.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: bash launchers/pipeline.sh IMAGES_DIR OUT_DIR [vitb|vitl|vith] [-- key.sub=value ...]

  IMAGES_DIR   images: a folder a class, or any tree without labels
  OUT_DIR      seen by all nodes; gets images/ tokenizer_run/ tokens/ pretrain/ release/ logs/
  after --     settings of the masked pre-training recipe; they go to tokenization and pre-training, which read the same one

VAL_DIR=DIR in the environment, validation images in the same class folders, takes the chain on to the final top-1: fine-tuning at
224 px, for vith then at 448 px, release, evaluation. OUT_DIR gets val_images/ finetune/ finetune_448/ classifier/ top1.json too.

SCENES_DIR=DIR and SCENES_VAL_DIR=DIR, images with class maps to train and to measure on (ADEChallengeData2016/images/training and
.../validation), take it on to a segmenter, its release and its mIoU. OUT_DIR gets scenes/ val_scenes/ segment/ segmenter/ miou.json.

Further arguments of one stage, split at spaces, from the environment:
  PREPARE_ARGS       both sets of images; fine-tuning at 448 px wants them larger than tokenizer and pre-training do
  PREPARE_VAL_ARGS   after these, the set of VAL_DIR alone; ILSVRC's flat folder: "--synsets LOC_val_solution.csv"
  TOKENIZER_ARGS     the recipe wants "perceptual.weights=/path/to/vit-b-300ep.pth.tar"; the tokenizer is judged on the last 64
                     images, which its training leaves out (data.holdout)
  TOKENIZE_ARGS PRETRAIN_ARGS EVALUATE_ARGS
  CONVERT_ARGS       the release; default "--to timm"
  CONVERT_CLASSIFIER_ARGS   the classifier's; default: CONVERT_ARGS
  FINETUNE_ARGS FINETUNE_448_ARGS   a model size changed after -- has to be changed in each of them as well
  PREPARE_SCENES_ARGS   both sets of scenes; ADE20K: "--reduce_zero_label"
  SEGMENT_ARGS EVALUATE_SEGMENTER_ARGS
  CONVERT_SEGMENTER_ARGS    the segmenter's release; default "--to hf"
TOKENIZE_PARTS (default 8) array tasks share the tokenization. sbatch options: cluster.env.
Prints one line a job: stage and job id. A job starts when the one before it has succeeded; if one fails the rest is cancelled.
EOF
}

fail() {
    echo "error: $*" >&2
    exit 2
}

class_folders() {  # less those that systems make, as pack_images.py leaves them out
    (
        cd "$1" && shopt -s nullglob nocasematch && for folder in */; do
            case "${folder%/}" in
                @eaDir | @tmp | @recycle | @Recently-Snapshot | @__thumb | @Transcode | @ShareSnap | @SynoResource) ;;
                '#recycle' | '#snapshot' | '~snapshot' | '$RECYCLE.BIN' | RECYCLER | RECYCLED | '$Extend' | '$WinREAgent') ;;
                'System Volume Information' | Config.Msi | lost+found | __MACOSX | 'Network Trash Folder') ;;
                'Temporary Items' | TheVolumeSettingsFolder | __pycache__ | _vti_cnf | _vti_pvt | LOST.DIR) ;;
                found.[0-9][0-9][0-9]) ;;
                *) echo "${folder%/}" ;;
            esac
        done | LC_ALL=C sort
    )
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
[ -d "$images_dir" ] || fail "$images_dir: no such folder of images"
val_dir="${VAL_DIR:-}"
if [ -n "$val_dir" ]; then
    [ -d "$val_dir" ] || fail "VAL_DIR $val_dir: no such folder of images"
    [ -n "$(class_folders "$images_dir")" ] || fail "$images_dir: holds no class folders; fine-tuning needs them, leave VAL_DIR out to end at the release"
    if [[ "${PREPARE_ARGS:-} ${PREPARE_VAL_ARGS:-}" != *--synsets* ]]; then  # found out by fine-tuning, it would cost a pre-training of waiting
        differing="$(LC_ALL=C comm -3 <(class_folders "$images_dir") <(class_folders "$val_dir") | tr -d '\t')"
        [ -z "$differing" ] || fail "VAL_DIR $val_dir: class folder '${differing%%$'\n'*}' is not in it and $images_dir alike;" \
            "give both the same classes, or name a flat folder's labels by PREPARE_VAL_ARGS=\"--synsets FILE\""
    fi
fi
for name in PREPARE_VAL_ARGS CONVERT_CLASSIFIER_ARGS FINETUNE_ARGS FINETUNE_448_ARGS EVALUATE_ARGS; do
    [ -z "${!name:-}" ] || [ -n "$val_dir" ] || fail "$name is set, but without VAL_DIR the chain ends at the release; set VAL_DIR, or unset $name"
done
scenes_dir="${SCENES_DIR:-}"
scenes_val_dir="${SCENES_VAL_DIR:-}"
if [ -n "$scenes_dir$scenes_val_dir" ]; then
    [ -n "$scenes_dir" ] && [ -n "$scenes_val_dir" ] || fail "SCENES_DIR and SCENES_VAL_DIR: one is set without the other; set both"
    [ -d "$scenes_dir" ] || fail "SCENES_DIR $scenes_dir: no such folder of images"
    [ -d "$scenes_val_dir" ] || fail "SCENES_VAL_DIR $scenes_val_dir: no such folder of images"
fi
for name in PREPARE_SCENES_ARGS SEGMENT_ARGS CONVERT_SEGMENTER_ARGS EVALUATE_SEGMENTER_ARGS; do
    [ -z "${!name:-}" ] || [ -n "$scenes_dir" ] || fail "$name is set, but without SCENES_DIR no segmenter is trained; set it, or unset $name"
done
[ -z "${FINETUNE_448_ARGS:-}" ] || [ "$size" = vith ] || fail "FINETUNE_448_ARGS is set, but $size is fine-tuned at 224 px alone; unset it"
command -v sbatch > /dev/null || fail "sbatch is not on the PATH; run this on a login node of the cluster"
parts="${TOKENIZE_PARTS:-8}"
[[ "$parts" =~ ^[1-9][0-9]*$ ]] || fail "TOKENIZE_PARTS '$parts': a number of array tasks, at least 1"

launchers="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launchers/cluster.env
source "$launchers/cluster.env"
images_dir="$(cd "$images_dir" && pwd)"
[ -z "$val_dir" ] || val_dir="$(cd "$val_dir" && pwd)"
if [ -n "$scenes_dir" ]; then
    scenes_dir="$(cd "$scenes_dir" && pwd)"
    scenes_val_dir="$(cd "$scenes_val_dir" && pwd)"
fi
whole="$(realpath -m -- "$out")"
for folder in "$images_dir" ${val_dir:+"$val_dir"} ${scenes_dir:+"$scenes_dir" "$scenes_val_dir"}; do
    images="$(realpath -- "$folder")"
    [[ "$whole/" != "$images/"* ]] || fail "OUT_DIR $out: lies in the images $folder, where it would become a class; give another folder"
    [[ "$images/" != "$whole/images/"* && "$images/" != "$whole/val_images/"* && "$images/" != "$whole/"*scenes/* ]] || fail "$folder: OUT_DIR $out gets a folder of that name" \
        "for what it makes; give another OUT_DIR"
done
mkdir -p "$out/logs" 2> /dev/null || fail "OUT_DIR $out: cannot be made"
[ -w "$out/logs" ] || fail "OUT_DIR $out: cannot be written"
out="$(cd "$out" && pwd)"  # recipes take relative paths under data.root

read -r -a prepare_args <<< "${PREPARE_ARGS:-}"
read -r -a prepare_val_args <<< "${PREPARE_VAL_ARGS:-}"
read -r -a tokenizer_args <<< "${TOKENIZER_ARGS:-}"
read -r -a tokenize_args <<< "${TOKENIZE_ARGS:-}"
read -r -a pretrain_args <<< "${PRETRAIN_ARGS:-}"
read -r -a convert_args <<< "${CONVERT_ARGS:---to timm}"
read -r -a convert_classifier_args <<< "${CONVERT_CLASSIFIER_ARGS:-${CONVERT_ARGS:---to timm}}"
read -r -a finetune_args <<< "${FINETUNE_ARGS:-}"
read -r -a finetune_448_args <<< "${FINETUNE_448_ARGS:-}"
read -r -a evaluate_args <<< "${EVALUATE_ARGS:-}"
read -r -a prepare_scenes_args <<< "${PREPARE_SCENES_ARGS:-}"
read -r -a segment_args <<< "${SEGMENT_ARGS:-}"
read -r -a convert_segmenter_args <<< "${CONVERT_SEGMENTER_ARGS:---to hf}"
read -r -a evaluate_segmenter_args <<< "${EVALUATE_SEGMENTER_ARGS:-}"
read -r -a sbatch_args <<< "$PECO_SBATCH_ARGS"
read -r -a train_sbatch_args <<< "$PECO_SBATCH_TRAIN_ARGS"

jobs=()
as=
trap '[ $? = 0 ] || [ ${#jobs[@]} = 0 ] || scancel "${jobs[@]}"' EXIT  # half a chain would wait for what never comes

# [as=NAME] submit STAGE [sbatch option ...] -- [stage argument ...]   after the job submitted last; NAME is for a stage that runs twice
submit() {
    local stage="$1" name="${as:-$1}" options=() id
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    [ ${#jobs[@]} = 0 ] || options+=(--dependency="afterok:${jobs[-1]}" --kill-on-invalid-dep=yes)
    id="$(sbatch --parsable --output="$out/logs/$name-%A.log" "${sbatch_args[@]}" "${options[@]}" "$launchers/$stage.sbatch" "$@")"
    jobs+=("${id%%;*}")  # "id;cluster" on a federation
    echo "$name ${jobs[-1]}"
}

data=(data.images="$out/images" data.tokens="$out/tokens" data.tokenizer="$out/tokenizer_run/tokenizer")

submit prepare_data -- --images "$images_dir" --out "$out/images" "${prepare_args[@]}"
if [ -n "$val_dir" ]; then
    as=prepare_val submit prepare_data -- --images "$val_dir" --out "$out/val_images" "${prepare_args[@]}" "${prepare_val_args[@]}"
fi
submit train_tokenizer "${train_sbatch_args[@]}" -- --out "$out/tokenizer_run" data.images="$out/images" data.val_images= data.holdout=64 \
    "${tokenizer_args[@]}"
submit tokenize --array="0-$((parts - 1))" --output="$out/logs/tokenize-%A_%a.log" -- \
    --parts "$parts" --recipe "$recipe" "${data[@]}" "${mim_settings[@]}" "${tokenize_args[@]}"
submit tokenize_finish -- --parts "$parts" --recipe "$recipe" "${data[@]}" "${mim_settings[@]}" "${tokenize_args[@]}"
submit "pretrain_$size" "${train_sbatch_args[@]}" -- --out "$out/pretrain" "${data[@]}" "${mim_settings[@]}" "${pretrain_args[@]}"
submit convert -- "$out/pretrain" --out "$out/release" "${convert_args[@]}"

classify() {  # fine-tuning, its release, its top-1
    local labelled=(data.images="$out/images" data.val_images="$out/val_images") classifier="$out/finetune"
    submit "finetune_$size" "${train_sbatch_args[@]}" -- --out "$classifier" "${labelled[@]}" init.weights="$out/pretrain" \
        "${finetune_args[@]}"
    if [ "$size" = vith ]; then
        submit finetune_vith_448 "${train_sbatch_args[@]}" -- --out "$out/finetune_448" "${labelled[@]}" init.weights="$classifier" \
            "${finetune_448_args[@]}"
        classifier="$out/finetune_448"
    fi
    as=convert_classifier submit convert -- "$classifier" --out "$out/classifier" "${convert_classifier_args[@]}"
    submit evaluate -- "$out/classifier" --images "$out/val_images" --out "$out/top1.json" "${evaluate_args[@]}"
}

segment() {  # the segmenter, its release, its mIoU
    as=prepare_scenes submit prepare_data -- --images "$scenes_dir" --labels scenes --out "$out/scenes" "${prepare_scenes_args[@]}"
    as=prepare_val_scenes submit prepare_data -- --images "$scenes_val_dir" --labels scenes --out "$out/val_scenes" \
        "${prepare_scenes_args[@]}"
    submit "segment_$size" "${train_sbatch_args[@]}" -- --out "$out/segment" data.images="$out/scenes" \
        data.val_images="$out/val_scenes" init.weights="$out/release" "${segment_args[@]}"
    as=convert_segmenter submit convert -- "$out/segment" --out "$out/segmenter" "${convert_segmenter_args[@]}"
    as=evaluate_segmenter submit evaluate -- "$out/segmenter" --images "$out/val_scenes" --out "$out/miou.json" \
        "${evaluate_segmenter_args[@]}"
}

[ -z "$val_dir" ] || classify
[ -z "$scenes_dir" ] || segment
