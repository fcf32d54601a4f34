//! The plugins that are asked: an immutable snapshot. A request takes one and keeps it, so it never sees two generations.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arc_swap::ArcSwap;
use wasmdm_protocol::enrollment::TenantId;

use crate::effective::OnFailure;
use crate::hook::{Hook, Owned};
use crate::plugin::LinkedPlugin;

/// A snapshot, in the order in which plugins are asked.
#[derive(Debug, Default)]
pub struct Registry {
    plugins: BTreeMap<(i32, String), Entry>,
}

/// A plugin that is asked, or one that should be.
#[derive(Debug, Clone)]
pub enum Entry {
    Active(Arc<LinkedPlugin>),
    /// Required, but not active: its hooks answer by their failure policies.
    Missing(Missing),
}

/// A plugin that must be there and is not.
#[derive(Debug, Clone)]
pub struct Missing {
    /// With its scope, like [`crate::plugin::PluginIdentity::name`].
    pub name: String,
    pub order: i32,
    /// The decision hooks that it would answer, and what its absence means for each.
    pub hooks: BTreeMap<Hook, OnFailure>,
    /// The service types that its `token-source` would answer; `None`: not known, so that it may be any.
    pub token_services: Option<BTreeSet<String>>,
    /// `None`: all tenants.
    pub tenants: Option<BTreeSet<TenantId>>,
    /// For log, audit and readiness.
    pub reason: String,
}

impl Missing {
    /// What its absence means for a request of the tenant; `None`: nothing.
    pub fn on_failure(&self, tenant: &TenantId, hook: Hook) -> Option<OnFailure> {
        if self.tenants.as_ref().is_some_and(|tenants| !tenants.contains(tenant)) {
            return None;
        }
        self.hooks.get(&hook).copied()
    }

    /// Whether it would have this for the tenant.
    pub fn owns(&self, tenant: &TenantId, owned: &Owned) -> bool {
        let serves = self.on_failure(tenant, owned.hook()).is_some();
        match owned {
            Owned::UserAuthentication | Owned::ReturnToService => serves,
            Owned::Token(service) => serves && self.token_services.as_ref().is_none_or(|services| services.contains(service)),
        }
    }
}

impl Entry {
    /// The plugin's name with its scope.
    pub fn name(&self) -> &str {
        match self {
            Self::Active(plugin) => &plugin.identity().name,
            Self::Missing(missing) => &missing.name,
        }
    }

    /// Whether it has this for the tenant, or should have it.
    pub fn owns(&self, tenant: &TenantId, owned: &Owned) -> bool {
        match self {
            Self::Active(plugin) => plugin.owns(tenant, owned),
            Self::Missing(missing) => missing.owns(tenant, owned),
        }
    }

    /// Lower is asked first.
    pub fn order(&self) -> i32 {
        match self {
            Self::Active(plugin) => plugin.effective().order,
            Self::Missing(missing) => missing.order,
        }
    }
}

impl Registry {
    /// A snapshot of these plugins. Of two entries of one name the later one counts.
    pub fn new(entries: impl IntoIterator<Item = Entry>) -> Self {
        let mut by_name = BTreeMap::new();
        for entry in entries {
            by_name.insert(entry.name().to_owned(), entry);
        }
        Self { plugins: by_name.into_iter().map(|(name, entry)| ((entry.order(), name), entry)).collect() }
    }

    /// All, by order and name.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.plugins.values()
    }

    /// Who has this for the tenant. A plugin that is there comes before one that is not: loading sees to it that no two are.
    pub fn owner(&self, tenant: &TenantId, owned: &Owned) -> Option<&Entry> {
        let owns = |entry: &&Entry| entry.owns(tenant, owned);
        self.entries().filter(owns).find(|entry| matches!(entry, Entry::Active(_))).or_else(|| self.entries().find(owns))
    }

    /// The active plugin of that name with its scope.
    pub fn active(&self, name: &str) -> Option<&Arc<LinkedPlugin>> {
        self.entries().find_map(|entry| match entry {
            Entry::Active(plugin) if plugin.identity().name == name => Some(plugin),
            _ => None,
        })
    }

    /// Required plugins that are not active, with the reason.
    pub fn missing(&self) -> impl Iterator<Item = &Missing> {
        self.entries().filter_map(|entry| match entry {
            Entry::Missing(missing) => Some(missing),
            Entry::Active(_) => None,
        })
    }
}

/// The snapshot of the moment, shared by all who ask plugins and whoever loads them.
#[derive(Debug, Clone, Default)]
pub struct CurrentRegistry {
    current: Arc<ArcSwap<Registry>>,
}

impl CurrentRegistry {
    /// Begins with that snapshot.
    pub fn new(registry: Registry) -> Self {
        Self { current: Arc::new(ArcSwap::from_pointee(registry)) }
    }

    /// The snapshot to use for the whole of one request.
    pub fn snapshot(&self) -> Arc<Registry> {
        self.current.load_full()
    }

    /// Makes another snapshot the current one, at once for everyone. Requests under way keep theirs.
    pub fn swap(&self, registry: Registry) {
        self.current.store(Arc::new(registry));
    }
}
