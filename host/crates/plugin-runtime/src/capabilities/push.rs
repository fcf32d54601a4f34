//! `push`: devices that are to be woken, whether or not a command waits.

use wasmdm_protocol::enrollment::EnrollmentId;

use crate::bindings::wasmdm::plugin::push::Host;
use crate::call::State;
use crate::capabilities::{Denied, failure, invalid, not_granted, quota};

/// Enrollments that one call may wake.
const MAX_PUSHES: usize = 100;

impl State {
    async fn wake(&mut self, targets: Vec<String>) -> Result<(), Denied> {
        self.may_write("waking devices")?;
        if !self.settings.capabilities.push {
            return Err(not_granted("push"));
        }
        if targets.is_empty() {
            return Err(invalid("targets: nobody"));
        }
        // Before any of them is looked up: a list can be as long as the guest's memory.
        if targets.len() > MAX_PUSHES {
            return Err(quota(format!("a call can wake {MAX_PUSHES} enrollments")));
        }
        let mut known = Vec::with_capacity(targets.len());
        for target in targets {
            let id = EnrollmentId::new(target);
            if self.enrollment_of_tenant(&id).await?.is_none() {
                return Err(failure("not-found", format!("there is no enrollment {id}")));
            }
            known.push(id);
        }
        let new = known.iter().filter(|id| !self.buffer.pushes.contains(id)).count();
        if self.buffer.pushes.len() + new > MAX_PUSHES {
            return Err(quota(format!("a call can wake {MAX_PUSHES} enrollments")));
        }
        self.buffer.pushes.extend(known);
        Ok(())
    }
}

impl Host for State {
    async fn notify(&mut self, targets: Vec<String>) -> wasmtime::Result<Result<(), Denied>> {
        self.enter()?;
        Ok(self.wake(targets).await)
    }
}
