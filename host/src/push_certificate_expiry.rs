//! Looks for push certificates that end soon, and tells of them: in the log, and by the event `push.certificate-expiring`.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{error, warn};
use wasmdm_service::clock::Clock;
use wasmdm_storage::Storage;

/// How often it is looked; the days that are told are counted in days.
const LOOK: Duration = Duration::from_hours(1);

/// Looks at once and then every hour, until the server stops.
pub async fn watch(storage: Storage, clock: Arc<dyn Clock>, shutdown: CancellationToken) {
    loop {
        let now = clock.now();
        match storage.tell_expiring_push_certificates(now).await {
            Ok(told) => {
                for certificate in told {
                    let (topic, not_after, days) = (&certificate.topic, certificate.not_after, certificate.days_left);
                    if days == 0 {
                        error!(topic = topic, "The push certificate of topic {topic} expired at {not_after}: renew it, no device of it can be woken");
                    } else {
                        warn!(topic = topic, "The push certificate of topic {topic} ends in {days} days, at {not_after}: renew it");
                    }
                }
            }
            // The next look tells it.
            Err(error) => warn!("Push certificates that end soon could not be looked for: {error}"),
        }
        tokio::select! {
            () = clock.sleep_until(now.plus(LOOK)) => {}
            () = shutdown.cancelled() => return,
        }
    }
}
