#!/usr/bin/env bash
# The scheduled audit: submits tonight's run to the cluster at RAY_ADDRESS, follows it, and ends with its exit code
# (0 intact, 1 tampered, 2 settings, 3 errors or incomplete), which `ray job submit` by itself would make 0 or 1 of.
#
#   FWM_CATALOG, FWM_KEYS, FWM_OUT   URIs, as of jobs.audit
#   FWM_OPTIONS                      further options of jobs.audit, such as --actors 16
#   FWM_NIGHT                        the run is nightly-FWM_NIGHT; default: today's date, UTC
#   FWM_WORKING_DIR                  a folder with this repository to upload; default: the nodes have it (the image does)
#   FWM_PATIENCE                     seconds that the job server may be away; default: 600
#
# Called again, it follows the run that is in work, says again what a complete one found, and resumes one that is not
# complete. Ray refuses a second job of one id, so that a night has one at a time, however often the scheduler calls.
set -euo pipefail
: "${FWM_CATALOG:?}" "${FWM_KEYS:?}" "${FWM_OUT:?}" "${RAY_ADDRESS:?}"
run=nightly-${FWM_NIGHT:-$(date -u +%F)}
options=(--no-wait)
if [[ -n ${FWM_WORKING_DIR:-} ]]; then options+=(--working-dir "$FWM_WORKING_DIR"); fi
read -ra more <<<"${FWM_OPTIONS:-}"
audit=(python -m jobs.audit --catalog "$FWM_CATALOG" --keys "$FWM_KEYS" --out "$FWM_OUT" --run-id "$run" --incremental)

# Of job $1: "none", "running", "complete CODE" where it says that every row has its record, "ended CODE" where it does not,
# "lost" where it ended without a code (stopped, or its node died), or "unreachable".
look() {
  python - "$1" 2>/dev/null <<'PYTHON' || echo unreachable
import contextlib, json, sys
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient()
job = {job.submission_id: job for job in client.list_jobs()}.get(sys.argv[1])
if job is None:
    print("none")
elif not job.status.is_terminal():
    print("running")
elif job.status == "STOPPED" or job.driver_exit_code is None or job.driver_exit_code < 0:
    print("lost")
else:
    complete, log = False, ""
    with contextlib.suppress(RuntimeError):  # gone with its node
        log = client.get_job_logs(job.submission_id)
    for line in log.splitlines():
        with contextlib.suppress(ValueError, AttributeError):
            complete |= json.loads(line).get("complete") is True
    print("complete" if complete else "ended", job.driver_exit_code)
PYTHON
}

# The same, once the job server answers.
known() {
  local state until=$((SECONDS + ${FWM_PATIENCE:-600}))
  while state=$(look "$1"); [[ $state == unreachable ]] && ((SECONDS < until)); do sleep 5; done
  echo "$state"
}

submitted=0
for ((number = 1; ; number++)); do
  job=$run-$number
  state=$(known "$job")
  ours=$state
  if [[ $state == none ]]; then
    if ((submitted++ == 3)); then break; fi
    # Refused, if another has just submitted it, or the server is away: what is there then says which.
    ray job submit --submission-id "$job" "${options[@]}" -- "${audit[@]}" ${more[@]+"${more[@]}"} || true
    state=$(known "$job")
  fi
  if [[ $state == none ]]; then
    echo "the job $job could not be submitted" >&2
    exit 3
  fi
  # Nothing is said again of an earlier job that this call goes on from. A connection that breaks ends `logs`, not the job.
  if [[ $state == running || $state == complete* || $ours == none ]]; then ray job logs --follow "$job" || true; fi
  if [[ $state == running ]]; then ours=running; fi
  while [[ $state == running ]]; do
    sleep 2
    state=$(known "$job")
  done
  case $state in
    "complete "*) exit "${state#* }" ;;
    "ended "*) if [[ $ours == none || $ours == running ]]; then exit "${state#* }"; fi ;;
    unreachable)
      echo "the job server at $RAY_ADDRESS does not answer, or not to this token" >&2
      exit 3
      ;;
  esac
done
echo "the audit $run was lost three times: look at 'ray job logs $job'" >&2
exit 3
