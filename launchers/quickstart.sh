#!/usr/bin/env bash
# The main job, small: photographs -> image shards -> perceptual tokenizer -> token shards -> masked pre-training under
# ZeRO-3 -> a release that timm loads.
usage="usage: bash launchers/quickstart.sh

  IMAGES=DIR        your own images, any folder (default: the photographs inside scikit-image's wheel)
  PERCEPTUAL=FILE   another judge of the tokenizer: MoCo v3 weights (vit-b-300ep.pth.tar) or any timm ViT file
                    (a ViT-B at 224 px judges slowly on a CPU: count on an hour there)
  OUT=DIR           where everything goes (default: quickstart_out); what is finished there is not done again

Without PERCEPTUAL the judge is EfficientNet-Lite0, pre-trained on ImageNet, out of an ordinary Python package."
set -euo pipefail
[ "${1:-}" != --help ] || { echo "$usage"; exit 0; }
[ $# -eq 0 ] || { echo "error: '$1': no argument is taken; see bash launchers/quickstart.sh --help" >&2; exit 2; }

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/setup_venv.sh requirements.txt tests/requirements.txt --no-deps requirements-judges.txt
out="${OUT:-quickstart_out}"
mkdir -p "$out/logs"
judge="${PERCEPTUAL:-}"
number=0 stages=7
[ -z "$judge" ] || stages=6

stage() {
    number=$((number + 1))
    echo
    echo "== stage $number of $stages: $1 (at $((SECONDS - started)) s)"
}

gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
if [ "$gpus" = 0 ]; then
    # Of the installation rather than of a run: DeepSpeed keeps what it compiles.
    echo "DeepSpeed's operator for CPUs (a minute or two the first time)"
    DS_ACCELERATOR=cpu python -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()' \
        > "$out/logs/operator.log" 2>&1 || { echo "error: it did not compile; see $out/logs/operator.log" >&2; exit 2; }
fi
started=$SECONDS

# ranks NAME STAGE ARGUMENT...
# Two ranks under the deepspeed launcher, on GPUs if there are (one rank on one). Progress lines to the terminal, all to
# a log.
ranks() {
    local name="$1" count=2 code
    shift
    [ "$gpus" != 0 ] || export DS_ACCELERATOR=cpu
    [ "$gpus" != 1 ] || count=1
    set +e
    deepspeed --num_gpus "$count" "$@" 2>&1 | tee "$out/logs/$name.log" |
        grep --line-buffered -E '^(step|held-out|tokenizer|error:|[0-9]+ images)'
    code="${PIPESTATUS[0]}"
    set -e
    [ "$code" = 0 ] || { echo "error: $name ended with $code; see $out/logs/$name.log" >&2; exit "$code"; }
}

data=(data.root="$out")

stage "pack the images"
images="${IMAGES:-}"
if [ -z "$images" ]; then
    images="$out/photographs"
    python launchers/quickstart_images.py "$images"
fi
# The last images of the shards are held out: with this seed an astronaut, a cup, a cat and a rocket, not textures.
python peco_ds/pack_images.py --images "$images" --labels none --out "$out/images/train" --short_side 256 \
    --samples_per_shard 8 --shuffle_seed 162 --workers 2

perceptual=(perceptual.weights="$judge" perceptual.image_px=0 "perceptual.blocks=[3,6,9,12]")
if [ -z "$judge" ]; then
    stage "make the judge: EfficientNet-Lite0"
    python -m peco_ds.import_judge lite0 --out "$out/judge"
    perceptual=(perceptual.weights="$out/judge")
fi

stage "train the perceptual tokenizer"
ranks tokenizer peco_ds/train_tokenizer.py --recipe quickstart_tokenizer --out "$out/tokenizer_run" "${data[@]}" \
    "${perceptual[@]}"
python launchers/quickstart_reconstructions.py "$out"
echo "look: $out/reconstructions.png"

stage "tokenize"
tokens=("${data[@]}" data.tokenizer=tokenizer_run/tokenizer)
ranks tokens peco_ds/tokenize_shards.py --recipe quickstart_vit "${tokens[@]}"

stage "masked pre-training under ZeRO-3"
ranks pretrain peco_ds/pretrain.py --recipe quickstart_vit --deepspeed_config ds_configs/zero3.json \
    --out "$out/pretrain" "${tokens[@]}"

stage "convert, and load the release with timm alone"
python -m peco_ds.convert_checkpoint "$out/pretrain" --to timm --out "$out/release" 2> "$out/logs/convert.log"
(cd "$out" && python -I -c '
import timm, torch
model = timm.create_model("local-dir:release", pretrained=True).eval()
parameters = sum(p.numel() for p in model.parameters())
features = tuple(model.forward_features(torch.zeros(1, *model.default_cfg["input_size"])).shape)
print("timm:", type(model).__name__, parameters, "parameters, features", features)')

stage "look at it"
python launchers/quickstart_table.py "$out"
echo "done in $((SECONDS - started)) s"
