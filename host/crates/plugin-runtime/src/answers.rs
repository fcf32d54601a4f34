//! Asks the one plugin that has the answer to a check-in: `user-authentication`, `token-source`, `return-to-service`.
//!
//! What the plugin writes is stored before its answer goes out. If something that it read has changed meanwhile, it is asked again within the
//! same time.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::{Map, Value, json};
use tokio::time::Instant;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_service::asker::Asker;
use wasmdm_service::clock::Clock;
use wasmdm_service::owned_answer::OwnedAnswer;
use wasmdm_service::reply::Refusal;
use wasmdm_service::return_to_service::{Configuration, ReturnToService};
use wasmdm_service::token_source::{ServiceToken, TokenRequest, TokenSource};
use wasmdm_service::user_authentication::{Login, UserAuthentication, UserVerdict};
use wasmdm_storage::audit::AuditRow;
use wasmdm_storage::effects::{Applied, DecisionEffects};
use wasmdm_storage::{Storage, StorageError};

use crate::audit_rates::AuditRates;
use crate::call::{Answer, Called, Outcome, Request};
use crate::hook::{Hook, Owned};
use crate::plugin::LinkedPlugin;
use crate::registry::{CurrentRegistry, Entry, Missing};

/// How often a plugin is asked because what it read has changed before its writes were stored.
const ATTEMPTS: u32 = 3;

/// The plugins as the ones who answer check-ins.
#[derive(Debug)]
pub struct PluginAnswers {
    registry: CurrentRegistry,
    storage: Storage,
    clock: Arc<dyn Clock>,
    audit: AuditRates,
}

impl PluginAnswers {
    /// Asks the plugins of whatever snapshot is current when a request arrives.
    pub fn new(registry: CurrentRegistry, storage: Storage, clock: Arc<dyn Clock>) -> Self {
        Self { registry, storage, clock, audit: AuditRates::default() }
    }

    async fn ask<'a>(&self, asker: &Asker, owned: &Owned, request: impl Fn(Duration) -> Request<'a> + Send) -> Result<OwnedAnswer<Answer>, Refusal> {
        // One snapshot for all attempts: a request never sees two generations.
        let registry = self.registry.snapshot();
        let asking = Asking { answers: self, asker, hook: owned.hook() };
        match registry.owner(&asker.tenant, owned) {
            None => Ok(OwnedAnswer::Nobody),
            Some(Entry::Missing(missing)) => Ok(asking.missed(missing).await),
            Some(Entry::Active(plugin)) => asking.ask(plugin, request).await,
        }
    }
}

/// One question to the plugins.
struct Asking<'a> {
    answers: &'a PluginAnswers,
    asker: &'a Asker,
    hook: Hook,
}

impl Asking<'_> {
    async fn ask<'a>(&self, plugin: &LinkedPlugin, request: impl Fn(Duration) -> Request<'a> + Send) -> Result<OwnedAnswer<Answer>, Refusal> {
        let tenant = &self.asker.tenant;
        let limit = plugin.effective().for_tenant(tenant).map_or(Duration::ZERO, |settings| settings.limits.wall(self.hook));
        let ends = Instant::now() + limit;
        for _ in 0..ATTEMPTS {
            let Called { id, outcome, effects, .. } = Box::pin(plugin.call(tenant, request(ends.saturating_duration_since(Instant::now())))).await;
            let answer = match outcome {
                Outcome::Answered(answer) => answer,
                outcome => return Ok(self.failed(plugin, &id, outcome.label(), &outcome.to_string()).await),
            };
            if let Answer::User(verdict) = &answer {
                metrics::counter!("wasmdm_plugin_decisions_total",
                    "plugin" => plugin.identity().name.clone(), "hook" => self.hook.as_str(), "verdict" => verdict.as_str(), "mode" => "enforce")
                .increment(1);
            }
            let audit = self.audit_of(plugin, &id, &answer);
            let effects: Vec<_> = effects.into_iter().map(|effects| DecisionEffects { effects: *effects, required: true }).collect();
            if effects.is_empty() && audit.is_none() {
                return Ok(OwnedAnswer::Given(answer));
            }
            match self.answers.storage.record_decision(effects, audit.into_iter().collect(), self.answers.clock.now()).await {
                Ok(Applied::Done(())) => return Ok(OwnedAnswer::Given(answer)),
                Ok(Applied::Conflict(_)) => {}
                // It wrote what cannot be stored, for instance more than its quota.
                Err(StorageError::Invalid { problem, .. }) => return Ok(self.failed(plugin, &id, "effects", &problem).await),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.failed(plugin, "", "conflict", "what it read kept changing").await)
    }

    /// A plugin that could not answer. Of what went wrong the device's own log gets the label alone.
    async fn failed(&self, plugin: &LinkedPlugin, call: &str, label: &str, reason: &str) -> OwnedAnswer<Answer> {
        let name = &plugin.identity().name;
        tracing::warn!(call, "Plugin {name} could not answer at {}: {reason}", self.hook);
        let mut detail = self.detail(plugin, call);
        detail.insert("reason".to_owned(), json!(reason));
        self.record_failure(name, detail).await;
        OwnedAnswer::Failed { reason: format!("plugin {name} could not answer ({label})") }
    }

    /// A plugin that must be there and is not.
    async fn missed(&self, missing: &Missing) -> OwnedAnswer<Answer> {
        let name = &missing.name;
        metrics::counter!("wasmdm_plugin_calls_total", "plugin" => name.clone(), "hook" => self.hook.as_str(), "outcome" => "missing").increment(1);
        let mut detail = Map::new();
        detail.insert("plugin".to_owned(), json!(name));
        detail.insert("reason".to_owned(), json!(format!("missing: {}", missing.reason)));
        detail.insert("request_id".to_owned(), json!(self.asker.request_id));
        self.record_failure(name, detail).await;
        OwnedAnswer::Failed { reason: format!("plugin {name} could not answer (missing)") }
    }

    /// The device is refused either way; a lost row is not worth another answer.
    async fn record_failure(&self, plugin: &str, detail: Map<String, Value>) {
        let Some(row) = self.audit_row(plugin, "failure", detail) else { return };
        if let Err(error) = self.answers.storage.record_decision(Vec::new(), vec![row], self.answers.clock.now()).await {
            tracing::warn!(request.id = self.asker.request_id, "A failed answer is missing in the audit: {error}");
        }
    }

    /// The row about a user who is turned away, if the answer is that.
    fn audit_of(&self, plugin: &LinkedPlugin, call: &str, answer: &Answer) -> Option<AuditRow> {
        let Answer::User(verdict @ (UserVerdict::Decline | UserVerdict::Reject)) = answer else { return None };
        self.audit_row(&plugin.identity().name, verdict.as_str(), self.detail(plugin, call))
    }

    fn detail(&self, plugin: &LinkedPlugin, call: &str) -> Map<String, Value> {
        let identity = plugin.identity();
        let mut detail = Map::new();
        detail.insert("plugin".to_owned(), json!(identity.name));
        detail.insert("version".to_owned(), json!(identity.version));
        detail.insert("digest".to_owned(), json!(identity.digest));
        detail.insert("generation".to_owned(), json!(identity.generation));
        detail.insert("request_id".to_owned(), json!(self.asker.request_id));
        if !call.is_empty() {
            detail.insert("call".to_owned(), json!(call));
        }
        detail
    }

    /// `None`: the plugin has caused enough rows about this device.
    fn audit_row(&self, plugin: &str, what: &str, detail: Map<String, Value>) -> Option<AuditRow> {
        let now = self.answers.clock.now();
        if !self.answers.audit.permits(plugin, self.asker.enrollment.device(), now) {
            metrics::counter!("wasmdm_audit_rows_suppressed_total", "plugin" => plugin.to_owned()).increment(1);
            return None;
        }
        Some(AuditRow {
            tenant: self.asker.tenant.clone(),
            actor: format!("plugin:{plugin}"),
            action: format!("{}.{what}", self.hook),
            target: Some(self.asker.enrollment.id.clone()),
            detail: Value::Object(detail),
            at: now,
        })
    }
}

/// The part of an answer that the hook gives. A hook of the contract's types returns nothing else.
fn given<T>(answer: OwnedAnswer<Answer>, part: impl FnOnce(Answer) -> Option<T>) -> OwnedAnswer<T> {
    match answer {
        OwnedAnswer::Nobody => OwnedAnswer::Nobody,
        OwnedAnswer::Failed { reason } => OwnedAnswer::Failed { reason },
        OwnedAnswer::Given(answer) => match part(answer) {
            Some(part) => OwnedAnswer::Given(part),
            None => OwnedAnswer::Failed { reason: "it answered something else".to_owned() },
        },
    }
}

impl TokenSource for PluginAnswers {
    fn token<'a>(&'a self, asked: &'a TokenRequest) -> BoxFuture<'a, Result<OwnedAnswer<Option<ServiceToken>>, Refusal>> {
        Box::pin(async move {
            let owned = Owned::Token(asked.service_type.clone());
            let answer = self.ask(&asked.asker, &owned, |within| Request::Token { asked, within }).await?;
            Ok(given(answer, |answer| if let Answer::Token(token) = answer { Some(token) } else { None }))
        })
    }
}

impl ReturnToService for PluginAnswers {
    fn configuration<'a>(&'a self, asker: &'a Asker) -> BoxFuture<'a, Result<OwnedAnswer<Option<Configuration>>, Refusal>> {
        Box::pin(async move {
            let answer = self.ask(asker, &Owned::ReturnToService, |within| Request::ReturnToService { asker, within }).await?;
            Ok(given(answer, |answer| if let Answer::ReturnToService(configuration) = answer { Some(configuration) } else { None }))
        })
    }
}

impl UserAuthentication for PluginAnswers {
    fn authenticate<'a>(&'a self, login: &'a Login) -> BoxFuture<'a, Result<OwnedAnswer<UserVerdict>, Refusal>> {
        Box::pin(async move {
            let answer = self.ask(&login.asker, &Owned::UserAuthentication, |within| Request::Authenticate { login, within }).await?;
            Ok(given(answer, |answer| if let Answer::User(verdict) = answer { Some(verdict) } else { None }))
        })
    }

    fn is_there(&self, tenant: &TenantId) -> bool {
        self.registry.snapshot().owner(tenant, &Owned::UserAuthentication).is_some()
    }
}
