//! `/v1/escrowkeyunlock`, against a server that asks for a client's certificate as Apple's does.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{Method, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::aws_lc_rs::default_provider;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use crate::api::{call, call_as, json, text};
use crate::nanomdm::push_certificate;
use crate::process::{Home, ServerProcess};

const TOPIC: &str = "com.apple.mgmt.External.0f0f0f0f-1111-2222-3333-444444444444";
const KEY: &str = "canary-escrow-key";

/// Method and URI, content type, body, and the certificate that the client showed.
type Asked = Arc<Mutex<Vec<(String, String, String, Vec<u8>)>>>;

/// A server at `localhost` that takes that client's certificate only; with the authority that vouches for it. It answers with the status
/// in `guid`.
async fn apple(client_pem: &str) -> (String, String, Asked) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::default();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
    let key = rcgen::KeyPair::generate().unwrap();
    let leaf = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &rcgen::Issuer::new(ca, ca_key)).unwrap();

    let client = CertificateDer::from(pem::parse(client_pem).unwrap().into_contents());
    let mut roots = RootCertStore::empty();
    roots.add(client).unwrap();
    let provider = Arc::new(default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build().unwrap();
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![leaf.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}/deviceservicesworkers/escrowKeyUnlock", listener.local_addr().unwrap().port());
    let asked = Asked::default();
    let seen = Arc::clone(&asked);
    tokio_util::task::TaskTracker::new().spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(stream) = acceptor.accept(stream).await else { continue };
            let certificate = stream.get_ref().1.peer_certificates().unwrap()[0].to_vec();
            let service = service_fn(|request: hyper::Request<Incoming>| {
                let (seen, certificate) = (Arc::clone(&seen), certificate.clone());
                async move {
                    let (head, body) = request.into_parts();
                    let body = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
                    let status = form_urlencoded::parse(body.as_bytes()).find(|(name, _)| name == "guid").unwrap().1.parse().unwrap();
                    let content_type = head.headers["content-type"].to_str().unwrap().to_owned();
                    seen.lock().unwrap().push((format!("{} {}", head.method, head.uri), content_type, body, certificate));
                    let response = Response::builder().status(StatusCode::from_u16(status).unwrap()).header("Content-Type", "text/plain");
                    let response = response.header("X-Apple-Request", "7").header("Connection", "close");
                    Ok::<_, Infallible>(response.body(Full::new(Bytes::from_static(b"Apple's words"))).unwrap())
                }
            });
            // A client that goes away is no failure of the test.
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        }
    });
    (url, ca_pem, asked)
}

async fn unlock(server: &ServerProcess, form: &str) -> wasmdm_simulator::Answer {
    call(server, Method::POST, "/v1/escrowkeyunlock", form.to_owned()).await
}

fn form(guid: &str) -> String {
    format!("serial=S%261&productType=Mac14%2C2&escrowKey={KEY}&orgName=An+Org&guid={guid}&imei=35&topic={TOPIC}")
}

/// NanoMDM loses the headers of the answer.
#[tokio::test(flavor = "multi_thread")]
async fn apple_is_asked_with_the_push_certificate_and_its_answer_is_passed_on_whole() {
    let (certificate, key) = push_certificate(Some(TOPIC), 2040);
    let (url, ca, asked) = apple(&certificate).await;
    let home = Home::without_authority().with(&["--escrow-key-unlock-url", &url]);
    let ca_file = home.directory.path().join("apple.pem");
    std::fs::write(&ca_file, ca).unwrap();
    let home = home.with_variable("SSL_CERT_FILE", &ca_file);
    let server = home.start();
    let unknown = unlock(&server, &form("200")).await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND, "{}", text(&unknown));
    assert_eq!(call(&server, Method::PUT, "/v1/pushcert", format!("{certificate}{key}")).await.status, StatusCode::OK);

    // Its refusals too: they are for the client of the API.
    for status in [200, 401, 500] {
        let answer = unlock(&server, &form(&status.to_string())).await;
        assert_eq!((answer.status.as_u16(), text(&answer).as_str()), (status, "Apple's words"));
        assert_eq!((&answer.headers["x-apple-request"], &answer.headers["content-type"]), (&"7".parse().unwrap(), &"text/plain".parse().unwrap()));
    }
    let asked = asked.lock().unwrap().clone();
    let (request, content_type, body, shown) = &asked[0];
    assert_eq!(request, "POST /deviceservicesworkers/escrowKeyUnlock?productType=Mac14%2C2&serial=S%261&imei=35");
    assert_eq!((content_type.as_str(), body.as_str()), ("application/x-www-form-urlencoded", &*format!("escrowKey={KEY}&guid=200&orgName=An+Org")));
    assert_eq!(shown.as_slice(), pem::parse(&certificate).unwrap().contents());

    let storage = wasmdm_storage::Storage::open_read_only(&format!("sqlite://{}", home.data().join("wasmdm.sqlite").display())).await.unwrap();
    let mut audit = storage.audit(&wasmdm_protocol::enrollment::TenantId::default(), 10).await.unwrap();
    // And that the push certificate was stored.
    audit.retain(|row| row.action != "push-certificate.store");
    storage.close().await.unwrap();
    assert_eq!(audit.len(), 3);
    assert!(audit.iter().all(|row| row.action == "escrow-key.unlock" && row.detail["serial_number"] == "S&1"));
    assert!(!server.log().iter().any(|line| line.contains(KEY)) && !format!("{audit:?}").contains(KEY));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_named_and_an_apple_that_is_away_is_a_502() {
    let nobody = {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        format!("https://localhost:{}/", listener.local_addr().unwrap().port())
    };
    let home = Home::without_authority().with(&["--escrow-key-unlock-url", &nobody]);
    let server = home.start();
    let some = unlock(&server, "serial=x").await;
    assert_eq!(some.status, StatusCode::BAD_REQUEST);
    assert_eq!(json(&some)["error"], "invalid or missing parameters: productType, escrowKey, orgName, guid");
    let no_topic = unlock(&server, "serial=x&productType=p&escrowKey=e&orgName=o&guid=g").await;
    assert_eq!((no_topic.status, text(&no_topic).as_str()), (StatusCode::BAD_REQUEST, "{\n\t\"error\": \"empty topic\"\n}\n"));
    let without_key = call_as(&server, Method::POST, "/v1/escrowkeyunlock", "", "").await;
    assert_eq!(without_key.status, StatusCode::UNAUTHORIZED);
    assert_eq!(call(&server, Method::GET, "/v1/escrowkeyunlock", "").await.status, StatusCode::METHOD_NOT_ALLOWED);
    let (certificate, key) = push_certificate(Some(TOPIC), 2040);
    assert_eq!(call(&server, Method::PUT, "/v1/pushcert", format!("{certificate}{key}")).await.status, StatusCode::OK);
    let away = unlock(&server, &form("200")).await;
    assert_eq!(away.status, StatusCode::BAD_GATEWAY);
    assert!(!text(&away).contains(KEY) && !text(&away).contains("S%261"), "{}", text(&away));
}
