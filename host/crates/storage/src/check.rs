//! What must hold of every database, one line each, and the search for what does not.
//!
//! The transactions of this crate keep these. `db check` runs them after a crash, before an upgrade, or when somebody has been at the
//! file by hand.

use crate::sealing::unopened;
use crate::sql::{Columns, Row, args};
use crate::{Storage, StorageError};

/// Something that must hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Invariant {
    /// Short, stable.
    pub name: &'static str,
    /// What must hold.
    pub sentence: &'static str,
    /// Finds rows for which it does not; the columns say which rows. Empty: every value is opened.
    violations: &'static str,
}

/// A row for which an invariant does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Its name.
    pub invariant: &'static str,
    /// What must hold.
    pub sentence: &'static str,
    /// Which row, by its identifying columns.
    pub what: String,
}

/// Findings of one invariant, at most.
const FINDINGS: usize = 100;

impl Storage {
    /// Looks for rows that break an [invariant](INVARIANTS); at most 100 each. Empty: all is well. Works beside a running server.
    pub async fn check(&self) -> Result<Vec<Finding>, StorageError> {
        let mut reader = self.reader().await?;
        let mut findings = Vec::new();
        for invariant in INVARIANTS {
            let violations = if invariant.violations.is_empty() {
                // Without keys there is nothing to open with, and a plain value needs no opening.
                if self.keyring().is_empty() { Vec::new() } else { unopened(&mut reader.db(), FINDINGS).await? }
            } else {
                let rows = reader.db().all(invariant.violations, args![]).await?;
                rows.iter().filter(|row| !is_ok(row)).take(FINDINGS).map(describe).collect()
            };
            for what in violations {
                findings.push(Finding { invariant: invariant.name, sentence: invariant.sentence, what });
            }
        }
        Ok(findings)
    }
}

/// The database's own checks answer `ok` rather than nothing.
fn is_ok(row: &Row) -> bool {
    row.width() == 1 && row.text(0).is_ok_and(|text| text == "ok")
}

fn describe(row: &Row) -> String {
    let cell = |column| match row.opt_text(column) {
        Ok(text) => text.unwrap_or_else(|| "-".to_owned()),
        Err(_) => row.int(column).map_or_else(|_| "?".to_owned(), |number| number.to_string()),
    };
    (0..row.width()).map(cell).collect::<Vec<_>>().join(" ")
}

macro_rules! known_format {
    ($table:literal, $column:literal, $key:literal) => {
        Invariant {
            name: concat!("format-", $table, "-", $column),
            sentence: concat!("a value in ", $table, ".", $column, " begins with a format byte that this version knows"),
            // What is sealed has 37 bytes more than its value, and a key that the database remembers.
            violations: concat!(
                "SELECT ",
                $key,
                " FROM ",
                $table,
                " WHERE ",
                $column,
                " IS NOT NULL AND (LENGTH(",
                $column,
                ") = 0 OR NOT (SUBSTR(",
                $column,
                ", 1, 1) = x'00' OR (SUBSTR(",
                $column,
                ", 1, 1) = x'01' AND LENGTH(",
                $column,
                ") >= 37 AND LOWER(HEX(SUBSTR(",
                $column,
                ", 2, 8))) IN (SELECT id FROM sealing_keys))))"
            ),
        }
    };
}

/// All of them.
pub const INVARIANTS: &[Invariant] = &[
    Invariant { name: "file", sentence: "the database file is sound in itself", violations: "PRAGMA integrity_check" },
    Invariant {
        name: "references",
        sentence: "every row that refers to another finds it",
        violations: "SELECT \"table\", parent, COUNT(*) FROM pragma_foreign_key_check GROUP BY \"table\", parent",
    },
    Invariant {
        name: "enrollment-state",
        sentence: "an enrollment is enrolling, enrolled or checked-out",
        violations: "SELECT id, state FROM enrollments WHERE state NOT IN ('enrolling', 'enrolled', 'checked-out')",
    },
    Invariant {
        name: "enrollment-kind",
        sentence: "an enrollment is of a known kind, and has a parent exactly if it is a user's",
        violations: "SELECT id, kind, parent_id FROM enrollments \
            WHERE NOT ((kind IN ('device', 'user-enrollment-device') AND parent_id IS NULL) \
            OR (kind IN ('user', 'user-enrollment', 'shared-ipad') AND parent_id IS NOT NULL))",
    },
    Invariant {
        name: "enrolled-push",
        sentence: "an enrolled channel has a push topic, magic and token, and has sent a TokenUpdate since its Authenticate",
        violations: "SELECT id FROM enrollments WHERE state = 'enrolled' AND (push_token IS NULL OR push_magic IS NULL OR topic = '' OR tally < 1)",
    },
    Invariant {
        name: "not-enrolled-push",
        sentence: "a channel that is not enrolled has no push magic and token and no count of TokenUpdates",
        violations: "SELECT id, state FROM enrollments WHERE state <> 'enrolled' AND (push_token IS NOT NULL OR push_magic IS NOT NULL OR tally <> 0)",
    },
    Invariant {
        name: "enrolled-parent",
        sentence: "the device of an enrolled user is enrolled, in the same tenant and topic",
        violations: "SELECT u.id, d.id FROM enrollments u LEFT JOIN enrollments d ON d.id = u.parent_id \
            WHERE u.parent_id IS NOT NULL AND u.state = 'enrolled' \
            AND (d.id IS NULL OR d.state <> 'enrolled' OR d.tenant_id <> u.tenant_id OR d.topic <> u.topic)",
    },
    Invariant {
        name: "binding-enrollment",
        sentence: "a certificate is bound to a known device of the same tenant",
        violations: "SELECT b.sha256, b.enrollment_id FROM certificate_bindings b LEFT JOIN enrollments e ON e.id = b.enrollment_id \
            WHERE e.id IS NULL OR e.tenant_id <> b.tenant_id OR e.parent_id IS NOT NULL",
    },
    Invariant {
        name: "binding-single",
        sentence: "a device has exactly one certificate that was not replaced, beside that of a renewal under way; one that was migrated has none before it comes",
        violations: "SELECT e.id, COUNT(b.sha256) FROM enrollments e \
            LEFT JOIN certificate_bindings b ON b.enrollment_id = e.id AND b.replaced = 0 AND b.pending = 0 \
            WHERE e.parent_id IS NULL GROUP BY e.id HAVING COUNT(b.sha256) <> 1 \
            AND NOT (NOT EXISTS (SELECT 1 FROM certificate_bindings a WHERE a.enrollment_id = e.id) \
            AND e.id IN (SELECT target FROM audit WHERE action = 'enrollment.migrated' AND target IS NOT NULL))",
    },
    Invariant {
        name: "binding-renewal",
        sentence: "a device has at most one certificate of a renewal under way, and that was not replaced",
        violations: "SELECT enrollment_id, COUNT(*) FROM certificate_bindings WHERE pending = 1 GROUP BY enrollment_id \
            HAVING COUNT(*) > 1 OR MAX(replaced) = 1",
    },
    Invariant {
        name: "quarantine-tag",
        sentence: "an enrollment that a plugin quarantines is tagged `quarantined`",
        violations: "SELECT e.id, e.quarantined_by FROM enrollments e \
            LEFT JOIN enrollment_tags t ON t.enrollment_id = e.id AND t.tag = 'quarantined' \
            WHERE e.quarantined_by IS NOT NULL AND t.tag IS NULL",
    },
    Invariant {
        name: "topic-tenant",
        sentence: "a push certificate belongs to the tenant of its topic",
        violations: "SELECT c.topic, c.tenant_id FROM push_certificates c LEFT JOIN push_topics t ON t.topic = c.topic \
            WHERE t.topic IS NULL OR t.tenant_id <> c.tenant_id",
    },
    Invariant {
        name: "queue-command",
        sentence: "a queued command has its body",
        violations: "SELECT q.sequence, q.command_uuid FROM command_queue q \
            LEFT JOIN commands c ON c.tenant_id = q.tenant_id AND c.uuid = q.command_uuid WHERE c.uuid IS NULL",
    },
    Invariant {
        name: "queue-enrollment",
        sentence: "a queued command has its enrollment, of the same tenant",
        violations: "SELECT q.sequence, q.enrollment_id FROM command_queue q \
            LEFT JOIN enrollments e ON e.id = q.enrollment_id AND e.tenant_id = q.tenant_id WHERE e.id IS NULL",
    },
    Invariant {
        name: "queue-state",
        sentence: "a command is in a known state, open exactly until it is finished",
        violations: "SELECT sequence, command_uuid, state, is_open FROM command_queue \
            WHERE NOT ((state IN ('queued', 'reviewing', 'held', 'sent', 'not-now') AND is_open = 1 AND finished_at IS NULL) \
            OR (state IN ('acknowledged', 'errored', 'expired', 'cancelled') AND is_open = 0 AND finished_at IS NOT NULL))",
    },
    Invariant {
        name: "queue-sent",
        sentence: "a command that was sent was delivered at least once",
        violations: "SELECT sequence, command_uuid FROM command_queue WHERE state = 'sent' AND (deliveries < 1 OR sent_at IS NULL)",
    },
    Invariant {
        name: "queue-result",
        sentence: "a command has one final result exactly if it is acknowledged or errored",
        violations: "SELECT q.sequence, q.command_uuid, q.state, r.status FROM command_queue q \
            LEFT JOIN command_results r ON r.enrollment_id = q.enrollment_id AND r.command_uuid = q.command_uuid AND r.is_final = 1 \
            WHERE (q.state IN ('acknowledged', 'errored')) <> (r.status IS NOT NULL)",
    },
    Invariant {
        name: "queue-acknowledged",
        sentence: "a command is acknowledged exactly if its final result says so",
        violations: "SELECT q.sequence, q.command_uuid, q.state, r.status FROM command_queue q \
            JOIN command_results r ON r.enrollment_id = q.enrollment_id AND r.command_uuid = q.command_uuid AND r.is_final = 1 \
            WHERE (q.state = 'acknowledged') <> (r.status = 'Acknowledged')",
    },
    Invariant {
        name: "result-command",
        sentence: "a result belongs to a command of its enrollment",
        violations: "SELECT r.enrollment_id, r.command_uuid FROM command_results r \
            LEFT JOIN command_queue q ON q.enrollment_id = r.enrollment_id AND q.command_uuid = r.command_uuid WHERE q.sequence IS NULL",
    },
    Invariant {
        name: "sequence-order",
        sentence: "the counter of an ordered table is not behind its rows, so that no place is given twice",
        violations: "SELECT 'command_queue', MAX(sequence) FROM command_queue \
            HAVING MAX(sequence) > COALESCE((SELECT MAX(seq) FROM sqlite_sequence WHERE name = 'command_queue'), 0) \
            UNION ALL SELECT 'deliveries', MAX(sequence) FROM deliveries \
            HAVING MAX(sequence) > COALESCE((SELECT MAX(seq) FROM sqlite_sequence WHERE name = 'deliveries'), 0)",
    },
    Invariant {
        name: "delivery-event",
        sentence: "a delivery has its event, of the same tenant",
        violations: "SELECT d.sequence, d.event_id FROM deliveries d \
            LEFT JOIN events e ON e.id = d.event_id AND e.tenant_id = d.tenant_id WHERE e.id IS NULL",
    },
    Invariant {
        name: "delivery-state",
        sentence: "a delivery is waiting, done, dead or withdrawn, open exactly while it waits",
        violations: "SELECT sequence, state, is_open FROM deliveries WHERE NOT ((state = 'waiting' AND is_open = 1 AND finished_at IS NULL) \
            OR (state IN ('done', 'dead', 'withdrawn') AND is_open = 0 AND finished_at IS NOT NULL))",
    },
    Invariant {
        name: "delivery-partition",
        sentence: "a waiting delivery has a partition that is due at some time or leased until some time",
        violations: "SELECT d.sequence, d.subscriber, d.interface, d.partition_key FROM deliveries d \
            LEFT JOIN partitions p ON p.tenant_id = d.tenant_id AND p.subscriber = d.subscriber AND p.interface = d.interface \
            AND p.partition_key = d.partition_key WHERE d.is_open = 1 AND p.ready_at IS NULL",
    },
    Invariant {
        name: "partition-lease",
        sentence: "a leased partition has an end of its lease",
        violations: "SELECT subscriber, interface, partition_key, lease_owner FROM partitions WHERE lease_owner IS NOT NULL AND ready_at IS NULL",
    },
    Invariant {
        name: "mass-push-target",
        sentence: "a target of a mass push that waits has a wake that was asked for",
        violations: "SELECT t.mass_push_id, t.enrollment_id FROM mass_push_targets t \
            LEFT JOIN wakes w ON w.enrollment_id = t.enrollment_id AND w.asked = 1 WHERE t.state = 'waiting' AND w.enrollment_id IS NULL",
    },
    Invariant {
        name: "key-value-size",
        sentence: "a plugin's pair counts as many bytes as its key and value have",
        violations: "SELECT tenant_id, plugin, item_key, size FROM plugin_key_values \
            WHERE size <> OCTET_LENGTH(item_key) + OCTET_LENGTH(item_value) - CASE SUBSTR(item_value, 1, 1) WHEN x'01' THEN 37 ELSE 1 END",
    },
    Invariant {
        name: "key-value-usage",
        sentence: "a plugin's usage is the sum over its pairs",
        violations: "SELECT n.tenant_id, n.plugin, COALESCE(u.bytes, 0), COALESCE(SUM(v.size), 0) \
            FROM (SELECT tenant_id, plugin FROM plugin_key_values UNION SELECT tenant_id, plugin FROM plugin_key_value_usage) n \
            LEFT JOIN plugin_key_values v ON v.tenant_id = n.tenant_id AND v.plugin = n.plugin \
            LEFT JOIN plugin_key_value_usage u ON u.tenant_id = n.tenant_id AND u.plugin = n.plugin \
            GROUP BY n.tenant_id, n.plugin, u.bytes, u.pairs \
            HAVING COALESCE(u.bytes, 0) <> COALESCE(SUM(v.size), 0) OR COALESCE(u.pairs, 0) <> COUNT(v.item_key)",
    },
    Invariant { name: "sealed", sentence: "a sealed value opens with its key, at its own place", violations: "" },
    known_format!("push_certificates", "certificate_pem", "topic"),
    known_format!("push_certificates", "private_key_pem", "topic"),
    known_format!("enrollments", "url_params", "id"),
    known_format!("enrollments", "push_magic", "id"),
    known_format!("enrollments", "push_token", "id"),
    known_format!("enrollment_messages", "raw", "enrollment_id, message_type"),
    known_format!("enrollment_tokens", "token", "enrollment_id, name"),
    known_format!("user_verdicts", "auth_token", "device_id, enrollment_id"),
    known_format!("certificate_bindings", "certificate", "sha256"),
    known_format!("commands", "body", "uuid"),
    known_format!("command_results", "report", "enrollment_id, command_uuid"),
    known_format!("orphan_reports", "report", "sequence"),
    known_format!("plugin_key_values", "item_value", "plugin, item_key"),
    known_format!("events", "who", "id"),
    known_format!("events", "data", "id"),
    known_format!("deliveries", "last_error", "sequence"),
    known_format!("timers", "data", "plugin, name, enrollment_id"),
    known_format!("audit", "detail", "sequence"),
];
