#!/usr/bin/env bash
# equal_teachers.sh minutes from an archive of Imagenette at 128 px, on a machine without a network,
# with a folder of few files as its result.
# Table:    none (see equal_teachers.sh)
# GPUs:     one
# Cost:     that of equal_teachers.sh minutes; not measured
# Expected: unknown
#
#     bash run_scripts/studies/equal_teachers_gpu.sh imagenette128.tar.gz RESULTS
#
# The archive (any that tar reads) holds train/ and val/, at its top or in one folder. RESULTS gets
# the report, its figures and numbers, and the logs of all runs: at most 8 files, each of at most
# 16 MiB. Started again on the same machine, it goes on where it was stopped; the work lies in
# runs/. The settings of equal_teachers.sh (SEEDS, LOSSES, JOBS ...) are taken from the environment.
source "$(dirname "$0")/../launch.sh"

(( $# >= 2 )) || die "give the archive and the folder for the results."
archive=$1 results=$2
shift 2
[[ -f "$archive" ]] || die "no such archive: $archive"
unpacked=$RUNS/unpacked
version=$(cksum < "$archive")
if [[ "$(cat "$unpacked/complete" 2>/dev/null)" != "$version" ]]; then
    rm -rf "$unpacked"  # of another archive, or unpacked in part
    mkdir -p "$unpacked"
    tar -xf "$archive" -C "$unpacked" || die "$archive cannot be unpacked."
    echo "$version" > "$unpacked/complete"
fi
DATA=$(find "$unpacked" -maxdepth 2 -type d -name train | head -n 1)
[[ -n "$DATA" ]] || die "$archive holds no train/, at its top or in one folder."
export DATA=${DATA%/train}

export OUT=$RUNS/equal_teachers-minutes
attend bash "$ROOT/run_scripts/studies/equal_teachers.sh" minutes "$@"
if [[ "$dry_run" == yes ]]; then exit; fi

mkdir -p "$results"
for file in report.md erf.png curves.png parts/table.csv parts/table-versus.csv; do
    if [[ -e "$OUT/$file" ]]; then cp "$OUT/$file" "$results"; fi
done
(cd "$OUT" && find . -name log.txt -o -name args.yaml -o -name '*.log' -o -name teachers.txt) |
    tar -czf "$results/logs.tar.gz" -C "$OUT" -T -
large=$(find "$results" -type f -size +16M)
[[ -z "$large" ]] || die "larger than 16 MiB: $large"
grep -v '^<!--' "$OUT/parts/table.md"
