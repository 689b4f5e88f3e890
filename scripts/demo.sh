#!/usr/bin/env bash
# Runs the whole system on the demo scene: scripts/demo.sh [OUT_DIR]
#
# Sets up the environment (once), makes the scene, trains configs/demo.gin on it, evaluates, renders a
# video and exports a web page. Takes 5 to 6 minutes on two CPU cores. A second run resumes the first.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env requirements.lock
# On a CPU, XLA allocates buffers with malloc; huge pages make that much faster.
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}
SECONDS=0 # Counted up by bash; set-up does not count.

out=${1:-$ROOT/runs/demo}
mkdir -p "$out"
out=$(cd "$out" && pwd)
# The report page is headed by the name of the scene's folder.
scene=$out/still_life run=$out/run
python=$VENV/bin/python
quote() { "$python" -c 'import sys; print(repr(sys.argv[1]))' "$1"; }
settings=(
  --gin_configs="$ROOT/configs/demo.gin"
  --gin_bindings="Config.data_dir=$(quote "$scene")"
  --gin_bindings="Config.checkpoint_dir=$(quote "$run")"
)

step() { printf '\n== %s\n' "$*"; }
step 'Making the scene'
"$python" "$ROOT/scripts/make_demo_scene.py" "$scene"
step 'Training'
"$python" "$ROOT/train.py" "${settings[@]}"
step 'Evaluating the test images'
"$python" "$ROOT/eval.py" "${settings[@]}"
step 'Rendering the video'
"$python" "$ROOT/render.py" "${settings[@]}"

step 'Making a web page of it'
"$python" "$ROOT/scripts/export.py" "$run" --what page --max_splats 10000 --splat_steps 400 \
  --splat_views 12

step "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
"$python" - "$run/eval/results.json" <<'END'
import json
import sys

results = json.load(open(sys.argv[1]))
mean = results['mean']
print(f"test images  {results['num_images']}, mean PSNR {mean['psnr']:.2f} dB, SSIM {mean['ssim']:.4f}")
END
cat <<END
metrics      $run/eval/results.json
page         $run/export/page.html (open it in a browser: the scene, to walk around in)
report       $run/eval/report.html (open it in a browser)
images       $run/eval/contact_sheet.png, and one file per test image beside it
video        $run/render/color.mp4 (and depth.mp4)
training     $run/metrics.jsonl, tensorboard --logdir $run/tensorboard
END
