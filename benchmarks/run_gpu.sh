#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one go: build for the GPU at hand, test, sanitize, check, measure, train, and
# merge what came out into one JSON file.
#
#   bash benchmarks/run_gpu.sh [--steps build,tests,check,bench,demo,sanitize] [--suites head,losses,small,memory] [--full]
#                              [--limit SECONDS] [--jobs N] [--out FILE]
#
# --limit bounds each command; a suite begins no case after nine tenths of it, and says which it left out. --full: suites with all
# their shapes. --jobs runs the tests in N processes (needs pytest-xdist). It uses the python3 of the environment (or $PYTHON),
# which needs a CUDA build of torch; see benchmarks/README.md. A step that fails or runs past the limit is recorded, and the next
# one still runs.
# Exit status: 0 all passed, 1 a step failed, 2 no GPU or bad usage.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

python=${PYTHON:-python3}
steps=build,tests,check,bench,demo,sanitize
suites=head,losses,small,memory
full=
limit=1800
jobs=
out=
while [ $# -gt 0 ]; do
  case "$1" in
    --steps | --suites | --limit | --jobs | --out)
      if [ $# -lt 2 ]; then echo "run_gpu.sh: $1 needs a value" >&2 && exit 2; fi
      case "$1" in
        --steps) steps=$2 ;;
        --suites) suites=$2 ;;
        --limit) limit=$2 ;;
        --jobs) jobs=$2 ;;
        --out) out=$2 ;;
      esac
      shift 2
      ;;
    --full) full=--full && shift ;;
    *) echo "run_gpu.sh: unknown argument $1; accepted: --steps, --suites, --full, --limit, --jobs, --out" >&2 && exit 2 ;;
  esac
done
for step in ${steps//,/ }; do
  case "$step" in
    build | tests | check | bench | demo | sanitize) ;;
    *) echo "run_gpu.sh: unknown step $step; accepted: build, tests, check, bench, demo, sanitize" >&2 && exit 2 ;;
  esac
done
for suite in ${suites//,/ }; do
  case "$suite" in
    head | losses | small | memory | scaling) ;;
    *) echo "run_gpu.sh: unknown suite $suite; accepted: head, losses, small, memory, scaling" >&2 && exit 2 ;;
  esac
done

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "run_gpu.sh: no NVIDIA GPU that the torch of $python can use; nothing was run" >&2
  exit 2
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 PREFKERN_VALIDATE=0

# run NAME COMMAND...: the command's output goes to the terminal and to NAME.log, its outcome to NAME.step.
run() {
  local name=$1 start=$SECONDS status
  shift
  printf '\n======== %s: %s\n' "$name" "$*"
  timeout --kill-after=30 "$limit" "$@" 2>&1 | tee "$work/$name.log"
  status=${PIPESTATUS[0]}
  printf '%s\n%s\n%s\n' "$status" "$((SECONDS - start))" "$*" >"$work/$name.step"
  printf -- '-------- %s: exit status %s after %s s\n' "$name" "$status" "$((SECONDS - start))"
  return "$status"
}

skip() {
  printf 'skipped\n0\n%s\n' "$2" >"$work/$1.step"
  printf '\n======== %s skipped: %s\n' "$1" "$2"
}

wanted() { [[ ",$steps," == *",$1,"* ]]; }

prefkern() { run "$1" "$python" -c 'import sys; from prefkern.cli import main; sys.exit(main())' "${@:2}"; }

if wanted build; then
  arch=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * ((a, b) == (9, 0)))')
  isolation=()
  # With the build's own requirements installed there is nothing to download.
  if "$python" -c 'import scikit_build_core, pybind11' 2>/dev/null; then isolation=(--no-build-isolation --no-deps); fi
  run build "$python" -m pip install ${isolation[@]+"${isolation[@]}"} . --config-settings=build-dir="build/gpu-$arch" \
    --config-settings=cmake.define.PREFKERN_CUDA=ON --config-settings=cmake.define.PREFKERN_CUDA_ARCHS="$arch-real"
fi

if wanted tests; then run tests "$python" -m pytest -m cuda -q ${jobs:+-n "$jobs"} --junitxml="$work/tests.xml"; fi

if wanted check; then prefkern check check --device cuda --json "$work/check.json"; fi

if wanted bench; then
  for suite in ${suites//,/ }; do
    prefkern "suite_$suite" bench --suite "$suite" --device cuda --limit "$((limit * 9 / 10))" ${full:+"$full"} \
      --json "$work/suite_$suite.json"
  done
fi

if wanted demo; then
  run demo "$python" examples/grpo_arithmetic.py --device cuda --quick --out "$work/demo.png" --json "$work/demo.json"
fi

if wanted sanitize; then
  # Some ops of every room that has kernels: the tools slow them down many times.
  sanitized=(linear_logprobs logits_logprobs policy_loss preference_loss listwise_loss group_advantages group_reduce
    conflict_runs top_quantile_mask sequence_sum gae diffusion_pref_loss beta_thompson_topk seeded_normal_combine
    greedy_select gp_unique_posterior lpg_inner_loss reverse_gru_reset)
  sanitizer=$(PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" command -v compute-sanitizer)
  for tool in memcheck racecheck; do
    if [ -z "$sanitizer" ]; then
      skip "$tool" "no compute-sanitizer on this machine"
      continue
    fi
    # torch's caching allocator would hide reads past the end of a tensor. Only the kernels of this project are looked at.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$tool" "$sanitizer" --tool "$tool" --kernel-name kns=prefkern --report-api-errors no \
      --error-exitcode 99 "$python" -c 'import sys; from prefkern.cli import main; sys.exit(main())' check --device cuda "${sanitized[@]}"
  done
fi

WORK=$work OUT=$out RUN_BY=$python "$python" - <<'PY'
import json, os, re, subprocess, sys, time
from pathlib import Path
from xml.etree import ElementTree

import torch

work = Path(os.environ["WORK"])
PLACES = ((str(work), "$WORK"), (os.environ["RUN_BY"], "python"), (os.getcwd(), "."), (sys.prefix, "$PREFIX"))


def portable(text):
    """Without the paths of this machine: results are committed."""
    for path, name in PLACES:
        text = text.replace(path, name)
    return re.sub(r"\S*/compute-sanitizer", "compute-sanitizer", text)


def text_of(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def json_of(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def test_counts(path):
    try:
        suite = ElementTree.parse(path).getroot().find("testsuite")
    except (OSError, ElementTree.ParseError):
        return None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    counts["failed"] = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return counts


steps = {}
for path in sorted(work.glob("*.step"), key=lambda p: p.stat().st_mtime):
    status, seconds, command = path.read_text().split("\n")[:3]
    step = {"status": status, "seconds": int(seconds), "command": portable(command)}
    if status == "skipped":
        step = {"status": "skipped", "why": command}
    else:
        step["status"] = {"0": "passed", "124": "timed out", "137": "timed out"}.get(status, f"failed ({status})")
    if path.stem == "tests":
        step["tests"] = test_counts(work / "tests.xml")
        if step["status"] == "passed" and not (step["tests"] or {}).get("passed"):
            step["status"] = "failed (no test ran)"
    if step["status"] not in ("passed", "skipped"):
        step["log"] = portable((work / f"{path.stem}.log").read_text(errors="replace")[-6000:])
    if (result := json_of(work / f"{path.stem}.json")) is not None:
        step["result"] = result
    steps[path.stem] = step

try:
    import prefkern

    build = prefkern.build_info() | {"capabilities": prefkern.capabilities()}
except Exception as error:  # recorded like every other failure
    build = {"error": f"{type(error).__name__}: {error}"}
properties = torch.cuda.get_device_properties(0)
commit = text_of("git", "rev-parse", "HEAD")
if commit and text_of("git", "status", "--porcelain", "--untracked-files=no"):
    commit += "-dirty"
document = {
    "time": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
    "device": properties.name,
    "compute_capability": f"{properties.major}.{properties.minor}",
    "multiprocessors": properties.multi_processor_count,
    "memory_bytes": properties.total_memory,
    "driver": text_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
    "torch": torch.__version__,
    "torch_cuda": torch.version.cuda,
    "prefkern": build,
    "commit": commit,
    "steps": steps,
}
slug = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
name = f"{slug}-{time.strftime('%Y%m%d-%H%M', time.gmtime())}-{(commit or 'unknown')[:7]}.json"
out = Path(os.environ["OUT"] or f"benchmarks/results/{name}")
out.parent.mkdir(parents=True, exist_ok=True)
out.write_text(json.dumps(document, indent=1) + "\n")
# The suites once more by themselves, where benchmarks/tables.py looks for them.
for suite in (name.removeprefix("suite_") for name in list(steps) if name.startswith("suite_")):
    if "result" in steps[f"suite_{suite}"]:
        alone = out.parent / f"gpu-{slug.removeprefix('nvidia-')}-{suite}.json"
        alone.write_text(json.dumps(steps[f"suite_{suite}"].pop("result"), indent=1) + "\n")
out.write_text(json.dumps(document, indent=1) + "\n")
print(f"\n{properties.name}, torch {torch.__version__}, driver {document['driver']}, commit {commit}")
for step, outcome in steps.items():
    print(f"  {step:17} {outcome['status']:22} {outcome.get('seconds', 0):5} s")
print(f"written: {out}")
sys.exit(any(step["status"] not in ("passed", "skipped") for step in steps.values()))
PY
