#!/usr/bin/env bash
# The scheduled audit: submits tonight's run to the cluster at RAY_ADDRESS, follows it, and ends with its exit code
# (0 intact, 1 tampered, 2 settings, 3 errors or incomplete), which `ray job submit` by itself would make 0 or 1 of.
#
#   FWM_CATALOG, FWM_KEYS, FWM_OUT   URIs, as of jobs.audit
#   FWM_OPTIONS                      further options of jobs.audit, such as --actors 16
#   FWM_NIGHT                        the run is nightly-FWM_NIGHT; default: today's date, UTC
#   FWM_WORKING_DIR                  a folder with this repository to upload; default: the nodes have it (the image does)
#
# Called again, it follows the run that is there, or resumes it where it ended without a result: Ray refuses a second job of
# one id, so that a night has one at a time, however often the scheduler calls.
set -euo pipefail
: "${FWM_CATALOG:?}" "${FWM_KEYS:?}" "${FWM_OUT:?}" "${RAY_ADDRESS:?}"
run=nightly-${FWM_NIGHT:-$(date -u +%F)}
options=(--no-wait)
if [[ -n ${FWM_WORKING_DIR:-} ]]; then options+=(--working-dir "$FWM_WORKING_DIR"); fi
read -ra more <<<"${FWM_OPTIONS:-}"
audit=(python -m jobs.audit --catalog "$FWM_CATALOG" --keys "$FWM_KEYS" --out "$FWM_OUT" --run-id "$run" --incremental)

# Of job $1: its exit code; "none" where there is no such job, "lost" where it ended without one, "running" before its end.
ended() {
  python - "$1" <<'PYTHON'
import sys
from ray.job_submission import JobSubmissionClient
jobs = {job.submission_id: job for job in JobSubmissionClient().list_jobs()}
job = jobs.get(sys.argv[1])
if job is None:
    print("none")
elif not job.status.is_terminal():
    print("running")
elif job.status == "STOPPED" or job.driver_exit_code is None or job.driver_exit_code < 0:
    print("lost")
else:
    print(job.driver_exit_code)
PYTHON
}

for try in 1 2 3; do
  job=$run-$try
  state=$(ended "$job")
  if [[ $state == lost ]]; then continue; fi # stopped, or its node died: the next job resumes the run
  if [[ $state == none ]]; then
    ray job submit --submission-id "$job" "${options[@]}" -- "${audit[@]}" ${more[@]+"${more[@]}"} || [[ $(ended "$job") != none ]]
  fi
  ray job logs --follow "$job" || true # a broken connection ends this, not the job
  while state=$(ended "$job"); [[ $state == running ]]; do sleep 2; done
  if [[ $state != lost && $state != none ]]; then exit "$state"; fi
done
echo "the audit $run ended three times without a result: look at 'ray job logs $job'" >&2
exit 3
