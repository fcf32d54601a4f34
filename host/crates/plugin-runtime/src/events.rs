//! Delivers events of the outbox to plugins: `event-sink`, `event-commands`, and the ticks of `schedule`.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::json;
use wasmdm_service::clock::Clock;
use wasmdm_service::subscriber::{Delivered, Subscriber};
use wasmdm_storage::outbox::{Delivery, Lease};

use crate::call::{Called, Outcome, Request};
use crate::hook::Hook;
use crate::plugin::LinkedPlugin;
use crate::registry::CurrentRegistry;

/// The prefix of plugins' names among subscribers.
pub const PREFIX: &str = "plugin:";

/// A plugin that is not there may come back with the next scan; what loads it wakes its deliveries.
const ABSENT: Duration = Duration::from_secs(30);
const SATURATED: Duration = Duration::from_secs(1);

/// All plugins, as subscribers of the outbox.
#[derive(Debug, Clone)]
pub struct PluginSubscriber {
    registry: CurrentRegistry,
    clock: Arc<dyn Clock>,
}

impl PluginSubscriber {
    /// Delivers to the plugins of whatever snapshot is current when a delivery begins.
    pub fn new(registry: CurrentRegistry, clock: Arc<dyn Clock>) -> Self {
        Self { registry, clock }
    }

    async fn attempt(&self, lease: &Lease, delivery: &Delivery) -> Delivered {
        let name = lease.subscriber.strip_prefix(PREFIX).unwrap_or(&lease.subscriber);
        let registry = self.registry.snapshot();
        let Some(plugin) = registry.active(name) else {
            return Delivered::Postponed { reason: format!("plugin {name} is not active"), retry_after: ABSENT };
        };
        let event = &delivery.event;
        let attempt = delivery.attempt;
        let request = match Hook::from_name(&lease.interface) {
            Some(Hook::EventSink) => Request::Handle { event, attempt },
            Some(Hook::EventCommands) => Request::Generate { event, attempt },
            Some(Hook::Schedule) => Request::Tick { event, attempt },
            _ => {
                return Delivered::Failed {
                    error: format!("`{}` is no interface that gets events", lease.interface),
                    retryable: false,
                    retry_after: None,
                    by: json!({}),
                };
            }
        };
        let called = Box::pin(plugin.call(&lease.tenant, request)).await;
        self.delivered(plugin, called)
    }

    fn delivered(&self, plugin: &LinkedPlugin, called: Called) -> Delivered {
        let identity = plugin.identity();
        let by = json!({ "digest": identity.digest, "generation": identity.generation, "call": called.id });
        let name = &identity.name;
        match called.outcome {
            Outcome::Answered(_) => Delivered::Done { effects: called.effects, by },
            Outcome::Failure(failure) => Delivered::Failed {
                error: format!("{}: {}", failure.code, failure.message),
                retryable: failure.retryable,
                retry_after: failure.retry_after,
                by,
            },
            Outcome::Saturated => Delivered::Postponed { reason: format!("plugin {name} is saturated"), retry_after: SATURATED },
            Outcome::NotServed => {
                Delivered::Postponed { reason: format!("plugin {name} does not answer this hook for this tenant"), retry_after: ABSENT }
            }
            Outcome::Suspended { until } => Delivered::Postponed {
                reason: format!("plugin {name} is suspended because it failed too often"),
                retry_after: until.since(self.clock.now()).max(Duration::from_millis(100)),
            },
            outcome => {
                tracing::warn!(call = %called.id, "Plugin {name} could not handle an event: {outcome}");
                Delivered::Failed { error: outcome.to_string(), retryable: true, retry_after: None, by }
            }
        }
    }
}

impl Subscriber for PluginSubscriber {
    fn deliver<'a>(&'a self, lease: &'a Lease, delivery: &'a Delivery) -> BoxFuture<'a, Delivered> {
        Box::pin(self.attempt(lease, delivery))
    }
}
