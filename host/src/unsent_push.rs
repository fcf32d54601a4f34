//! The pusher of a server that does not push yet: it says so, for each enrollment, and never invents a success.

use std::collections::BTreeMap;

use futures_util::future::BoxFuture;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_service::pusher::{PushError, Pusher};
use wasmdm_storage::Storage;

/// Answers every push with the reason why it was not sent.
#[derive(Debug)]
pub struct UnsentPush {
    storage: Storage,
}

impl UnsentPush {
    /// Reasons are looked up in `storage`.
    pub fn new(storage: Storage) -> Self {
        Self { storage }
    }
}

impl Pusher for UnsentPush {
    fn push<'a>(&'a self, tenant: &'a TenantId, ids: &'a [EnrollmentId]) -> BoxFuture<'a, Vec<Result<String, PushError>>> {
        Box::pin(async move {
            let unavailable = |error: &dyn std::fmt::Display| ids.iter().map(|_| Err(PushError(error.to_string()))).collect();
            let targets = match self.storage.push_targets(tenant, ids).await {
                Ok(targets) => targets,
                Err(error) => return unavailable(&error),
            };
            let mut certificates = BTreeMap::new();
            for target in &targets {
                if !certificates.contains_key(&target.topic) {
                    match self.storage.push_certificate(&target.topic).await {
                        Ok(certificate) => certificates.insert(target.topic.clone(), certificate.is_some()),
                        Err(error) => return unavailable(&error),
                    };
                }
            }
            ids.iter()
                .map(|id| {
                    let topic = targets.iter().find(|target| target.id == *id).map(|target| target.topic.as_str());
                    Err(PushError(match topic {
                        None => "push data missing for id: it is not enrolled".to_owned(),
                        Some(topic) if certificates.get(topic) != Some(&true) => {
                            format!("no push certificate for topic \"{topic}\": store one with PUT /v1/pushcert")
                        }
                        Some(_) => "this version of the server does not send pushes; the device fetches its commands at its next poll".to_owned(),
                    }))
                })
                .collect()
        })
    }
}
