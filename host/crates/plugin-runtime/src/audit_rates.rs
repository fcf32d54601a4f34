//! How many rows of the audit a plugin may cause.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use wasmdm_protocol::enrollment::EnrollmentId;
use wasmdm_protocol::time::Timestamp;

/// Rows of one plugin in a minute.
const ROWS_PER_PLUGIN: u32 = 100;
/// Rows of one plugin about one enrollment in a minute.
const ROWS_PER_ENROLLMENT: u32 = 10;
const MINUTE: Duration = Duration::from_mins(1);

/// Keeps a device that asks again and again from filling the audit.
#[derive(Debug, Default)]
pub(crate) struct AuditRates {
    plugins: Mutex<HashMap<String, Minute>>,
}

/// Bounded by [`ROWS_PER_PLUGIN`]: who gets no row is not remembered.
#[derive(Debug, Default)]
struct Minute {
    began: Timestamp,
    rows: u32,
    by_enrollment: HashMap<EnrollmentId, u32>,
}

impl AuditRates {
    /// Whether there may be another row.
    pub(crate) fn permits(&self, plugin: &str, id: &EnrollmentId, now: Timestamp) -> bool {
        let mut plugins = self.plugins.lock();
        let minute = plugins.entry(plugin.to_owned()).or_default();
        if now.since(minute.began) >= MINUTE {
            *minute = Minute { began: now, ..Minute::default() };
        }
        if minute.rows >= ROWS_PER_PLUGIN {
            return false;
        }
        let own = minute.by_enrollment.entry(id.clone()).or_default();
        if *own >= ROWS_PER_ENROLLMENT {
            return false;
        }
        *own = own.saturating_add(1);
        minute.rows = minute.rows.saturating_add(1);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn audit_rows_are_limited_by_enrollment_and_by_plugin() {
        let rates = AuditRates::default();
        let now = Timestamp::from_millis(1_000_000);
        let permitted = |plugin: &str, id: &str, now| rates.permits(plugin, &EnrollmentId::new(id), now);
        assert_eq!((0..50).filter(|_| permitted("a", "D", now)).count(), 10);
        assert_eq!((0..500).filter(|n| permitted("a", &format!("D{n}"), now)).count(), 90);
        assert!(permitted("b", "D", now));
        assert!(permitted("a", "D", now.plus(MINUTE)));
    }
}
