//! `enrollments`: who is enrolled in this tenant, tags, and the end of quarantines.

use serde_json::Value;
use wasmdm_protocol::enrollment::EnrollmentId;
use wasmdm_storage::effects::TagChange;
use wasmdm_storage::enrollments::EnrollmentFilter;
use wasmdm_storage::events::EnrollmentRecord;

use crate::bindings::wasmdm::plugin::enrollments::{Host, Page};
use crate::bindings::wasmdm::plugin::types as wit;
use crate::call::State;
use crate::capabilities::{Denied, failure, invalid, not_granted, quota, unavailable};
use crate::contract;

const MAX_PAGE: u32 = 100;
/// Enrollments whose tags one call may change.
const MAX_TAG_CHANGES: usize = 100;

impl State {
    /// An enrollment of this tenant, whatever the grants: the callers check theirs.
    pub(crate) async fn enrollment_of_tenant(&self, id: &EnrollmentId) -> Result<Option<EnrollmentRecord>, Denied> {
        let found = self.storage()?.enrollment(id).await.map_err(|error| unavailable(&error))?;
        // Ids are unique over the whole server: another tenant's is as if it did not exist.
        Ok(found.filter(|record| record.tenant == self.tenant).map(|record| self.with_buffered_tags(record)))
    }

    fn with_buffered_tags(&self, mut record: EnrollmentRecord) -> EnrollmentRecord {
        let changes = self.buffer.tags.iter().filter(|change| change.id == record.id);
        let Some(Value::Array(tags)) = record.facts.get_mut("tags") else { return record };
        for change in changes {
            // In the order of the commit: what is added and removed at once is gone.
            for added in &change.add {
                if !tags.iter().any(|tag| tag == added) {
                    tags.push(Value::String(added.clone()));
                }
            }
            tags.retain(|tag| !change.remove.iter().any(|removed| tag == removed));
        }
        record
    }

    /// As the plugin is told, with why the last push failed if it did. Whoever can be woken costs no look at the database.
    async fn told(&self, mut record: EnrollmentRecord) -> Result<wit::Enrollment, Denied> {
        let storage = self.storage()?;
        if let Some(failing) = storage.failing_push(&self.tenant, &record.id).await.map_err(|error| unavailable(&error))?
            && let Value::Object(facts) = &mut record.facts
        {
            facts.insert(String::from("push_failure"), contract::push_failure(&failing));
        }
        Ok(contract::enrollment(&record))
    }

    async fn all_told(&self, records: impl Iterator<Item = EnrollmentRecord>) -> Result<Vec<wit::Enrollment>, Denied> {
        let mut told = Vec::new();
        for record in records {
            told.push(self.told(record).await?);
        }
        Ok(told)
    }

    fn reads_enrollments(&self) -> Result<(), Denied> {
        if self.settings.capabilities.enrollments.read { Ok(()) } else { Err(not_granted("enrollments `read`")) }
    }

    async fn enrollment(&self, id: String) -> Result<Option<wit::Enrollment>, Denied> {
        self.reads_enrollments()?;
        let Some(found) = self.enrollment_of_tenant(&EnrollmentId::new(id)).await? else { return Ok(None) };
        Ok(Some(self.told(found).await?))
    }

    async fn enrollments_by_serial_number(&self, serial_number: &str) -> Result<Vec<wit::Enrollment>, Denied> {
        self.reads_enrollments()?;
        let storage = self.storage()?;
        let found = storage.enrollments_by_serial_number(&self.tenant, serial_number).await.map_err(|error| unavailable(&error))?;
        let limit = usize::try_from(MAX_PAGE).unwrap_or(1);
        self.all_told(found.into_iter().take(limit).map(|record| self.with_buffered_tags(record))).await
    }

    async fn query_enrollments(&self, filter: &str, cursor: Option<String>, limit: u32) -> Result<Page, Denied> {
        self.reads_enrollments()?;
        let filter = parse_filter(filter)?;
        let limit = limit.clamp(1, MAX_PAGE);
        let storage = self.storage()?;
        let found = storage.query_enrollments(&self.tenant, &filter, cursor.as_deref(), limit).await.map_err(|error| unavailable(&error))?;
        let cursor =
            if u32::try_from(found.len()).is_ok_and(|len| len >= limit) { found.last().map(|last| last.id.as_str().to_owned()) } else { None };
        let found = found
            .into_iter()
            .map(|record| self.with_buffered_tags(record))
            // A tag that this very call took away no longer matches.
            .filter(|record| filter.tag.as_ref().is_none_or(|tag| has_tag(record, tag)));
        Ok(Page { found: self.all_told(found).await?, cursor })
    }

    async fn change_tags(&mut self, id: String, add: Vec<String>, remove: Vec<String>) -> Result<(), Denied> {
        self.may_write("tagging")?;
        if !self.settings.capabilities.enrollments.tag {
            return Err(not_granted("enrollments `tag`"));
        }
        contract::check_tags(&add).and_then(|()| contract::check_tags(&remove)).map_err(invalid)?;
        if self.buffer.tags.len() >= MAX_TAG_CHANGES {
            return Err(quota(format!("a call can change tags {MAX_TAG_CHANGES} times")));
        }
        let id = EnrollmentId::new(id);
        if self.enrollment_of_tenant(&id).await?.is_none() {
            return Err(failure("not-found", format!("there is no enrollment {id}")));
        }
        self.buffer.tags.push(TagChange { id, add, remove });
        Ok(())
    }

    async fn end_quarantine(&mut self, id: String) -> Result<bool, Denied> {
        self.may_write("releasing from quarantine")?;
        if !self.settings.capabilities.enrollments.release {
            return Err(not_granted("enrollments `release`"));
        }
        let id = EnrollmentId::new(id);
        let Some(record) = self.enrollment_of_tenant(&id).await? else {
            return Err(failure("not-found", format!("there is no enrollment {id}")));
        };
        if record.quarantined_by.is_none() || self.buffer.releases.contains(&id) {
            return Ok(false);
        }
        if self.buffer.releases.len() >= MAX_TAG_CHANGES {
            return Err(quota(format!("a call can release {MAX_TAG_CHANGES} enrollments")));
        }
        self.buffer.releases.push(id);
        Ok(true)
    }
}

fn has_tag(record: &EnrollmentRecord, tag: &str) -> bool {
    record.facts.get("tags").and_then(Value::as_array).is_some_and(|tags| tags.iter().any(|found| found == tag))
}

fn parse_filter(filter: &str) -> Result<EnrollmentFilter, Denied> {
    let filter: Value = serde_json::from_str(filter).map_err(|error| invalid(format!("the filter is no JSON: {error}")))?;
    let Value::Object(entries) = filter else { return Err(invalid("the filter is no JSON object")) };
    let mut parsed = EnrollmentFilter::default();
    for (key, value) in entries {
        let Value::String(value) = value else { return Err(invalid(format!("filter.{key} is no string"))) };
        let place = match key.as_str() {
            "kind" => &mut parsed.kind,
            "state" => &mut parsed.state,
            "tag" => &mut parsed.tag,
            "serial_number" => &mut parsed.serial_number,
            "model" => &mut parsed.model,
            // A key that is not understood must not widen what is found.
            _ => return Err(invalid(format!("filter.{key} is unknown"))),
        };
        *place = Some(value);
    }
    Ok(parsed)
}

impl Host for State {
    async fn get(&mut self, id: String) -> wasmtime::Result<Result<Option<wit::Enrollment>, Denied>> {
        self.enter()?;
        Ok(self.enrollment(id).await)
    }

    async fn by_serial_number(&mut self, serial_number: String) -> wasmtime::Result<Result<Vec<wit::Enrollment>, Denied>> {
        self.enter()?;
        Ok(self.enrollments_by_serial_number(&serial_number).await)
    }

    async fn query(&mut self, filter: String, cursor: Option<String>, limit: u32) -> wasmtime::Result<Result<Page, Denied>> {
        self.enter()?;
        Ok(self.query_enrollments(&filter, cursor, limit).await)
    }

    async fn tag(&mut self, id: String, add: Vec<String>, remove: Vec<String>) -> wasmtime::Result<Result<(), Denied>> {
        self.enter()?;
        Ok(self.change_tags(id, add, remove).await)
    }

    async fn release(&mut self, id: String) -> wasmtime::Result<Result<bool, Denied>> {
        self.enter()?;
        Ok(self.end_quarantine(id).await)
    }
}
