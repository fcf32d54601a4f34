//! Wakes devices through Apple's push service.
//!
//! Certificates come from storage, one per topic, and a renewed one is used from the next push on. What Apple says of a device's token is
//! kept, so that a device which is gone is left alone until it tells another token; what Apple says of itself or of the certificate comes
//! with the time after which it may go better.

mod coalescing;

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream, Stream};
use parking_lot::Mutex;
use tokio::time::Instant;
use tracing::warn;
use wasmdm_apns::{Apns, ClientCertificate, Failure, Fault, Notification, Outcome, Retry};
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_service::clock::Clock;
use wasmdm_service::pusher::{Pushed, Pusher};
use wasmdm_storage::push_certificates::PushTarget;
use wasmdm_storage::push_failures::{PushAttempt, PushFailure};
use wasmdm_storage::wakes::NotWoken;
use wasmdm_storage::{Storage, StorageError};

use self::coalescing::Coalescing;

/// Pushes of one call under way at once.
const AT_ONCE: usize = 2_000;
/// A push that was not delivered is tried again at once if Apple's trouble may be over within this time.
const SHORT: Duration = Duration::from_secs(1);
const ATTEMPTS: u32 = 3;
/// Results that are kept together, at most. What comes while some are being written is written next.
const TOGETHER: usize = 100;

/// How long pushes may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PushLimits {
    /// One, from the first attempt to connect to the answer.
    pub push: Duration,
    /// A whole call, with all its attempts; what is not sent or not answered by then failed for now.
    pub call: Duration,
}

impl Default for PushLimits {
    fn default() -> Self {
        Self { push: Duration::from_secs(30), call: Duration::from_secs(45) }
    }
}

/// The pusher of a real server.
#[derive(Debug)]
pub struct ApplePush {
    apns: Apns,
    storage: Storage,
    clock: Arc<dyn Clock>,
    /// Of a whole call.
    limit: Duration,
    /// Read once per version: parsing a key for each push would cost more than the push.
    certificates: Mutex<HashMap<String, ClientCertificate>>,
    coalescing: Coalescing,
}

impl ApplePush {
    /// Certificates and tokens are looked up in `storage`; `limit` is that of a whole call.
    pub fn new(apns: Apns, storage: Storage, clock: Arc<dyn Clock>, limit: Duration) -> Self {
        Self { apns, storage, clock, limit, certificates: Mutex::default(), coalescing: Coalescing::default() }
    }

    /// The certificates of the topics; a sentence for each topic that has none that could be used.
    async fn certificates(
        &self,
        tenant: &TenantId,
        targets: &[PushTarget],
    ) -> Result<HashMap<String, Result<ClientCertificate, PushFailure>>, StorageError> {
        let mut certificates = HashMap::new();
        for target in targets {
            if !certificates.contains_key(&target.topic) {
                certificates.insert(target.topic.clone(), self.certificate(tenant, &target.topic).await?);
            }
        }
        Ok(certificates)
    }

    async fn certificate(&self, tenant: &TenantId, topic: &str) -> Result<Result<ClientCertificate, PushFailure>, StorageError> {
        let failure = |code: &str, detail: String| PushFailure { code: code.to_owned(), detail, fault: "certificate", token_is_dead: false };
        let Some(stored) = self.storage.push_certificate(tenant, topic).await? else {
            let detail = format!("no push certificate for topic \"{topic}\": store one with `wasmdm push-certificate import`");
            return Ok(Err(failure("no-certificate", detail)));
        };
        if stored.not_after < self.clock.now() {
            let detail = format!("the push certificate of topic \"{topic}\" expired at {}: renew it with Apple and store it", stored.not_after);
            return Ok(Err(failure("certificate-expired", detail)));
        }
        if let Some(known) = self.certificates.lock().get(topic).filter(|known| known.version() == stored.version) {
            return Ok(Ok(known.clone()));
        }
        Ok(match ClientCertificate::new(&stored.certificate_pem, &stored.private_key_pem, stored.version) {
            Ok(certificate) => {
                self.certificates.lock().insert(topic.to_owned(), certificate.clone());
                Ok(certificate)
            }
            Err(error) => Err(failure("certificate-unusable", format!("the push certificate of topic \"{topic}\": {error}"))),
        })
    }

    async fn push_one(
        &self,
        target: &PushTarget,
        certificate: &Result<ClientCertificate, PushFailure>,
    ) -> (Result<String, NotWoken>, Option<PushFailure>) {
        if let Some(dead) = &target.dead {
            // Nothing new: Apple has said so before.
            return (Err(NotWoken::new(of_a_dead_token(dead))), None);
        }
        let certificate = match certificate {
            Ok(certificate) => certificate,
            Err(failure) => return (Err(NotWoken::new(failure.detail.clone())), Some(failure.clone())),
        };
        let notification = Notification::new(target.token.clone(), target.push_magic.clone(), uuid::Uuid::new_v4(), self.clock.now());
        let mut outcome = self.apns.push(certificate, &notification).await;
        for _ in 1..ATTEMPTS {
            match outcome.retry() {
                // The same push under the same id; a device that may have been woken is not woken again.
                Some(Retry::After(wait)) if wait <= SHORT && !outcome.may_have_woken() => {
                    tokio::time::sleep(wait).await;
                    outcome = self.apns.push(certificate, &notification).await;
                }
                _ => break,
            }
        }
        metrics::counter!("wasmdm_pushes_total", "outcome" => outcome.code()).increment(1);
        judge(&outcome, target)
    }

    /// What each push needs, at the place of its id. Everything is its own: an id that stands twice is pushed to once.
    async fn prepare(&self, tenant: &TenantId, ids: &[EnrollmentId]) -> Result<Vec<Prepared>, StorageError> {
        let targets = self.storage.push_targets(tenant, ids).await?;
        let certificates = self.certificates(tenant, &targets).await?;
        let mut by_id: HashMap<EnrollmentId, PushTarget> = targets.into_iter().map(|target| (target.id.clone(), target)).collect();
        let prepare = |id| {
            let target = by_id.remove(id)?;
            let certificate = certificates.get(&target.topic)?.clone();
            Some((target, certificate))
        };
        Ok(ids.iter().map(prepare).collect())
    }

    fn push_all<'a>(&'a self, tenant: &'a TenantId, prepared: Vec<Prepared>) -> impl Stream<Item = Vec<Pushed>> + 'a {
        let deadline = Instant::now() + self.limit;
        stream::iter(prepared.into_iter().enumerate())
            .map(move |(place, ready)| self.push_at(place, ready, deadline))
            .buffer_unordered(AT_ONCE)
            .ready_chunks(TOGETHER)
            .then(move |ended| self.keep(tenant, ended))
    }

    /// What became of the push at that place, and what is to be kept of it.
    async fn push_at(&self, place: usize, ready: Prepared, deadline: Instant) -> (Pushed, Option<PushAttempt>) {
        let Some((target, certificate)) = ready else {
            return (Pushed { place, result: Err(NotWoken::new("push data missing for id: it is not enrolled")) }, None);
        };
        // What this push had of the call's time, once its turn had come.
        let remaining = OnceLock::new();
        let push = self.coalescing.push(&target.id, target.told_at, async {
            remaining.get_or_init(|| deadline.saturating_duration_since(Instant::now()));
            self.push_one(&target, &certificate).await
        });
        let (result, failure) = tokio::time::timeout_at(deadline, push).await.unwrap_or_else(|_| match remaining.get() {
            Some(remaining) => {
                // In whole seconds, so that those that fail together are counted together. The device may have been woken.
                let limit = Duration::from_secs(remaining.as_secs() + u64::from(remaining.subsec_nanos() > 0));
                let outcome = Outcome::Failed(Failure::TimedOut { limit, sent: true });
                metrics::counter!("wasmdm_pushes_total", "outcome" => outcome.code()).increment(1);
                judge(&outcome, &target)
            }
            None => {
                let detail = format!("not sent within {:?}", self.limit);
                let failure = PushFailure { code: "not-sent".to_owned(), detail: detail.clone(), fault: "service", token_is_dead: false };
                (Err(NotWoken { reason: detail, retry_after: Some(SHORT) }), Some(failure))
            }
        });
        let is_news = result.is_ok() || failure.is_some();
        let attempt = is_news.then(|| PushAttempt { id: target.id.clone(), told_at: target.told_at, failure });
        (Pushed { place, result }, attempt)
    }

    /// Keeps what is known before it is told.
    async fn keep(&self, tenant: &TenantId, ended: Vec<(Pushed, Option<PushAttempt>)>) -> Vec<Pushed> {
        let (pushed, attempts): (Vec<_>, Vec<_>) = ended.into_iter().unzip();
        let attempts = attempts.into_iter().flatten().collect();
        // The devices are woken all the same; what is not kept now is kept with the next push.
        if let Err(error) = self.storage.record_pushes(tenant, attempts, self.clock.now()).await {
            warn!("It could not be kept what became of pushes: {error}");
        }
        pushed
    }
}

/// Whom to push to, and with what; `None`: it is not enrolled, or stood among the ids before.
type Prepared = Option<(PushTarget, Result<ClientCertificate, PushFailure>)>;

impl Pusher for ApplePush {
    fn push<'a>(&'a self, tenant: &'a TenantId, ids: &'a [EnrollmentId]) -> BoxStream<'a, Vec<Pushed>> {
        let pushing = stream::once(self.prepare(tenant, ids)).flat_map(move |prepared| match prepared {
            Ok(prepared) => self.push_all(tenant, prepared).boxed(),
            Err(error) => {
                let failed = NotWoken { reason: error.to_string(), retry_after: Some(SHORT) };
                let failed = (0..ids.len()).map(|place| Pushed { place, result: Err(failed.clone()) }).collect();
                stream::iter([failed]).boxed()
            }
        });
        Box::pin(pushing)
    }
}

/// Of a token that Apple called so.
fn of_a_dead_token(code: &str) -> String {
    format!("{code}: the device's token is not valid any more; it is pushed to again when it has told a new one")
}

/// What an outcome means for the caller, and what is kept of it.
fn judge(outcome: &Outcome, target: &PushTarget) -> (Result<String, NotWoken>, Option<PushFailure>) {
    if let Outcome::Accepted { apns_id } = outcome {
        return (Ok(apns_id.to_string()), None);
    }
    let token_is_dead = match outcome {
        // A token that the device told after Apple missed it is another one, or the same one back again (edge case 51).
        Outcome::Unregistered { at } => at.is_none_or(|at| at >= target.told_at),
        _ => false,
    };
    let retry_after = match outcome.retry() {
        Some(Retry::After(wait)) => Some(wait),
        // About a token that the device has left behind: the one that it told since may do.
        Some(Retry::WithNewToken) if matches!(outcome, Outcome::Unregistered { .. }) && !token_is_dead => Some(SHORT),
        _ => None,
    };
    let fault = match outcome.fault() {
        Some(Fault::Device) => "device",
        Some(Fault::Certificate) => "certificate",
        Some(Fault::Service) => "service",
        Some(Fault::Server) | None => "server",
    };
    let failure = PushFailure { code: outcome.code().to_owned(), detail: outcome.to_string(), fault, token_is_dead };
    let reason = if token_is_dead { of_a_dead_token(outcome.code()) } else { outcome.reason() };
    (Err(NotWoken { reason, retry_after }), Some(failure))
}
