//! Command reports and Idle polls (edge cases 4, 5, 10, 36–40).

use tracing::{debug, warn};
use wasmdm_protocol::enrollment::Enrollment;
use wasmdm_protocol::report::{MalformedReport, Report, Status};
use wasmdm_storage::commands::{LONGEST_ORPHAN, NextCommand, Offer, Recorded, ReportInput};

use super::Core;
use super::check_out::unknown;
use crate::message::DeviceRequest;
use crate::reply::{Refusal, Reply};

impl Core {
    pub(super) async fn report(&self, request: DeviceRequest, report: Report) -> Result<Reply, Refusal> {
        let id = report.enrollment.id.clone();
        let now = self.clock.now();
        let presence = self.in_flight.enter(&id);
        // A user channel shares its device's certificate, so the binding says nothing of whether it ever came here. A Mac polls for users of
        // whom nothing is known, and there is nothing for them; a report would be of a command that they never got.
        if !report.enrollment.kind.is_device_channel() && self.storage.enrollment(&id).await?.is_none() {
            return if report.status == Status::Idle { Ok(Reply::Empty) } else { Err(unknown(&id)) };
        }
        if let Some(device) = &report.enrollment.parent {
            self.admit_user(&request, device, &id, Some(&report.document)).await?;
        }
        self.storage.touch(&id, now);
        let Some(command_uuid) = report.command_uuid.filter(|_| report.status != Status::Idle) else {
            let offer = Offer { reoffer_sent: presence.alone(), only_renewals: self.is_expired(&request) };
            return Ok(command(self.storage.poll(&request.tenant, &id, offer, now).await?));
        };
        let only_renewals = self.is_expired(&request);
        let kept = if report.raw.len() > LONGEST_ORPHAN { "the beginning of the report is kept" } else { "the report is kept" };
        let (recorded, next) = self
            .storage
            .report(
                ReportInput {
                    tenant: request.tenant,
                    id: id.clone(),
                    status: Some(report.status.clone()),
                    command_uuid: command_uuid.clone(),
                    raw: report.raw,
                    document: Some(report.document),
                    now,
                },
                only_renewals,
            )
            .await?;
        match recorded {
            Recorded::Refused => return Err(unknown(&id)),
            Recorded::Orphan => warn!(
                request.id = request.id,
                enrollment.id = %id,
                command.uuid = command_uuid,
                "Enrollment {id} reported a command that is not open; {kept}"
            ),
            Recorded::Final | Recorded::NotNow | Recorded::Repeated => {
                if let Status::Unknown(status) = &report.status {
                    warn!(request.id = request.id, enrollment.id = %id, "Enrollment {id} reported the unknown status `{}`", status.escape_default());
                }
                debug!(request.id = request.id, enrollment.id = %id, command.uuid = command_uuid, status = report.status.as_str(), "Command reported");
            }
        }
        metrics::counter!("wasmdm_command_reports_total", "status" => status_label(&report.status)).increment(1);
        Ok(command(next))
    }

    /// The queue must go on, or the device would get the same command and fail in the same way for ever. But nothing that the bytes
    /// claim is believed: the enrollment is the certificate's, and the command must be one that it was sent.
    pub(super) async fn malformed_report(&self, request: DeviceRequest, report: MalformedReport) -> Result<Reply, Refusal> {
        let refused = || Refusal::bad_request(format!("the report is malformed: {}", report.reason));
        // What it claims to be its status does not matter, nor whether it claims one.
        let (Some(enrollment), Some(command_uuid)) = (&report.enrollment, &report.command_uuid) else {
            return Err(refused());
        };
        self.admit_whose_command(&request, enrollment, command_uuid).await?;
        let now = self.clock.now();
        let _presence = self.in_flight.enter(&enrollment.id);
        let only_renewals = self.is_expired(&request);
        let (recorded, next) = self
            .storage
            .report(
                ReportInput {
                    tenant: request.tenant,
                    id: enrollment.id.clone(),
                    status: None,
                    command_uuid: command_uuid.clone(),
                    raw: report.raw.clone(),
                    document: None,
                    now,
                },
                only_renewals,
            )
            .await?;
        if recorded == Recorded::Refused {
            return Err(refused());
        }
        warn!(
            request.id = request.id,
            enrollment.id = %enrollment.id,
            command.uuid = command_uuid.as_str(),
            "Enrollment {} sent a malformed report; its command is errored: {}",
            enrollment.id,
            report.reason
        );
        Ok(command(next))
    }
}

impl Core {
    /// What the device was last given is what it cannot report on; it would be offered again for ever. After a few tries it is errored, and
    /// the queue goes on. What the device is answered does not depend on it.
    pub(super) async fn oversized_report(&self, request: DeviceRequest, device: Option<Enrollment>) -> Result<Reply, Refusal> {
        let Some(device) = device else {
            return Err(Refusal::bad_request("the report is too large, and of no known enrollment"));
        };
        let now = self.clock.now();
        self.storage.touch(&device.id, now);
        let Some(last) = self.storage.last_sent(&request.tenant, &device.id).await? else {
            return Ok(Reply::Empty);
        };
        let tries = self.oversized.entry(last.clone()).and_upsert_with(|tries| tries.map_or(1, |tries| tries.into_value().saturating_add(1)));
        if tries.into_value() < OVERSIZED_TRIES {
            return Ok(Reply::Empty);
        }
        let (enrollment, command_uuid) = &last;
        if self.storage.end_oversized(&request.tenant, enrollment, command_uuid, now).await? {
            warn!(
                request.id = request.id,
                enrollment.id = %enrollment,
                command.uuid = command_uuid.as_str(),
                "Enrollment {enrollment} sent a report that is too large {OVERSIZED_TRIES} times; its command is errored"
            );
        }
        self.oversized.invalidate(&last);
        Ok(Reply::Empty)
    }
}

/// So often a report may be too large before its command is given up.
const OVERSIZED_TRIES: u32 = 3;

fn command(next: Option<NextCommand>) -> Reply {
    match next {
        Some(next) => Reply::Command { uuid: next.uuid, body: next.body },
        None => Reply::Empty,
    }
}

fn status_label(status: &Status) -> &'static str {
    match status {
        Status::Idle => "Idle",
        Status::Acknowledged => "Acknowledged",
        Status::Error => "Error",
        Status::CommandFormatError => "CommandFormatError",
        Status::NotNow => "NotNow",
        Status::Unknown(_) => "unknown",
    }
}
