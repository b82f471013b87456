#!/usr/bin/env bash
# All suites on this machine's CPUs, within twenty minutes on two cores: benchmarks/results/cpu-NAME-SUITE.json.
#
#   bash benchmarks/run_cpu.sh NAME [--suites head,losses,small,memory,scaling] [--threads N] [--minutes M] [--out DIR] [--quick]
#
# NAME says which machine, such as epyc-zen3. --threads: one for each CPU by default. --minutes bounds everything together: each
# suite has its share and what earlier ones have left of theirs, begins no case after that, and says which it left out. It uses
# the python3 of the environment (or $PYTHON). Nobody else should be at work; results say whether anybody was.
# Afterwards: python benchmarks/tables.py --cpu NAME
# Exit status: 0 all ran, 1 a suite failed, 2 bad usage.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

python=${PYTHON:-python3}
suites=head,losses,small,memory,scaling
threads=$(nproc)
minutes=20
out=benchmarks/results
quick=
name=
while [ $# -gt 0 ]; do
  case "$1" in
    --suites | --threads | --minutes | --out)
      if [ $# -lt 2 ]; then echo "run_cpu.sh: $1 needs a value" >&2 && exit 2; fi
      case "$1" in
        --suites) suites=$2 ;;
        --threads) threads=$2 ;;
        --minutes) minutes=$2 ;;
        --out) out=$2 ;;
      esac
      shift 2
      ;;
    --quick) quick=--quick && shift ;;
    -*) echo "run_cpu.sh: unknown option $1; accepted: --suites, --threads, --minutes, --out, --quick" >&2 && exit 2 ;;
    *)
      if [ -n "$name" ]; then echo "run_cpu.sh: two names, $name and $1; one is expected" >&2 && exit 2; fi
      name=$1 && shift
      ;;
  esac
done
if [[ ! $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]]; then
  echo "run_cpu.sh: a name of letters, digits, '.', '_', '-' is expected, such as epyc-zen3; got '$name'" >&2
  exit 2
fi
# Shares of the time, and what the case that is running when a share ends may take beyond it.
declare -A share=([head]=36 [losses]=30 [small]=12 [memory]=8 [scaling]=14)
total=0
for suite in ${suites//,/ }; do
  if [ -z "${share[$suite]:-}" ]; then
    echo "run_cpu.sh: unknown suite $suite; accepted: head, losses, small, memory, scaling" >&2
    exit 2
  fi
  total=$((total + share[$suite]))
done

mkdir -p "$out"
reserve=$((minutes * 60 / 10))
available=$((minutes * 60 - reserve)) promised=0 failed=0
export OMP_NUM_THREADS=$threads
for suite in ${suites//,/ }; do
  promised=$((promised + available * share[$suite] / total))
  limit=$((promised - SECONDS))
  file=$out/cpu-$name-$suite.json
  printf '\n======== %s: up to %s s, into %s\n' "$suite" "$limit" "$file"
  "$python" -c 'import sys; from prefkern.cli import main; sys.argv[0] = "prefkern"; sys.exit(main())' bench --suite "$suite" \
    --threads "$threads" --limit "$((limit > 0 ? limit : 0))" ${quick:+"$quick"} --json "$file" || failed=1
done
printf '\n%s s in all\n' "$SECONDS"
exit "$failed"
