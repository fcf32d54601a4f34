//! `timers`: one-shot timers, which arrive at `schedule`.

use wasmdm_protocol::enrollment::EnrollmentId;
use wasmdm_storage::effects::TimerChange;

use crate::bindings::wasmdm::plugin::timers::Host;
use crate::call::State;
use crate::capabilities::buffer::MAX_KEY;
use crate::capabilities::{Denied, failure, invalid, not_granted, quota, unavailable};
use crate::contract;

const MAX_DATA: usize = 64 << 10;

impl State {
    fn timers_granted(&self) -> Result<(), Denied> {
        self.may_write("setting timers")?;
        if !self.settings.capabilities.timers {
            return Err(not_granted("timers"));
        }
        Ok(())
    }

    async fn set_timer(&mut self, name: String, at: u64, who: Option<String>, data: Vec<u8>) -> Result<(), Denied> {
        self.timers_granted()?;
        if !self.shared.has_schedule {
            return Err(invalid("this plugin exports no `schedule`, where a timer would arrive"));
        }
        check_name(&name)?;
        if data.len() > MAX_DATA {
            return Err(quota(format!("a timer's data can have {MAX_DATA} bytes")));
        }
        let who = who.map(EnrollmentId::new);
        if let Some(id) = &who
            && self.enrollment_of_tenant(id).await?.is_none()
        {
            return Err(failure("not-found", format!("there is no enrollment {id}")));
        }
        let limit = self.settings.limits.timers;
        if self.buffer.timers.len() >= limit {
            return Err(quota(format!("a call can set or cancel {limit} timers")));
        }
        self.forget_set(&name, who.as_ref());
        self.buffer.timers.push(TimerChange::Set { name, who, at: contract::timestamp_in(at), data: data.into() });
        Ok(())
    }

    async fn cancel_timer(&mut self, name: String, who: Option<String>) -> Result<bool, Denied> {
        self.timers_granted()?;
        check_name(&name)?;
        let limit = self.settings.limits.timers;
        if self.buffer.timers.len() >= limit {
            return Err(quota(format!("a call can set or cancel {limit} timers")));
        }
        let who = who.map(EnrollmentId::new);
        let cancelled = self.buffer.timers.iter().any(|change| match change {
            TimerChange::Cancel { name: of, who: whose, .. } => *of == name && *whose == who,
            TimerChange::Set { .. } => false,
        });
        let was_set = self.forget_set(&name, who.as_ref());
        if cancelled {
            return Ok(was_set);
        }
        let stored = self.storage()?.timer(&self.tenant, self.name_space(), &name, who.as_ref()).await.map_err(|error| unavailable(&error))?;
        let existed = stored.is_some();
        // Also where there is none: a tick that has fired and waits is withdrawn with it.
        self.buffer.timers.push(TimerChange::Cancel { name, who, existed });
        Ok(existed || was_set)
    }

    /// Takes back what this call set. Whether there was something.
    fn forget_set(&mut self, name: &str, who: Option<&EnrollmentId>) -> bool {
        let before = self.buffer.timers.len();
        self.buffer.timers.retain(|change| !matches!(change, TimerChange::Set { name: of, who: whose, .. } if of == name && whose.as_ref() == who));
        self.buffer.timers.len() < before
    }
}

fn check_name(name: &str) -> Result<(), Denied> {
    if name.is_empty() || name.len() > MAX_KEY { Err(invalid(format!("a timer's name has 1 to {MAX_KEY} bytes"))) } else { Ok(()) }
}

impl Host for State {
    async fn set(&mut self, name: String, at: u64, who: Option<String>, data: Vec<u8>) -> wasmtime::Result<Result<(), Denied>> {
        self.enter()?;
        Ok(self.set_timer(name, at, who, data).await)
    }

    async fn cancel(&mut self, name: String, who: Option<String>) -> wasmtime::Result<Result<bool, Denied>> {
        self.enter()?;
        Ok(self.cancel_timer(name, who).await)
    }
}
