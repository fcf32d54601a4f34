//! Push certificates that end soon.
//!
//! A certificate that ends silently takes all of its devices out of reach, so its end is told ahead, several times, and each time once: what
//! was told stands in the certificate's row, survives a restart, and is forgotten when a renewed certificate takes the place.

use crate::events::{Cause, Happened, emit};
use crate::sql::{Columns, args};
use crate::writer::{Class, Outcome};
use crate::{Storage, StorageError, tenant};
use serde_json::json;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_protocol::time::Timestamp;

/// How many days before its end a certificate is told of, in the order in which that happens.
pub const TOLD_AT_DAYS: [i64; 6] = [30, 14, 7, 3, 1, 0];

const DAY: i64 = 24 * 60 * 60 * 1000;

/// A certificate that was told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpiringPushCertificate {
    /// Whose it is.
    pub tenant: TenantId,
    /// Its topic.
    pub topic: String,
    /// End of validity.
    pub not_after: Timestamp,
    /// Days until then, a begun one counted; 0 when it is over.
    pub days_left: i64,
}

const SELECT_ENDS: &str = "SELECT topic, not_after FROM push_certificates ORDER BY topic";
const SELECT_ENDING: &str = "SELECT tenant_id, topic, not_after, expiry_told FROM push_certificates WHERE not_after <= ? ORDER BY topic";
const UPDATE_TOLD: &str = "UPDATE push_certificates SET expiry_told = ? WHERE topic = ?";

impl Storage {
    /// When each push certificate of the server ends, by topic: for the metric.
    pub async fn push_certificate_ends(&self) -> Result<Vec<(String, Timestamp)>, StorageError> {
        self.read_all(SELECT_ENDS, args![]).await?.iter().map(|row| Ok((row.text(0)?, row.time(1)?))).collect()
    }

    /// Tells of the certificates that have come nearer to their end than was told before ([`TOLD_AT_DAYS`]), and answers which those are. One
    /// that has passed several of these days is told of once.
    pub async fn tell_expiring_push_certificates(&self, now: Timestamp) -> Result<Vec<ExpiringPushCertificate>, StorageError> {
        let latest = now.as_millis().saturating_add(DAY * TOLD_AT_DAYS.iter().max().copied().unwrap_or_default());
        // A look costs no write.
        let mut news = false;
        for row in self.read_all(SELECT_ENDING, args![latest]).await? {
            news |= next_mark(row.time(2)?, row.opt_int(3)?, now).is_some();
        }
        if !news {
            return Ok(Vec::new());
        }
        self.write(Class::Background, move |tx| {
            Box::pin(async move {
                let mut told = Vec::new();
                for row in tx.all(SELECT_ENDING, args![latest]).await? {
                    let (tenant, topic, not_after) = (tenant(&row, 0)?, row.text(1)?, row.time(2)?);
                    let Some(mark) = next_mark(not_after, row.opt_int(3)?, now) else {
                        continue;
                    };
                    tx.run(UPDATE_TOLD, args![mark, topic.as_str()]).await?;
                    let days_left = days_left(not_after, now);
                    let cause = Cause::default();
                    let happened =
                        Happened { tenant: &tenant, topic: "push.certificate-expiring", request_type: None, at: now, who: None, cause: &cause };
                    let data = json!({ "certificate": { "topic": topic, "not_after": not_after.to_string(), "days_left": days_left } });
                    emit(tx, happened, || data).await?;
                    told.push(ExpiringPushCertificate { tenant, topic, not_after, days_left });
                }
                Ok(Outcome::Commit(told))
            })
        })
        .await
    }
}

/// Days until the end, a begun one counted; 0 when it is over.
pub fn days_left(not_after: Timestamp, now: Timestamp) -> i64 {
    let left = not_after.as_millis().saturating_sub(now.as_millis());
    if left <= 0 { 0 } else { left.saturating_add(DAY - 1) / DAY }
}

/// The smallest of the days that are passed, if that was not told yet.
fn next_mark(not_after: Timestamp, told: Option<i64>, now: Timestamp) -> Option<i64> {
    let left = days_left(not_after, now);
    let mark = TOLD_AT_DAYS.into_iter().filter(|days| left <= *days).min()?;
    told.is_none_or(|told| mark < told).then_some(mark)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_day_is_passed_once_on_the_way_to_the_end() {
        let end = Timestamp::from_millis(100 * DAY);
        let (mut told, mut marks) = (None, Vec::new());
        for hour in 0..=(101 * 24) {
            let now = Timestamp::from_millis(hour * DAY / 24);
            if let Some(mark) = next_mark(end, told, now) {
                marks.push((mark, now.as_millis() / DAY));
                told = Some(mark);
            }
        }
        assert_eq!(marks, [(30, 70), (14, 86), (7, 93), (3, 97), (1, 99), (0, 100)]);
        // After a long sleep the nearest one only.
        assert_eq!(next_mark(end, Some(30), Timestamp::from_millis(98 * DAY)), Some(3));
        assert_eq!(next_mark(end, Some(3), Timestamp::from_millis(90 * DAY)), None, "a clock that goes back");
    }
}
