//! A service that is reached through a proxy.

use std::time::Duration;

use wasmdm_apns::{Apns, ApnsOptions, Failure, Outcome, Proxy};
use wasmdm_simulator::FakeApns;

use crate::relay::ConnectProxy;
use crate::service::{TOPIC, certificate, notification, options};

fn through(proxy: &ConnectProxy, fake: &FakeApns) -> Apns {
    let url = format!("http://jo:the%20password@127.0.0.1:{}", proxy.port());
    Apns::new(ApnsOptions { proxy: Some(Proxy::parse(&url).unwrap()), connect_timeout: Duration::from_secs(2), ..options(fake) }).unwrap()
}

/// NanoMDM honours `HTTPS_PROXY`; a server behind an egress proxy lost every push here.
#[tokio::test]
async fn pushes_go_through_a_proxy_that_knows_the_password() {
    let fake = FakeApns::start().unwrap();
    let proxy = ConnectProxy::start("HTTP/1.1 200 Connection established\r\nVia: 1.1 here\r\n\r\n");
    let apns = through(&proxy, &fake);
    let certificate = certificate(&fake, TOPIC);
    for number in 1..=3 {
        assert!(apns.push(&certificate, &notification(number)).await.is_accepted());
    }
    let port = fake.address().port();
    let head = format!("CONNECT localhost:{port} HTTP/1.1\r\nHost: localhost:{port}\r\nProxy-Authorization: Basic am86dGhlIHBhc3N3b3Jk\r\n\r\n");
    assert_eq!(proxy.heads(), [head], "one connection carries them all");
}

#[tokio::test]
async fn a_proxy_that_leads_nowhere_is_named_without_the_password() {
    let fake = FakeApns::start().unwrap();
    for (answer, told) in [
        ("HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n", "it answers 407 Proxy Authentication Required"),
        ("SSH-2.0-OpenSSH\r\n\r\n", "its answer is no HTTP"),
        ("", "it closed the connection without an answer"),
    ] {
        let proxy = ConnectProxy::start(answer);
        let outcome = through(&proxy, &fake).push(&certificate(&fake, TOPIC), &notification(1)).await;
        let Outcome::Failed(Failure::Unreachable { problem, .. }) = &outcome else { panic!("{outcome:?}") };
        assert_eq!(*problem, format!("the proxy 127.0.0.1:{}: {told}", proxy.port()));
    }
    assert_eq!(fake.counters().connections, 0);
}
