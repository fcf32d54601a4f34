//! A journal of simulated devices against the database: what was answered 200 must be there.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use aws_lc_rs::digest;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_simulator::journal::{EnrollmentState as Seen, FinalResult, Journal, Known, read_journal};
use wasmdm_storage::Storage;
use wasmdm_storage::events::EnrollmentState;

/// What came of it.
#[derive(Debug)]
pub(super) struct Comparison {
    /// One line about what was compared.
    pub(super) summary: String,
    /// One line per confirmed fact that is missing, or that was undone.
    pub(super) missing: Vec<String>,
}

/// Compares every confirmed fact of the journal.
pub(super) async fn compare(path: &Path, storage: &Storage) -> anyhow::Result<Comparison> {
    let journal = read_journal(path).with_context(|| format!("journal: {}", path.display()))?;
    let mut missing = Vec::new();
    enrollments(&journal, storage, &mut missing).await?;
    commands(&journal, storage, &mut missing).await?;
    bootstrap_tokens(&journal, storage, &mut missing).await?;
    for delivery in journal.deliveries_after_confirmed_result() {
        missing.push(format!(
            "line {}: command {} came again to {} after its result had been confirmed",
            delivery.n, delivery.command_uuid, delivery.device
        ));
    }
    let summary = format!(
        "{} lines, {} enrollments, {} commands confirmed as queued, {} results confirmed, {} requests without an answer",
        journal.entries.len(),
        journal.enrollments.len(),
        journal.enqueued.values().map(Vec::len).sum::<usize>(),
        journal.confirmed_results().count(),
        journal.unanswered,
    );
    Ok(Comparison { summary, missing })
}

async fn enrollments(journal: &Journal, storage: &Storage, missing: &mut Vec<String>) -> anyhow::Result<()> {
    for (device, seen) in &journal.enrollments {
        let stored = storage.enrollment(&EnrollmentId::new(device.as_str())).await?.map(|record| match record.state {
            EnrollmentState::Enrolling => Seen::Authenticated,
            EnrollmentState::Enrolled => Seen::Enrolled,
            EnrollmentState::CheckedOut => Seen::CheckedOut,
        });
        let fits = match seen {
            Known::Confirmed(state) => stored == Some(*state),
            Known::Uncertain { before, attempted } => stored == *before || stored.is_some_and(|stored| attempted.contains(&stored)),
        };
        if !fits {
            missing.push(format!("enrollment {device}: the journal says {seen:?}, the database {stored:?}"));
        }
    }
    Ok(())
}

async fn commands(journal: &Journal, storage: &Storage, missing: &mut Vec<String>) -> anyhow::Result<()> {
    let tenant = TenantId::default();
    for (device, uuids) in &journal.enqueued {
        for uuid in uuids {
            if storage.command_status(&tenant, &EnrollmentId::new(device.as_str()), uuid).await?.is_none() {
                missing.push(format!("command {uuid} of {device}: confirmed as queued, and not there"));
            }
        }
    }
    for (device, uuid, result) in journal.confirmed_results() {
        let status = storage.command_status(&tenant, &EnrollmentId::new(device), uuid).await?;
        let Some(status) = status else {
            missing.push(format!("command {uuid} of {device}: its result was confirmed, and the command is not there"));
            continue;
        };
        let kept = status.report.as_ref().map(|report| hex(report));
        if !is_final(&status.state, result) || kept.as_deref() != Some(result.sha256.as_str()) {
            missing.push(format!(
                "command {uuid} of {device}: the result {} was confirmed, the database says {} with report {kept:?}",
                result.status, status.state
            ));
        }
    }
    Ok(())
}

/// A re-enrollment may have cancelled what was queued, but a result stays a result.
fn is_final(state: &str, result: &FinalResult) -> bool {
    match result.status.as_str() {
        "Acknowledged" => state == "acknowledged",
        _ => state == "errored",
    }
}

async fn bootstrap_tokens(journal: &Journal, storage: &Storage, missing: &mut Vec<String>) -> anyhow::Result<()> {
    for (device, seen) in &journal.bootstrap_tokens {
        let stored = storage.bootstrap_token(&TenantId::default(), &EnrollmentId::new(device.as_str())).await?.map(|token| hex(&token));
        let fits = match seen {
            Known::Confirmed(token) => stored == *token,
            Known::Uncertain { before, attempted } => {
                before.as_ref().is_some_and(|before| stored == *before) || attempted.contains(&stored) || (before.is_none() && stored.is_none())
            }
        };
        if !fits {
            // A token's digest is no token, but is still nothing for a screen.
            missing.push(format!("bootstrap token of {device}: another than the confirmed one is stored"));
        }
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    digest::digest(&digest::SHA256, bytes).as_ref().iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
