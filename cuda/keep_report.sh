#!/bin/sh
# keep_report.sh NVCC ARGUMENTS...: compiles, with what ptxas says of each kernel's registers, stack and spills in
# OBJECT.report, for tests/test_cuda_source.py. Shown only where it is more than that.
for argument; do
  if [ "$previous" = -o ]; then report=$argument.report; fi
  previous=$argument
done
"$@" -Xptxas=-v 2> "$report"
status=$?
if [ $status -ne 0 ] || grep -qiE 'warning|error' "$report"; then cat "$report" >&2; fi
exit $status
