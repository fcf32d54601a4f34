//! What the tests share: a push service, a client, and pushes.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;
use wasmdm_apns::{Apns, ApnsOptions, ClientCertificate, Endpoint, Notification, Roots};
use wasmdm_protocol::time::Timestamp;
use wasmdm_simulator::apns::{FakeApns, IssuedPushCertificate};

pub(crate) const TOPIC: &str = "com.apple.mgmt.External.11111111-2222-3333-4444-555555555555";
pub(crate) const NOW: Timestamp = Timestamp::from_millis(1_800_000_000_123);

/// Options for this service, without pauses between attempts.
pub(crate) fn options(fake: &FakeApns) -> ApnsOptions {
    ApnsOptions {
        endpoint: Endpoint::parse(&fake.endpoint()).unwrap(),
        roots: Roots::Pem(fake.root_pem()),
        shortest_backoff: Duration::ZERO,
        longest_backoff: Duration::ZERO,
        ..ApnsOptions::new(Arc::new(|| 0.5))
    }
}

pub(crate) fn client(fake: &FakeApns) -> Apns {
    Apns::new(options(fake)).unwrap()
}

pub(crate) fn certificate(fake: &FakeApns, topic: &str) -> ClientCertificate {
    ready(&fake.authority().issue(topic).unwrap(), 1)
}

pub(crate) fn ready(issued: &IssuedPushCertificate, version: i64) -> ClientCertificate {
    ClientCertificate::new(&issued.certificate_pem, &issued.private_key_pem, version).unwrap()
}

/// The token of the device of this number.
pub(crate) fn token(number: u32) -> Vec<u8> {
    number.to_be_bytes().iter().cycle().take(32).copied().collect()
}

pub(crate) fn notification(number: u32) -> Notification {
    Notification::new(token(number).into(), format!("MAGIC-{number}"), Uuid::from_u128(u128::from(number)), NOW)
}
