//! One connection of a server that pushes.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{Request, Response};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::authority::hexadecimal;
use super::frames::{Ending, Frames};
use super::request::{Client, LARGEST_PAYLOAD};
use super::rules::Answer;
use super::service::{Action, AtOnce, Service};

const HANDSHAKE: Duration = Duration::from_secs(10);
const FAREWELL: Duration = Duration::from_secs(1);
const USER_ID: &str = "0.9.2342.19200300.100.1.1";

/// What follows from a request for its connection.
enum Consequence {
    None,
    GoAway,
    Dismiss(String),
    Cut,
}

/// Serves one connection to its end. That it breaks is the client's affair.
pub(super) async fn serve(service: Arc<Service>, acceptor: TlsAcceptor, stream: TcpStream) {
    let accepted = timeout(HANDSHAKE, acceptor.accept(stream).into_fallible()).await;
    let stream = match accepted {
        Ok(Ok(stream)) => stream,
        Ok(Err((_, mut stream))) => {
            service.failed_handshake();
            // Closing while the client still writes would destroy the alert that tells it why.
            let mut rest = [0; 1024];
            let drained = async { while stream.read(&mut rest).await.is_ok_and(|read| read > 0) {} };
            // A second is enough for any client that listens.
            let _ = timeout(FAREWELL, drained).await;
            return;
        }
        Err(_) => return service.failed_handshake(),
    };
    let client = Arc::new(client(&stream));
    let number = service.connected();
    let ending = Arc::new(Ending::after(service.go_away_after));
    let frames = Frames::new(stream, Arc::clone(&ending));
    let handshake = h2::server::Builder::new().max_concurrent_streams(service.max_concurrent_streams).handshake::<_, Bytes>(frames);
    let Ok(Ok(mut connection)) = timeout(HANDSHAKE, handshake).await else {
        return;
    };
    let mut requests = FuturesUnordered::new();
    loop {
        tokio::select! {
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => requests.push(answer(Arc::clone(&service), Arc::clone(&client), number, request, respond)),
                _ => return,
            },
            Some(consequence) = requests.next(), if !requests.is_empty() => match consequence {
                Consequence::None => {}
                Consequence::GoAway => ending.begin(),
                Consequence::Dismiss(reason) => ending.dismiss(reason),
                Consequence::Cut => return,
            },
            () = ending.announcement() => {}
        }
        // Those that were let through have been answered: what the GOAWAY promised is kept. The client ends the connection: closing it
        // while the client still writes would destroy the last answers on their way.
        if ending.is_announced() && requests.is_empty() {
            let _ = timeout(FAREWELL, async { while connection.accept().await.is_some() {} }).await;
            return;
        }
    }
}

fn client(stream: &tokio_rustls::server::TlsStream<TcpStream>) -> Client {
    let Some(certificate) = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()) else {
        return Client::default();
    };
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return Client { is_certified: true, ..Client::default() };
    };
    let topic = certificate
        .subject()
        .iter_attributes()
        .filter(|attribute| attribute.attr_type().to_id_string() == USER_ID)
        .find_map(|attribute| attribute.as_str().ok())
        .map(str::to_owned);
    Client { is_certified: true, topic, serial: hexadecimal(certificate.raw_serial()) }
}

async fn answer(
    service: Arc<Service>,
    client: Arc<Client>,
    connection: u64,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) -> Consequence {
    let _at_once = AtOnce::begin(&service);
    let (head, body) = request.into_parts();
    let Some(body) = read(body).await else {
        return Consequence::None;
    };
    let verdict = service.judge(&client, connection, &head, &body);
    if !verdict.delay.is_zero() && !matches!(verdict.action, Action::RefuseStream | Action::Dismiss(_) | Action::Cut) {
        tokio::time::sleep(verdict.delay).await;
    }
    let apns_id = head.headers.get("apns-id").cloned();
    let (status, refusal, consequence) = match verdict.action {
        Action::Accept { then_go_away } => (200, None, if then_go_away { Consequence::GoAway } else { Consequence::None }),
        Action::Refuse(refusal) => (refusal.status, Some(refusal), Consequence::None),
        Action::Silence => {
            // Until the client gives up.
            let _ = poll_fn(|context| respond.poll_reset(context)).await;
            return Consequence::None;
        }
        Action::RefuseStream => {
            respond.send_reset(Reason::REFUSED_STREAM);
            return Consequence::None;
        }
        Action::Dismiss(reason) => return Consequence::Dismiss(reason),
        Action::Cut => return Consequence::Cut,
    };
    let mut response = Response::new(());
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    if let Some(apns_id) = apns_id {
        response.headers_mut().insert("apns-id", apns_id);
    }
    if let Some(seconds) = refusal.as_ref().and_then(|refusal| refusal.retry_after) {
        response.headers_mut().insert("retry-after", seconds.into());
    }
    service.answered(verdict.number, status, refusal.as_ref().and_then(|refusal| refusal.reason.as_deref()).unwrap_or_default());
    let body = refusal.as_ref().map(Answer::body).unwrap_or_default();
    if let Ok(mut stream) = respond.send_response(response, body.is_empty())
        && !body.is_empty()
    {
        // A client that has gone needs no body.
        let _ = stream.send_data(body.into(), true);
    }
    consequence
}

/// The body, or its beginning if it is too long for Apple; `None` if the client gave up.
async fn read(mut body: RecvStream) -> Option<Bytes> {
    let mut read = BytesMut::new();
    while let Some(part) = body.data().await {
        let part = part.ok()?;
        // It fails only where the stream has ended.
        let _ = body.flow_control().release_capacity(part.len());
        if body.is_end_stream() && read.is_empty() {
            return Some(part);
        }
        if read.len() <= LARGEST_PAYLOAD {
            read.extend_from_slice(&part);
        }
    }
    Some(read.freeze())
}
