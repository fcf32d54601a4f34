//! A server that keeps a queue for each enrollment and writes down what it was sent: enough of one for devices to talk to.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use plist::{Dictionary, Value};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// A request as it arrived.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Seen {
    pub(crate) fn document(&self) -> Dictionary {
        Value::from_reader(std::io::Cursor::new(&self.body)).unwrap().into_dictionary().unwrap()
    }

    pub(crate) fn text(&self, key: &str) -> Option<String> {
        self.document().get(key).and_then(Value::as_string).map(Into::into)
    }

    pub(crate) fn id(&self) -> String {
        let device = self.text("UDID").or_else(|| self.text("EnrollmentID")).unwrap();
        match self.text("UserID").or_else(|| self.text("EnrollmentUserID")) {
            Some(user) if user.starts_with("FFFFFFFF") => {
                format!("{device}:{}", self.text("UserShortName").unwrap())
            }
            Some(user) => format!("{device}:{user}"),
            None => device,
        }
    }
}

#[derive(Debug, Default)]
struct State {
    seen: Vec<Seen>,
    queues: HashMap<String, Vec<Queued>>,
    denied: Vec<String>,
    drop_next: usize,
}

#[derive(Debug, Clone)]
struct Queued {
    uuid: String,
    document: Bytes,
    deferred: bool,
    /// It went out and waits for its answer.
    sent: bool,
}

/// Listens as long as it is not dropped.
pub(crate) struct Server {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    _tasks: JoinSet<()>,
}

impl Server {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let state = Arc::clone(&shared);
                connections.spawn(async move {
                    let service = service_fn(move |request| answer(Arc::clone(&state), request));
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Self { address, state, _tasks: tasks }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/mdm", self.address)
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.state.lock().unwrap().seen.clone()
    }

    /// Authenticate with this serial number is answered 403.
    pub(crate) fn deny(&self, serial_number: &str) {
        self.state.lock().unwrap().denied.push(serial_number.into());
    }

    /// The next requests are taken in and never answered: their connections close.
    pub(crate) fn drop_next(&self, requests: usize) {
        self.state.lock().unwrap().drop_next = requests;
    }

    pub(crate) fn queue(&self, id: &str, document: Bytes) {
        push(&mut self.state.lock().unwrap(), id, document);
    }
}

fn push(state: &mut State, id: &str, document: Bytes) {
    let uuid = wasmdm_simulator::message::ReceivedCommand::parse(&document).unwrap().uuid;
    state.queues.entry(id.into()).or_default().push(Queued { uuid, document, deferred: false, sent: false });
}

async fn answer(state: Arc<Mutex<State>>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Box<dyn std::error::Error + Send + Sync>> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let mut state = state.lock().unwrap();
    let seen = Seen { path: head.uri.path().to_owned(), headers: head.headers, body };
    if state.drop_next > 0 {
        state.drop_next -= 1;
        return Err("dropped".into());
    }
    let (status, body) = match seen.path.strip_prefix("/v1/enqueue/") {
        Some(ids) => enqueue(&mut state, ids, &seen),
        None => device(&mut state, &seen),
    };
    state.seen.push(seen);
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    Ok::<_, Infallible>(response).map_err(Into::into)
}

fn enqueue(state: &mut State, ids: &str, seen: &Seen) -> (StatusCode, Bytes) {
    if !seen.headers.contains_key("authorization") {
        return (StatusCode::UNAUTHORIZED, Bytes::new());
    }
    let mut status = BTreeMap::new();
    for id in ids.split(',') {
        push(state, id, seen.body.clone());
        status.insert(id.to_owned(), serde_json::json!({"push_error": "no push certificate"}));
    }
    let json = serde_json::json!({ "status": status });
    (StatusCode::OK, json.to_string().into())
}

fn device(state: &mut State, seen: &Seen) -> (StatusCode, Bytes) {
    let is_check_in = seen.headers.get("content-type").is_some_and(|value| value == "application/x-apple-aspen-mdm-checkin");
    if is_check_in {
        let denied =
            seen.text("MessageType").unwrap() == "Authenticate" && seen.text("SerialNumber").is_some_and(|serial| state.denied.contains(&serial));
        return if denied { (StatusCode::FORBIDDEN, "not listed".into()) } else { (StatusCode::OK, Bytes::new()) };
    }
    let status = seen.text("Status").unwrap();
    let queue = state.queues.entry(seen.id()).or_default();
    // What went out and was not answered comes again at Idle, and where the answer that carried it was lost.
    let again = match (status.as_str(), seen.text("CommandUUID")) {
        ("Idle", _) => {
            for queued in queue.iter_mut() {
                queued.deferred = false;
            }
            true
        }
        ("NotNow", Some(uuid)) => match queue.iter_mut().find(|queued| queued.uuid == uuid && queued.sent) {
            Some(queued) => {
                (queued.deferred, queued.sent) = (true, false);
                false
            }
            None => true,
        },
        (_, Some(uuid)) => {
            let before = queue.len();
            queue.retain(|queued| queued.uuid != uuid);
            queue.len() == before
        }
        (_, None) => return (StatusCode::BAD_REQUEST, Bytes::new()),
    };
    let sent = queue.iter().position(|queued| again && queued.sent);
    let Some(next) = sent.or_else(|| queue.iter().position(|queued| !queued.deferred && !queued.sent)) else {
        return (StatusCode::OK, Bytes::new());
    };
    queue[next].sent = true;
    (StatusCode::OK, queue[next].document.clone())
}
