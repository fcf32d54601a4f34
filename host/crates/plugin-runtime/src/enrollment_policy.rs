//! Asks the plugins with the hook `enrollment-policy`, in their order, and makes one verdict of what they say.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use wasmdm_service::clock::Clock;
use wasmdm_service::enrollment_policy::{Candidate, EnrollmentPolicy, PolicyAnswer, Verdict};
use wasmdm_storage::audit::AuditRow;
use wasmdm_storage::effects::DecisionEffects;

use crate::audit_rates::AuditRates;
use crate::call::{Answer, Called, Decision, Outcome, Request};
use crate::call_metrics::{DECISIONS, HookMetrics};
use crate::contract;
use crate::effective::{Mode, OnFailure};
use crate::hook::Hook;
use crate::plugin::LinkedPlugin;
use crate::registry::{CurrentRegistry, Entry, Missing};

/// All plugins of a chain together.
const CHAIN: Duration = Duration::from_secs(1);
const HOOK: Hook = Hook::EnrollmentPolicy;

/// The plugins as the one who decides who may enroll.
#[derive(Debug)]
pub struct PluginEnrollmentPolicy {
    registry: CurrentRegistry,
    clock: Arc<dyn Clock>,
    audit: AuditRates,
}

impl PluginEnrollmentPolicy {
    /// Asks the plugins of whatever snapshot is current when a request arrives.
    pub fn new(registry: CurrentRegistry, clock: Arc<dyn Clock>) -> Self {
        Self { registry, clock, audit: AuditRates::default() }
    }

    async fn ask_all(&self, candidate: &Candidate) -> PolicyAnswer {
        let registry = self.registry.snapshot();
        let ends = tokio::time::Instant::now() + CHAIN;
        let mut chain =
            Chain { policy: self, candidate, decisions: Vec::new(), effects: Vec::new(), audit: Vec::new(), tags: Vec::new(), quarantine: None };
        for entry in registry.entries() {
            let ended = match entry {
                Entry::Active(plugin) if plugin.answers(&candidate.tenant, HOOK) => {
                    let within = ends.saturating_duration_since(tokio::time::Instant::now());
                    let called = Box::pin(plugin.call(&candidate.tenant, Request::Decide { candidate, within })).await;
                    chain.heard(plugin, called)
                }
                Entry::Missing(missing) => chain.missed(missing),
                Entry::Active(_) => None,
            };
            if let Some(verdict) = ended {
                return chain.answer(verdict);
            }
        }
        let verdict = match chain.quarantine.take() {
            Some(by) => Verdict::Quarantine { by, tags: std::mem::take(&mut chain.tags) },
            None => Verdict::Allow { tags: std::mem::take(&mut chain.tags) },
        };
        chain.answer(verdict)
    }
}

impl EnrollmentPolicy for PluginEnrollmentPolicy {
    fn decide<'a>(&'a self, candidate: &'a Candidate) -> BoxFuture<'a, PolicyAnswer> {
        Box::pin(self.ask_all(candidate))
    }
}

/// What the plugins said so far.
struct Chain<'a> {
    policy: &'a PluginEnrollmentPolicy,
    candidate: &'a Candidate,
    decisions: Vec<Value>,
    effects: Vec<DecisionEffects>,
    audit: Vec<AuditRow>,
    tags: Vec<String>,
    quarantine: Option<String>,
}

/// Who said something, for the record.
struct Speaker<'a> {
    name: &'a str,
    version: &'a str,
    digest: &'a str,
    generation: u64,
    monitored: bool,
    call: &'a str,
    /// Of a plugin that is there.
    metrics: Option<&'a HookMetrics>,
}

impl Chain<'_> {
    /// `Some`: nobody else needs to be asked.
    fn heard(&mut self, plugin: &LinkedPlugin, called: Called) -> Option<Verdict> {
        let identity = plugin.identity();
        let mode = plugin.effective().for_tenant(&self.candidate.tenant).map(|settings| settings.mode);
        let monitored = mode == Some(Mode::Monitor);
        let speaker = Speaker {
            name: &identity.name,
            version: &identity.version,
            digest: &identity.digest,
            generation: identity.generation,
            monitored,
            call: &called.id,
            metrics: Some(plugin.metrics(HOOK)),
        };
        let decision = match called.outcome {
            Outcome::Answered(Answer::Decision(decision)) => decision,
            // A hook of this interface returns nothing else.
            Outcome::Answered(_) => Decision::Abstain,
            outcome => {
                tracing::warn!(call = %called.id, "Plugin {} could not decide about an enrollment: {outcome}", identity.name);
                self.record(&speaker, "failure", Some(&outcome.to_string()));
                let on_failure = plugin.effective().on_failure(HOOK);
                return failed(&identity.name, outcome.label(), on_failure, monitored);
            }
        };
        let required = plugin.effective().on_failure(HOOK) == OnFailure::Closed && !monitored;
        self.effects.extend(called.effects.map(|effects| DecisionEffects { effects: *effects, required }));
        let name = identity.name.clone();
        match decision {
            Decision::Abstain => {
                self.record(&speaker, "abstain", None);
                None
            }
            Decision::Allow { tags, reason } => {
                self.record(&speaker, "allow", reason.as_deref());
                if !monitored {
                    self.add_tags(tags);
                }
                None
            }
            Decision::Quarantine { tags, reason } => {
                self.record(&speaker, "quarantine", reason.as_deref());
                if !monitored {
                    self.add_tags(tags);
                    self.quarantine.get_or_insert(name);
                }
                None
            }
            Decision::Deny { reason } => {
                self.record(&speaker, "deny", reason.as_deref());
                (!monitored).then(|| Verdict::Deny { reason: reason.unwrap_or_else(|| format!("refused by {name}")) })
            }
        }
    }

    /// A required plugin that is not there.
    fn missed(&mut self, missing: &Missing) -> Option<Verdict> {
        let on_failure = missing.on_failure(&self.candidate.tenant, HOOK)?;
        let speaker = Speaker { name: &missing.name, version: "", digest: "", generation: 0, monitored: false, call: "", metrics: None };
        self.record(&speaker, "failure", Some(&format!("missing: {}", missing.reason)));
        metrics::counter!("wasmdm_plugin_calls_total", "plugin" => missing.name.clone(), "hook" => HOOK.as_str(), "outcome" => "missing")
            .increment(1);
        failed(&missing.name, "missing", on_failure, false)
    }

    fn add_tags(&mut self, tags: Vec<String>) {
        for tag in tags {
            if !self.tags.contains(&tag) && self.tags.len() < contract::MAX_TAGS {
                self.tags.push(tag);
            }
        }
    }

    fn record(&mut self, speaker: &Speaker<'_>, verdict: &str, reason: Option<&str>) {
        let mut decision = json!({ "plugin": speaker.name });
        if let Value::Object(decision) = &mut decision {
            if !speaker.digest.is_empty() {
                decision.insert(String::from("version"), json!(speaker.version));
                decision.insert(String::from("digest"), json!(speaker.digest));
                decision.insert(String::from("generation"), json!(speaker.generation));
            }
            decision.insert(String::from("verdict"), json!(verdict));
            if let Some(reason) = reason {
                decision.insert(String::from("reason"), json!(reason));
            }
            if speaker.monitored {
                decision.insert(String::from("mode"), json!(Mode::Monitor.as_str()));
            }
        }
        match speaker.metrics.filter(|_| verdict == "allow" && !speaker.monitored) {
            Some(metrics) => metrics.allowed(speaker.name, HOOK),
            None => metrics::counter!(DECISIONS,
                "plugin" => speaker.name.to_owned(), "hook" => HOOK.as_str(), "verdict" => verdict.to_owned(),
                "mode" => if speaker.monitored { "monitor" } else { "enforce" })
            .increment(1),
        }
        if matches!(verdict, "deny" | "quarantine" | "failure") {
            self.audit_row(speaker, verdict, &decision);
        }
        self.decisions.push(decision);
    }

    fn audit_row(&mut self, speaker: &Speaker<'_>, verdict: &str, decision: &Value) {
        let now = self.policy.clock.now();
        let id = &self.candidate.enrollment.id;
        if !self.policy.audit.permits(speaker.name, id, now) {
            metrics::counter!("wasmdm_audit_rows_suppressed_total", "plugin" => speaker.name.to_owned()).increment(1);
            return;
        }
        let mut detail = decision.clone();
        if let Value::Object(detail) = &mut detail {
            detail.insert(String::from("request_id"), json!(self.candidate.request_id));
            if !speaker.call.is_empty() {
                detail.insert(String::from("call"), json!(speaker.call));
            }
            if let Some(serial) = &self.candidate.facts.serial_number {
                detail.insert(String::from("serial_number"), json!(contract::printable(serial, 64)));
            }
        }
        self.audit.push(AuditRow {
            tenant: self.candidate.tenant.clone(),
            actor: format!("plugin:{}", speaker.name),
            action: format!("{HOOK}.{verdict}"),
            target: Some(id.clone()),
            detail,
            at: now,
        });
    }

    fn answer(mut self, verdict: Verdict) -> PolicyAnswer {
        // Who is refused already is not let come again because of what a plugin before the one that denies wrote.
        if matches!(verdict, Verdict::Deny { .. }) {
            self.effects.iter_mut().for_each(|effects| effects.required = false);
        }
        PolicyAnswer { verdict, decisions: Value::Array(self.decisions), effects: self.effects, audit: self.audit }
    }
}

/// What a plugin that could not decide means for the device.
fn failed(name: &str, label: &str, on_failure: OnFailure, monitored: bool) -> Option<Verdict> {
    (on_failure == OnFailure::Closed && !monitored).then(|| Verdict::Unavailable { reason: format!("plugin {name} could not decide ({label})") })
}
