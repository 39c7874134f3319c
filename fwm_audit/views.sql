-- What people ask of audits, as views for DuckDB. jobs.report shows what these say, and computes nothing beside them.
--
-- They stand on two names, which you make first (OUT is the audits' --out):
--
--   CREATE VIEW records AS SELECT * FROM read_parquet('OUT/audits/**/*.parquet', union_by_name = true);
--   CREATE VIEW run_files AS SELECT * FROM read_json('OUT/runs/*/*.json', maximum_object_size = 1000000000,
--       columns = {kind: 'VARCHAR', run_id: 'VARCHAR', rows: 'BIGINT', started_at: 'VARCHAR'});
--   .read fwm_audit/views.sql
--
-- Read like this, nobody has checked a signature: `python -m jobs.report --audits OUT --verify` does.
-- Runs are numbered by their start. A checkpoint is one URI of one model. Durations are in
-- hours unless their name says otherwise; DuckDB shows times in your time zone.

-- One row for each run. `complete`: it has a manifest. Carried records cost nothing and read nothing.
CREATE OR REPLACE VIEW runs AS
WITH described AS (
    SELECT run_id, max(rows) AS catalog_rows, min(started_at::TIMESTAMPTZ) AS started_at,
           bool_or(kind = 'manifest') AS complete
    FROM run_files GROUP BY run_id
), counted AS (
    SELECT run_id, min(run_started_at) AS first_started_at, count(*) AS records,
           count(*) FILTER (verdict = 'intact') AS intact,
           count(*) FILTER (verdict = 'tampered') AS tampered,
           count(*) FILTER (verdict NOT IN ('intact', 'tampered')) AS error,
           count(carried_from) AS carried,
           coalesce(sum(coalesce(fetch_ms, 0) + coalesce(load_ms, 0) + coalesce(verify_ms, 0))
               FILTER (carried_from IS NULL), 0) / 1000 AS worker_seconds,
           coalesce(sum(size_bytes) FILTER (carried_from IS NULL), 0)::BIGINT AS bytes_read
    FROM records GROUP BY run_id
)
SELECT row_number() OVER (ORDER BY coalesce(first_started_at, started_at), run_id) AS number, run_id,
       coalesce(first_started_at, started_at) AS started_at, coalesce(complete, false) AS complete, catalog_rows,
       coalesce(records, 0) AS records, coalesce(intact, 0) AS intact, coalesce(tampered, 0) AS tampered,
       coalesce(error, 0) AS error, coalesce(carried, 0) AS carried,
       coalesce(worker_seconds, 0) AS worker_seconds, coalesce(bytes_read, 0) AS bytes_read
FROM described FULL JOIN counted USING (run_id);

-- What each run said of each checkpoint: its worst record, where there are several keys or rows. `look` numbers the looks
-- at a checkpoint by their time, not by their runs' start: a run that was cut off and resumed looks later than it began.
CREATE OR REPLACE VIEW looks AS
SELECT *, row_number() OVER (PARTITION BY model_id, uri ORDER BY looked_at, number) AS look FROM (
SELECT runs.number, runs.complete, worst.*, greatest(audited_at, run_started_at) AS looked_at FROM (
    SELECT *, CASE WHEN verdict IN ('intact', 'tampered') THEN verdict ELSE 'error' END AS state
    FROM records
    QUALIFY row_number() OVER (
        PARTITION BY run_id, model_id, uri
        ORDER BY CASE verdict WHEN 'tampered' THEN 0 WHEN 'intact' THEN 2 ELSE 1 END, audited_at DESC, key_id
    ) = 1
) AS worst JOIN runs USING (run_id));

-- Every checkpoint ever seen, as all runs but one leave it. One that the last complete run did not list any more is
-- `not_checked`, whatever was said of it before (that stands in `verdict`), but a tampered one stays so until a look finds
-- something else.
CREATE OR REPLACE MACRO state_without(run_number) AS TABLE
SELECT * EXCLUDE (newest_run) REPLACE (
    CASE WHEN state = 'tampered' OR newest_run >= coalesce(
             (SELECT max(runs.number) FROM runs WHERE runs.complete AND runs.number <> run_number), 0)
         THEN state ELSE 'not_checked' END AS state)
FROM (
    SELECT *, max(number) OVER (PARTITION BY model_id, uri) AS newest_run FROM looks WHERE number <> run_number
    QUALIFY row_number() OVER (PARTITION BY model_id, uri ORDER BY look DESC) = 1
);

-- Every checkpoint, as it stands now.
CREATE OR REPLACE VIEW checkpoints AS SELECT * FROM state_without(0);

-- Latest verdict of each model: the worst of its checkpoints.
CREATE OR REPLACE VIEW models AS
SELECT model_id,
       CASE WHEN tampered > 0 THEN 'tampered' WHEN error > 0 THEN 'error' WHEN not_checked > 0 THEN 'not_checked'
            ELSE 'intact' END AS state,
       * EXCLUDE (model_id)
FROM (
    SELECT model_id, count(*) AS checkpoints, count(*) FILTER (state = 'intact') AS intact,
           count(*) FILTER (state = 'tampered') AS tampered, count(*) FILTER (state = 'error') AS error,
           count(*) FILTER (state = 'not_checked') AS not_checked, min(audited_at) AS oldest_look,
           max(audited_at) AS newest_look
    FROM checkpoints GROUP BY model_id
);

-- One row: the fleet now.
CREATE OR REPLACE VIEW fleet AS
SELECT count(*) AS models, coalesce(sum(checkpoints), 0)::BIGINT AS checkpoints,
       coalesce(sum(intact), 0)::BIGINT AS intact, coalesce(sum(tampered), 0)::BIGINT AS tampered,
       coalesce(sum(error), 0)::BIGINT AS error, coalesce(sum(not_checked), 0)::BIGINT AS not_checked,
       count(*) FILTER (state = 'intact') AS models_intact, count(*) FILTER (state = 'tampered') AS models_tampered,
       count(*) FILTER (state = 'error') AS models_error, count(*) FILTER (state = 'not_checked') AS models_not_checked
FROM models;

-- Each time a checkpoint was found tampered, from the first run that said so to the next intact one. The change was made
-- after `last_intact_at`: `hours_to_detect` is therefore the longest that it can have gone unnoticed.
CREATE OR REPLACE VIEW incidents AS
WITH numbered AS (
    SELECT *, count(*) FILTER (state = 'intact') OVER (PARTITION BY model_id, uri ORDER BY look) AS intact_before
    FROM looks
), found AS (
    SELECT model_id, uri, intact_before, min_by(number, look) AS first_number, min_by(run_id, look) AS first_run,
           min_by(audited_at, look) AS first_tampered_at, max_by(number, look) AS last_number, count(*) AS tampered_looks
    FROM numbered WHERE state = 'tampered' GROUP BY model_id, uri, intact_before
), intact AS (
    SELECT model_id, uri, intact_before, run_id, audited_at FROM numbered WHERE state = 'intact'
)
SELECT found.model_id, found.uri, first_number, first_run, first_tampered_at, tampered_looks, last_number,
       before.run_id AS last_intact_run, before.audited_at AS last_intact_at,
       (epoch(first_tampered_at) - epoch(before.audited_at)) / 3600 AS hours_to_detect,
       after.run_id AS restored_run, after.audited_at AS restored_at,
       (epoch(after.audited_at) - epoch(first_tampered_at)) / 3600 AS hours_to_restore
FROM found
LEFT JOIN intact AS before
    ON before.model_id = found.model_id AND before.uri = found.uri AND before.intact_before = found.intact_before
LEFT JOIN intact AS after
    ON after.model_id = found.model_id AND after.uri = found.uri AND after.intact_before = found.intact_before + 1;

-- First tampered run of each model, and whether that is over.
CREATE OR REPLACE VIEW first_tampered AS
SELECT model_id, min_by(first_run, first_tampered_at) AS first_run, min(first_tampered_at) AS first_tampered_at,
       count(*) AS incidents, count(*) FILTER (restored_run IS NULL) AS open_incidents
FROM incidents GROUP BY model_id;

-- One row: mean time to detect, at most, and to restore. NULL where there is nothing to take a mean of.
CREATE OR REPLACE VIEW detection AS
SELECT count(*) AS incidents, count(*) FILTER (restored_run IS NULL) AS open_incidents,
       avg(hours_to_detect) AS mean_hours_to_detect, max(hours_to_detect) AS longest_hours_to_detect,
       avg(hours_to_restore) AS mean_hours_to_restore
FROM incidents;

-- One row: the run that looked last.
CREATE OR REPLACE VIEW newest AS
SELECT runs.* FROM runs JOIN (SELECT number, max(looked_at) AS last_look FROM looks GROUP BY number) USING (number)
ORDER BY last_look DESC, number DESC LIMIT 1;

-- What that run changed: state, finding, bytes or key of a checkpoint. `before` is NULL on its first look.
CREATE OR REPLACE VIEW changes AS
SELECT now.model_id, now.uri, before.state AS before, now.state AS now,
       CASE WHEN before.state IS NULL THEN 'first look' WHEN before.state <> now.state THEN 'verdict'
            WHEN before.displacement <> now.displacement OR before.error_code IS DISTINCT FROM now.error_code
            THEN 'finding' WHEN before.sha256 <> now.sha256 THEN 'other bytes' ELSE 'other key' END AS change,
       now.displacement, now.error_code, now.number, before.sha256 AS sha256_before, now.sha256
FROM checkpoints AS now
LEFT JOIN state_without((SELECT number FROM newest)) AS before USING (model_id, uri)
WHERE before.state IS DISTINCT FROM now.state OR before.sha256 <> now.sha256 OR before.key_id <> now.key_id
   OR before.displacement <> now.displacement OR before.error_code IS DISTINCT FROM now.error_code;

-- Checkpoints that cannot be judged now, and since when without a break.
CREATE OR REPLACE VIEW failing AS
SELECT now.model_id, now.uri, now.error_code, now.error_message, count(*) AS looks, min(looks.run_started_at) AS since
FROM checkpoints AS now JOIN looks USING (model_id, uri)
WHERE now.state = 'error' AND looks.state = 'error' AND looks.look > coalesce(
    (SELECT max(other.look) FROM looks AS other
     WHERE other.model_id = now.model_id AND other.uri = now.uri AND other.state <> 'error'), 0)
GROUP BY ALL;

-- Time of a worker for each checkpoint, the slowest first.
CREATE OR REPLACE VIEW slowest AS
SELECT model_id, uri, fetch_ms, load_ms, verify_ms, size_bytes,
       coalesce(fetch_ms, 0) + coalesce(load_ms, 0) + coalesce(verify_ms, 0) AS total_ms
FROM checkpoints WHERE total_ms > 0 ORDER BY total_ms DESC, model_id, uri;

-- Cost of each model over all runs, in seconds of a worker: times its price, it is money.
CREATE OR REPLACE VIEW cost AS
SELECT model_id, count(*) FILTER (carried_from IS NULL) AS audits, count(carried_from) AS carried,
       coalesce(sum(coalesce(fetch_ms, 0) + coalesce(load_ms, 0) + coalesce(verify_ms, 0))
           FILTER (carried_from IS NULL), 0) / 1000 AS worker_seconds,
       coalesce(sum(size_bytes) FILTER (carried_from IS NULL), 0)::BIGINT AS bytes_read
FROM records GROUP BY model_id;

-- Keys that the checkpoints stand on now.
CREATE OR REPLACE VIEW keys AS
SELECT model_id, key_id, max_by(key_fingerprint, looked_at) AS key_fingerprint,
       max_by(method, looked_at) AS method, max_by(arithmetic, looked_at) AS arithmetic, count(*) AS checkpoints,
       count(*) FILTER (state = 'intact') AS intact, count(*) FILTER (state = 'tampered') AS tampered
FROM checkpoints WHERE key_fingerprint IS NOT NULL GROUP BY model_id, key_id;
