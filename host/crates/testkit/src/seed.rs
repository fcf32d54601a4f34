//! Many rows at once, written by SQL into the database of a server that does not run: fleets and histories that would take hours to live.

use std::path::Path;

use sqlx::{AssertSqlSafe, Connection as _, SqliteConnection};

/// Writes so many enrolled devices, each with its certificate and its last messages. Their certificates are nobody's.
pub async fn enrolled_devices(database: &Path, count: u64) {
    run(
        database,
        &format!(
            "CREATE TEMP TABLE seeded AS WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {count}) \
             SELECT upper(hex(randomblob(16))) AS id, printf('SEEDED%08d', n) AS serial_number, lower(hex(randomblob(32))) AS identity, \
             CAST(strftime('%s', 'now') AS INTEGER) * 1000 AS now FROM numbers; \
             INSERT INTO enrollments (id, tenant_id, kind, topic, state, generation, tally, re_enrolling, serial_number, model, facts, url_params, \
             decisions, push_magic, push_token, authenticated_at, enrolled_at, created_at, updated_at) \
             SELECT id, 'default', 'device', 'com.apple.mgmt.External.seeded', 'enrolled', 1, 1, 0, serial_number, 'Z1BT0009JD/A', \
             '{{\"serial_number\":\"' || serial_number || '\"}}', x'007B7D', '[]', {magic}, {token}, now, now, now, now FROM seeded; \
             INSERT INTO enrollment_messages (tenant_id, enrollment_id, message_type, raw, received_at) \
             SELECT 'default', id, 'Authenticate', {message}, now FROM seeded; \
             INSERT INTO enrollment_messages (tenant_id, enrollment_id, message_type, raw, received_at) \
             SELECT 'default', id, 'TokenUpdate', {message}, now FROM seeded; \
             INSERT INTO enrollment_presence (enrollment_id, tenant_id, last_seen_at) SELECT id, 'default', now FROM seeded; \
             INSERT INTO certificate_bindings (identity, sha256, tenant_id, enrollment_id, certificate, subject, issuer, not_before, not_after, \
             replaced, created_at) SELECT identity, identity, 'default', id, {certificate}, 'CN=' || serial_number, 'CN=seed', 0, 4102444800000, 0, now \
             FROM seeded",
            magic = blob(36),
            token = blob(32),
            message = blob(900),
            certificate = blob(700),
        ),
    )
    .await;
}

/// Gives each enrollment so many finished commands with their results.
pub async fn finished_commands(database: &Path, per_enrollment: u64) {
    run(
        database,
        &format!(
            "CREATE TEMP TABLE seeded AS WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {per_enrollment}) \
             SELECT upper(hex(randomblob(16))) AS uuid, lower(hex(randomblob(32))) AS sha256, \
             CAST(strftime('%s', 'now') AS INTEGER) * 1000 AS now FROM numbers; \
             INSERT INTO commands (tenant_id, uuid, request_type, body, body_sha256, created_at) \
             SELECT 'default', uuid, 'SecurityInfo', {body}, sha256, now FROM seeded; \
             INSERT INTO command_queue (tenant_id, enrollment_id, command_uuid, state, is_open, priority, origin, hops, wants_push, renews_identity, \
             deliveries, not_now_deliveries, not_now_count, created_at, sent_at, updated_at, finished_at) \
             SELECT 'default', e.id, s.uuid, 'acknowledged', 0, 0, 'api:nanomdm', 0, 0, 0, 1, 0, 0, s.now, s.now, s.now, s.now \
             FROM seeded s CROSS JOIN enrollments e; \
             INSERT INTO command_results (tenant_id, enrollment_id, command_uuid, status, is_final, report, received_at) \
             SELECT 'default', e.id, s.uuid, 'Acknowledged', 1, {report}, s.now FROM seeded s CROSS JOIN enrollments e",
            body = blob(300),
            report = blob(600),
        ),
    )
    .await;
}

/// Runs a statement beside the server, as a person with a shell would.
pub async fn meddle(database: &Path, sql: &str) {
    run(database, sql).await;
}

/// A value of a sealed column: the format byte, then something.
fn blob(length: usize) -> String {
    format!("x'00{}'", "41".repeat(length))
}

#[expect(clippy::expect_used, reason = "only tests and benchmarks call this, and one ends here")]
async fn run(database: &Path, sql: &str) {
    let mut connection = SqliteConnection::connect(&format!("sqlite://{}", database.display())).await.expect("the database opens");
    sqlx::raw_sql("BEGIN").execute(&mut connection).await.expect("a transaction begins");
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await.expect("the rows are written");
    sqlx::raw_sql("COMMIT").execute(&mut connection).await.expect("the transaction commits");
    connection.close().await.expect("the database closes");
}
