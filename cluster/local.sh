#!/usr/bin/env bash
# The whole of it on one machine: an S3 server, three Ray nodes with token authentication, a model watermarked by a submitted
# job, the scheduled audit of two nights, and what Prometheus would scrape. Needs Python 3.11+ and a package index.
#
#   bash cluster/local.sh         all of it, from an empty machine, and an end
#   bash cluster/local.sh up      the server and the nodes, which go on running; `source local-out/env` leads to them
#   bash cluster/local.sh demo    releases, embedding, two nights, metrics
#   bash cluster/local.sh down    the end of what `up` started
#
# Keys, objects and logs are in local-out, or in the folder that FWM_LOCAL names. Ports are fixed: 1xxxx, see below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${FWM_LOCAL:-$PWD/local-out}
gcs=16390 dashboard=18290 metrics=18291 s3=18333

up() {
  mkdir -p "$out/objects"
  : >"$out/pids"
  # Secrets, each made once and readable by you alone: the company's, and that of this Ray cluster.
  (umask 077; for name in master.key token; do [[ -s $out/$name ]] || openssl rand -hex 32 >"$out/$name"; done)
  # Whoever releases models may do everything; Ray's nodes may do what the policies in cluster/s3 say, and no more.
  python - >"$out/s3.json" <<'PYTHON'
import json, pathlib
policies = {file.stem: file.read_text() for file in pathlib.Path("cluster/s3").glob("*.json")}
def user(name, **rights):
    return {"name": name, "credentials": [{"accessKey": f"{name}key", "secretKey": f"{name}secret"}], **rights}
print(json.dumps({
    "identities": [
        user("local", actions=["Admin", "Read", "Write", "List", "Tagging"]),
        # Drivers are on the head, and write; all nodes of this one cluster embed, too.
        user("head", actions=[], policyNames=["worker", "audit", "embed"]),
        user("node", actions=[], policyNames=["worker", "embed"]),
    ],
    "policies": [{"name": name, "content": content} for name, content in policies.items()],
}))
PYTHON
  cat >"$out/env" <<ENV
export AWS_ENDPOINT_URL=http://127.0.0.1:$s3 AWS_ACCESS_KEY_ID=localkey AWS_SECRET_ACCESS_KEY=localsecret
export AWS_REGION=us-east-1 AWS_DEFAULT_REGION=us-east-1 AWS_EC2_METADATA_DISABLED=true
export RAY_ADDRESS=http://127.0.0.1:$dashboard RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$out/token RAY_USAGE_STATS_ENABLED=0
export FWM_MASTER_KEY_FILE=$out/master.key FWM_LOG_FORMAT=json FWM_WORKING_DIR=$PWD
export FWM_CATALOG=s3://acme/catalog.parquet FWM_KEYS=s3://acme/keys FWM_OUT=s3://acme/audits
export FWM_METRICS=http://127.0.0.1:$metrics/metrics
ENV
  # shellcheck disable=SC1091
  source "$out/env"

  background s3 weed server -dir="$out/objects" -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.port=19334 -volume.port=18382 \
    -filer.port=18889 -master.telemetry=false -master.volumeSizeLimitMB=64 -volume.max=500 -volume.preStopSeconds=0 \
    -s3 -s3.port=$s3 -s3.port.iceberg=0 -s3.port.lance=0 -s3.config="$out/s3.json"

  # Ray's sockets need a short path. Nodes of one host need ports of their own (workers take any), and folders of their own: in a
  # common one, each would unpack the working directory of a job again, under the feet of those that run in it.
  session=$(mktemp -d /tmp/fwm-ray-XXXX)
  echo "$session" >"$out/session"
  # At their end nothing is to be moved elsewhere, which would take 30 s.
  as() { echo env -u RAY_ADDRESS AWS_ACCESS_KEY_ID="$1key" AWS_SECRET_ACCESS_KEY="$1secret" RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0; }
  common=(--block --min-worker-port=0 --max-worker-port=0 --num-cpus=1 --object-store-memory=100000000)
  # shellcheck disable=SC2046  # several words
  background head $(as head) ray start --head "${common[@]}" --port=$gcs --dashboard-port=$dashboard --temp-dir="$session/0" \
    --dashboard-agent-listen-port=18294 --metrics-export-port=$metrics
  until_there "Ray's head" grep --quiet "Ray runtime started" "$out/head.log"
  for node in 1 2; do # one after the other: two that start at once take the same ports
    # shellcheck disable=SC2046
    background "node$node" $(as node) ray start --address=127.0.0.1:$gcs "${common[@]}" --temp-dir="$session/$node" \
      --dashboard-agent-listen-port=$((18294 + node)) --metrics-export-port=$((metrics + node))
    until_there "node $node" grep --quiet "Ray runtime started" "$out/node$node.log"
  done
  until_there "the S3 server" python - <<'PYTHON'
import boto3
from botocore.config import Config
client = boto3.client("s3", config=Config(connect_timeout=1, retries={"total_max_attempts": 1}))
if "acme" not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
    client.create_bucket(Bucket="acme")
client.put_object(Bucket="acme", Key="ready", Body=b"")
PYTHON
  echo "up: three nodes, and S3 at $AWS_ENDPOINT_URL; source $out/env" >&2
}

demo() {
  # shellcheck disable=SC1091
  source "$out/env"
  export FWM_OPTIONS="--actors 2 --allow-factory tests"
  # A released model, small and of random weights (what it knows is not the point here), and where it is in production.
  python - <<'PYTHON'
from safetensors.torch import save
from fwm_audit import storage
from tests import nets
released = save(nets.convnet().state_dict())
storage.replace("s3://acme/release/conv.safetensors", released)
for copy in ("eu", "us", "us-2"):
    storage.replace(f"s3://acme/models/conv/{copy}.safetensors", released)
releases = "model_id,uri,arch\nconv,s3://acme/release/conv.safetensors,factory:tests.nets:convnet\n"
storage.replace("s3://acme/releases.csv", releases.encode())
PYTHON
  ray job submit --working-dir . -- python -m jobs.embed --models s3://acme/releases.csv --keys "$FWM_KEYS" \
    --storage s3://acme/train --pairs 4 --workers 1 --allow-factory tests
  python -m jobs.catalog --models s3://acme/models --keys "$FWM_KEYS" --out "$FWM_CATALOG"
  echo "the first night: every model is audited" >&2
  FWM_NIGHT=1 bash cluster/nightly.sh
  # Somebody changes one weight by its last bit.
  python - <<'PYTHON'
import torch
from safetensors.torch import load, save
from fwm_audit import storage
uri = "s3://acme/models/conv/us.safetensors"
state = load(storage.read(uri))
state["8.bias"].view(torch.int32)[0] ^= 1
storage.replace(uri, save(state))
PYTHON
  echo "the second night: what is unchanged is carried forward, and the one that was changed is found" >&2
  code=0
  FWM_NIGHT=2 bash cluster/nightly.sh || code=$?
  curl --silent "$FWM_METRICS" | grep '^ray_fwm_' | sed -E 's/(Component|NodeAddress|SessionName|Version|otel_scope_[a-z_]+)="[^"]*",?//g'
  [[ $code == 1 ]] || { echo "the second night should have ended with 1 (tampered), not $code" >&2; return 1; }
  echo "local: two nights; in the second, two models carried forward and one found tampered" >&2
}

down() {
  # Of what `up` started, and nothing else.
  tac "$out/pids" | while read -r pid name; do
    if [[ $name == s3 ]]; then kill -9 "$pid" || true; else kill "$pid" || true; fi # a polite end of the server takes 15 s
  done 2>/dev/null
  while read -r pid _; do while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done; done <"$out/pids"
  if [[ -s $out/session ]]; then rm -rf "$(<"$out/session")"; fi
  rm -f "$out/pids" "$out/session"
}

background() {
  local name=$1
  shift
  rm -f "$out/$name.log" # what the last one said is not what is waited for
  nohup "$@" >"$out/$name.log" 2>&1 </dev/null &
  echo "$! $name" >>"$out/pids"
}

until_there() {
  local what=$1 script=
  shift
  if [[ $1 == python ]]; then script=$(cat); fi
  for _ in $(seq 100); do
    if "$@" <<<"$script" >/dev/null 2>&1; then return; fi
    sleep 0.3
  done
  echo "$what did not start: look at the logs in $out" >&2
  down
  exit 1
}

# Unless the programs are there: in a virtual environment that is active, say.
installed() {
  if ! command -v weed >/dev/null || ! command -v ray >/dev/null; then
    source jobs/venv.sh test
    PATH=$PWD/.venv/bin:$PATH
  fi
}

not_twice() {
  # shellcheck disable=SC2046  # several processes
  if [[ -s $out/pids ]] && kill -0 $(cut -d " " -f 1 "$out/pids") 2>/dev/null; then
    echo "it is up already: bash cluster/local.sh down" >&2
    exit 2
  fi
}

case ${1:-all} in
  up)
    installed
    not_twice
    up
    ;;
  demo)
    installed
    demo
    ;;
  down) down ;;
  all)
    installed
    not_twice
    trap down EXIT
    up
    demo
    ;;
  *)
    sed -n '2,11p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
